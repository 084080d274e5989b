"""What the commands of `lenvm eval` share: lists as options, errors, progress, the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

    from lenvm.evaluation.outcome import Outcome

LOG_WIDTH = 140


def wide_console() -> Console:
    """A console at least as wide as the tables where the output is no terminal (a log, a pipe)."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, LOG_WIDTH))


def joined(values: Iterable[float | str]) -> str:
    """A list as an option's default."""
    return ",".join(v if isinstance(v, str) else f"{v:g}" for v in values)


def floats(text: str, name: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"{name} must be numbers separated by commas, got {text!r}.") from None


def words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


S = TypeVar("S", bound="BaseModel")


def checked(kind: type[S], **given: Any) -> S:
    """A pydantic model of options; what it refuses becomes an error of the option."""
    from pydantic import ValidationError

    try:
        return kind(**given)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        message = first["msg"].removeprefix("Value error, ")
        raise typer.BadParameter(f"{option}: {message}, got {first['input']!r}.") from None


@contextmanager
def reported(console: Console) -> Iterator[None]:
    """What a person can act on becomes one line and exit code 1."""
    from rich.markup import escape

    from lenvm.evaluation.errors import EvaluationError
    from lenvm.format import LenvmFormatError
    from lenvm.sampling.errors import SamplingError

    try:
        yield
    except (EvaluationError, LenvmFormatError, SamplingError) as error:
        console.print(f"[bold red]error:[/bold red] {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from None


def finish(outcome: Outcome, out: Path, console: Console) -> None:
    """Keep an evaluation's results and print its tables."""
    from lenvm.evaluation.tables import show_outcome

    write_files(outcome, out)
    show_outcome(outcome, console)
    console.print(f"Everything above is in {out / 'results.json'}; `lenvm report {out}` makes a page.", highlight=False)


def write_files(outcome: Outcome, out: Path) -> None:
    """Keep an outcome: `results.json`, `tables.md`, its first table as `table.csv`, its figures as `figures.png`."""
    from lenvm.evaluation.outcome import write_csv, write_outcome
    from lenvm.report.plots import write_png

    write_outcome(outcome, out)
    write_csv(outcome.sheets[0], out / "table.csv")
    if outcome.plots:
        write_png(outcome.plots, out / "figures.png")


def max_tokens_of(sampling: Mapping[str, Any]) -> int:
    from lenvm.evaluation.errors import EvaluationError

    value = sampling.get("max_tokens")
    if not isinstance(value, int):
        raise EvaluationError("the samples do not say with which max_tokens they were drawn; give --max-tokens.")
    return value


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar a stage."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<30}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def notify(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield notify
