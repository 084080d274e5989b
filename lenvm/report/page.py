"""Putting the report together: figures, a token strip, tables, all in one HTML file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.outcome import Cell, Outcome, is_outcome, read_outcome
from lenvm.evaluation.schema import ControlRow, Criterion, Estimate, Example, Results
from lenvm.evaluation.tables import wanted
from lenvm.report import plots

KEPT_NAMES = {"equal_to": "Exact hits", "at_most": "Kept", "at_least": "Kept"}
SAME_TEXT = 0.1
"""Nats a token within which guided text counts as as likely as the base's own."""
STAGES = {
    "prepare": "prepare data",
    "train_base": "train the base model",
    "sample": "sample completions",
    "train_lenvm": "train the LenVM",
    "evaluate": "evaluate",
    "report": "report",
}


@dataclass(frozen=True)
class Token:
    """One token of the strip.

    Attributes:
        text: what it adds to the answer, line breaks made visible.
        remaining: predicted tokens to come after it.
        change: how much longer (positive) or shorter the answer is expected to be because of it, in tokens.
        strength: |change| on a scale of 0 to 1.
        breaks: whether a line ends here.
    """

    text: str
    remaining: str
    change: float
    strength: float
    breaks: bool


@dataclass(frozen=True)
class Card:
    """A headline figure with what it is compared to."""

    title: str
    value: str
    note: str


def render(results: Results, timings: dict[str, Any] | None = None) -> str:
    """The page as HTML; sections without results say what is missing.

    Args:
        results: of `lenvm eval control`.
        timings: content of the pipeline's timings.json.
    """
    r = results
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            r=r,
            cards=cards(r),
            verdict=verdict(r),
            kept_names=KEPT_NAMES,
            modes=[m for m in KEPT_NAMES if any(row.mode == m for row in r.control)],
            best=best_cells(r.control),
            scatter=plots.scatter(r),
            trade_off=plots.trade_off(r.trade_off) if r.trade_off else None,
            prediction=plots.prediction(r.prediction) if r.prediction and r.prediction.points else None,
            example=plots.example(r.example) if r.example else None,
            strip=strip(r.example) if r.example else [],
            stages=stages(timings),
            total_seconds=(timings or {}).get("total", {}).get("seconds"),
            peak_bytes=(timings or {}).get("total", {}).get("peak_bytes"),
            parameters=json.dumps(r.parameters, indent=2),
            model=str(r.parameters.get("model", "")).rstrip("/").rpartition("/")[2],
            server=json.dumps(r.server, indent=2),
        )
    )


def _environment() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lenvm.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(figure=figure, wanted=wanted, criterion=criterion_value)
    return environment


def render_outcome(outcome: Outcome) -> str:
    """The page of any other evaluation than `control`: summary, figures, tables."""
    return str(
        _environment()
        .get_template("outcome.html.j2")
        .render(
            o=outcome,
            figures=[(plot.title, plots.drawn(plot)) for plot in outcome.plots],
            cell=cell,
            parameters=json.dumps(outcome.parameters, indent=2, ensure_ascii=False),
        )
    )


def cell(value: Cell, digits: int) -> str:
    """HTML of a table's cell."""
    if value is None or isinstance(value, Estimate):
        return figure(value, digits)
    return f"{value:.{digits}f}".replace("-", "−") if isinstance(value, float) else str(value)


def figure(estimate: Estimate | None, digits: int = 1, unit: str = "") -> str:
    """HTML of an estimate with its interval; a dash where there is none."""
    from markupsafe import Markup, escape

    if estimate is None:
        return Markup('<span class="none">–</span>')
    value, low, high = (f"{v:.{digits}f}".replace("-", "−") for v in (estimate.value, estimate.low, estimate.high))
    end = f"\u00a0{unit}" if unit else ""
    return Markup(f'<b>{escape(value)}{escape(end)}</b> <span class="ci">{escape(low)} to {escape(high)}</span>')


def criterion_value(criterion: Criterion) -> str:
    """HTML of a measured threshold; a count has no interval."""
    from markupsafe import Markup, escape

    value = criterion.value
    if value.low == value.high and not criterion.unit:
        return Markup(f"<b>{value.value:g}</b>")
    return figure(value, 3 if criterion.unit == "nats" else 1, str(escape(criterion.unit)))


def verdict(results: Results) -> str | None:
    """The first sentence of the page."""
    posterior, base, hard = (results.row("equal_to", key) for key in ("posterior", "base", "hard"))
    if posterior is None:
        return None
    text = f"Asked for a length, the model writes exactly that length in {posterior.kept.value:.0f} % of its answers"
    if base is not None:
        text += f" (unguided: {base.kept.value:.0f} %)"
    difference = posterior.log_prob_difference
    if base is None or base.base_log_prob is None or posterior.base_log_prob is None or difference is None:
        return text + "."
    likely = "as likely as" if abs(difference.value) <= SAME_TEXT else "less likely than"
    if difference.value > SAME_TEXT:
        likely = "more likely than"
    figures = f"{_signed(posterior.base_log_prob.value)} against {_signed(base.base_log_prob.value)} nats a token"
    if hard is not None and hard.base_log_prob is not None:
        figures += f"; the paper's hard rule: {_signed(hard.base_log_prob.value)}"
    return f"{text}, in text that the base model finds {likely} its own ({figures})."


def cards(results: Results) -> list[Card]:
    """The headline figures that these results can show."""
    found = []
    posterior, base, hard = (results.row("equal_to", key) for key in ("posterior", "base", "hard"))
    if posterior is not None:
        others = [f"{name} {_value(row.length_score)}" for name, row in (("base", base), ("paper's rule", hard)) if row]
        found.append(Card("Length Score, equal_to", _value(posterior.length_score), " · ".join(others)))
        others = [f"{name} {_value(row.kept, 0)} %" for name, row in (("base", base), ("paper's rule", hard)) if row]
        found.append(Card("Exact hits", f"{_value(posterior.kept, 0)} %", " · ".join(others)))
    share, cut = _at_share(results, "posterior at_most"), _at_share(results, "cutting at")
    if share is not None and cut is not None:
        found.append(
            Card(
                "Accuracy kept at 60 % of the length",
                f"{_value(share.value, 0)} %",
                f"cutting at the same budget: {_value(cut.value, 0)} %",
            )
        )
    if results.prediction is not None:
        rows = {p.key: p.error_return for p in results.prediction.predictors}
        own = rows.get("distribution") or rows.get("value")
        mean, floor = rows.get("mean"), rows.get("floor")
        if own is not None and mean is not None and floor is not None:
            found.append(
                Card(
                    "Error of the length predicted at the prompt",
                    f"{_value(own, 0)} %",
                    f"always the mean: {_value(mean, 0)} % · noise floor {_value(floor, 0)} %",
                )
            )
    return found


def best_cells(rows: list[ControlRow]) -> dict[str, set[str]]:
    """Per mode the controllers with the highest Length Score, for emphasis."""
    best: dict[str, set[str]] = {}
    for mode in dict.fromkeys(r.mode for r in rows):
        of_mode = [r for r in rows if r.mode == mode]
        top = max(round(r.length_score.value, 1) for r in of_mode)
        best[mode] = {r.controller for r in of_mode if round(r.length_score.value, 1) == top}
    return best


def strip(example: Example) -> list[Token]:
    """The answer's tokens with the predicted remaining length after each.

    A token's change is what it did to the expected total: remaining after it, plus the token itself, minus remaining
    before it. Zero is a token that changes nothing.
    """
    before = [example.at_prompt if example.at_prompt is not None else example.remaining[0] + 1, *example.remaining[:-1]]
    changes = [after + 1.0 - b for after, b in zip(example.remaining, before, strict=True)]
    scale = max(4.0, sorted(map(abs, changes))[int(0.95 * (len(changes) - 1))])
    return [
        Token(
            text=piece.replace("\n", "⏎") or "·",
            remaining=f"{after:.0f}",
            change=change,
            strength=round(min(1.0, abs(change) / scale), 2),
            breaks=piece.endswith("\n"),
        )
        for piece, after, change in zip(example.tokens, example.remaining, changes, strict=True)
    ]


def stages(timings: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Name, seconds and share of the longest stage, in the order in which they ran."""
    rows = (timings or {}).get("stages", {})
    longest = max((float(s["seconds"]) for s in rows.values()), default=0.0) or 1.0
    return [
        {
            "name": STAGES.get(name, name.replace("_", " ")),
            "seconds": float(s["seconds"]),
            "share": float(s["seconds"]) / longest,
            "peak_gib": float(s.get("peak_bytes", 0)) / 2**30,
        }
        for name, s in rows.items()
    ]


def write_report(directory: Path, out: Path, timings: Path | None = None) -> None:
    """Read results.json of an evaluation and write the page.

    Args:
        directory: output directory of any command of `lenvm eval`, or a pipeline's directory that holds `evaluation/`.
        out: the HTML file.
        timings: the pipeline's timings.json; default: the one in `directory` or beside it, if there is one.

    Raises:
        EvaluationError: if there are no results, or `timings` is given and missing.
    """
    from lenvm.evaluation.schema import read_results

    if not (directory / "results.json").is_file() and (directory / "evaluation" / "results.json").is_file():
        directory = directory / "evaluation"
    out.parent.mkdir(parents=True, exist_ok=True)
    if is_outcome(directory / "results.json"):
        out.write_text(render_outcome(read_outcome(directory / "results.json")), encoding="utf-8")
        return
    results = read_results(directory / "results.json")
    if timings is not None and not timings.is_file():
        raise EvaluationError(f"there is no {timings}; give the pipeline's timings.json or leave --timings out.")
    found = timings or next(
        (p for p in (directory / "timings.json", directory.parent / "timings.json") if p.is_file()), None
    )
    page = render(results, json.loads(found.read_text(encoding="utf-8")) if found else None)
    out.write_text(page, encoding="utf-8")


def _at_share(results: Results, start: str) -> Criterion | None:
    return next((c for c in results.criteria if c.name.startswith(start)), None)


def _value(estimate: Estimate, digits: int = 1) -> str:
    return f"{estimate.value:.{digits}f}"


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")
