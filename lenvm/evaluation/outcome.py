"""What every evaluation but `control` writes: tables and figures in one layout, for the terminal, Markdown and HTML.

A cell that was measured on a sample is an `Estimate`, with both ends of its interval; so `results.json` alone is enough
to draw the page again.
"""

from __future__ import annotations

import csv
import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.schema import Estimate

OUTCOME_VERSION = 1
Kind = Literal["lifebench", "length", "tokens", "tradeoff", "ablations", "scaling", "rl"]
Cell = Estimate | int | float | str | None


class Sheet(BaseModel):
    """A table. `digits` are decimals of each column; percentages and tokens are in the head's own words."""

    model_config = ConfigDict(extra="forbid")
    title: str
    head: list[str]
    rows: list[list[Cell]]
    digits: list[int] = Field(default_factory=list, description="decimals of each column; 1 where the list is shorter")
    note: str = ""

    def decimals(self, column: int) -> int:
        """Decimals of a column."""
        return self.digits[column] if column < len(self.digits) else 1


class Series(BaseModel):
    """Points of a figure, joined (`line`) or not; intervals where `low` and `high` are given."""

    model_config = ConfigDict(extra="forbid")
    label: str
    x: list[float]
    y: list[float]
    y_low: list[float] | None = None
    y_high: list[float] | None = None
    names: list[str] | None = Field(default=None, description="of the points, which are numbered for the legend")
    style: Literal["line", "points", "rows", "words"] = Field(
        default="line",
        description="rows: each of `names` on a line of its own, its y along the axis; words: a word cloud, each of "
        "`names` as large as its y. x says nothing in either",
    )
    colour: str | None = Field(default=None, description="a name of `lenvm.report.plots.COLOURS`")


class Plot(BaseModel):
    """A figure."""

    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=r"^[a-z_]+$")
    title: str
    x_label: str
    y_label: str
    series: list[Series]
    diagonal: bool = Field(default=False, description="draw y = x")
    log: bool = Field(default=False, description="logarithmic axes")


class Outcome(BaseModel):
    """results.json of one evaluation."""

    model_config = ConfigDict(extra="forbid")
    version: int = OUTCOME_VERSION
    kind: Kind
    title: str
    created: str
    versions: dict[str, str]
    parameters: dict[str, Any]
    summary: list[str] = Field(description="what was measured on what, in sentences")
    sheets: list[Sheet]
    plots: list[Plot] = Field(default_factory=list)

    def sheet(self, title: str) -> Sheet:
        """The sheet whose title begins so.

        Raises:
            KeyError: if there is none.
        """
        for sheet in self.sheets:
            if sheet.title.startswith(title):
                return sheet
        raise KeyError(f"no sheet {title!r}; there are {', '.join(s.title for s in self.sheets)}")


def new_outcome(kind: Kind, title: str, parameters: dict[str, Any], **content: Any) -> Outcome:
    """An outcome made now, with the versions of what is installed here."""
    from lenvm.evaluation.runner import package_versions

    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Outcome(
        kind=kind, title=title, created=created, versions=package_versions(), parameters=parameters, **content
    )


def certain(estimate: Estimate | None) -> Estimate:
    """An estimate that must exist because there are values behind it."""
    assert estimate is not None, "called with at least one value"
    return estimate


def markdown(outcome: Outcome) -> str:
    """Summary and tables as Markdown: `value ±wider side of the interval`."""
    lines = [f"### {outcome.title}", "", *outcome.summary, ""]
    for sheet in outcome.sheets:
        lines += [f"**{sheet.title}**", "", "| " + " | ".join(h or " " for h in sheet.head) + " |"]
        lines.append("|" + "---|" * len(sheet.head))
        for row in sheet.rows:
            cells = [_plain(cell, sheet.decimals(i)).replace("|", "\\|") for i, cell in enumerate(row)]
            lines.append("| " + " | ".join(cells) + " |")
        lines += ["", *([sheet.note, ""] if sheet.note else [])]
    return "\n".join(lines)


def _plain(cell: Cell, digits: int) -> str:
    if cell is None:
        return "–"
    if isinstance(cell, Estimate):
        side = max(cell.value - cell.low, cell.high - cell.value)
        return f"{cell.value:.{digits}f} ±{side:.{digits}f}"
    return f"{cell:.{digits}f}" if isinstance(cell, float) else str(cell)


def write_outcome(outcome: Outcome, out: Path) -> None:
    """Write `results.json` and `tables.md` into a directory, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (
        ("results.json", outcome.model_dump_json(indent=1) + "\n"),
        ("tables.md", markdown(outcome)),
    ):
        temporary = out / (name + ".part")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(out / name)


def write_csv(sheet: Sheet, path: Path) -> None:
    """Write a table as CSV, every digit; an estimate takes three columns, the value and both ends of its interval."""
    wide = [any(isinstance(row[i], Estimate) for row in sheet.rows) for i in range(len(sheet.head))]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = zip(sheet.head, wide, strict=True)
        writer.writerow([n for name, w in names for n in ((name, f"{name} low", f"{name} high") if w else (name,))])
        for row in sheet.rows:
            cells: list[object] = []
            for cell, w in zip(row, wide, strict=True):
                if isinstance(cell, Estimate):
                    cells += [cell.value, cell.low, cell.high]
                else:
                    cells += [cell, None, None] if w else [cell]
            writer.writerow(["" if cell is None else cell for cell in cells])


def is_outcome(path: Path) -> bool:
    """Whether a results.json is one of these, and not one of `lenvm eval control`."""
    if not path.is_file():
        return False
    try:
        return "kind" in json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise EvaluationError(f"{path} is not JSON; run the evaluation again.") from None


def read_outcome(path: Path) -> Outcome:
    """Read results.json.

    Raises:
        EvaluationError: if it is missing, of another version or not valid.
    """
    if not path.is_file():
        raise EvaluationError(f"there is no {path}; make it with one of the commands of `lenvm eval`.")
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("version") != OUTCOME_VERSION:
        raise EvaluationError(
            f"{path} has version {content.get('version')!r}, this program reads {OUTCOME_VERSION}; "
            "run the evaluation again."
        )
    try:
        return Outcome.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise EvaluationError(
            f"{path} is not valid at {'.'.join(map(str, first['loc']))}: {first['msg']}; run the evaluation again."
        ) from None
