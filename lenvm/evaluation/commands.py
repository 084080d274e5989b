"""`lenvm eval`: measure length control and length prediction against a running server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from lenvm.evaluation.plan import Sizes

LOG_WIDTH = 140
app = typer.Typer(help="Measure length control, its price in quality, and length prediction.", no_args_is_help=True)


def wide_console() -> Console:
    """A console at least as wide as the tables where the output is no terminal (a log, a pipe)."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, LOG_WIDTH))


def _floats(text: str, name: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"{name} must be numbers separated by commas, got {text!r}.") from None


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _sizes(**given: Any) -> Sizes:
    """Sizes of the plan; what pydantic refuses becomes an error of the option."""
    from pydantic import ValidationError

    from lenvm.evaluation.plan import Sizes

    try:
        return Sizes(**given)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise typer.BadParameter(f"{option}: {first['msg']}, got {first['input']!r}.") from None


def _max_tokens(sampling: Mapping[str, Any]) -> int:
    from lenvm.evaluation.errors import EvaluationError

    value = sampling.get("max_tokens")
    if not isinstance(value, int):
        raise EvaluationError("the samples do not say with which max_tokens they were drawn; give --max-tokens.")
    return value


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
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


@app.command()
def control(
    server: Annotated[str, typer.Option(help="Address of a server started with --lenvm-model.")],
    prompts: Annotated[Path, typer.Option(help="Held-out prompts, JSONL: id, messages, optional answer.")],
    samples: Annotated[Path, typer.Option(help="The base's completions of them, as `lenvm sample` writes them.")],
    base: Annotated[Path, typer.Option(help="Directory of the base model: scores texts in this process.")],
    out: Annotated[Path, typer.Option(help="Output directory: requests.jsonl, results.json.")],
    lenvm: Annotated[
        Path | None, typer.Option(help="Directory of the LenVM: predicts lengths at the prompt in this process.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    max_prompts: Annotated[int, typer.Option(min=2, help="Held-out prompts used.")] = 104,
    targets: Annotated[int, typer.Option(min=1, help="equal_to targets a prompt.")] = 3,
    bound_targets: Annotated[int, typer.Option(min=1, help="at_most / at_least targets a prompt.")] = 2,
    median_samples: Annotated[int, typer.Option(min=1, help="Answers a problem at its median length.")] = 4,
    share_samples: Annotated[int, typer.Option(min=1, help="Answers a problem at 60 % of the base's length.")] = 4,
    curve_samples: Annotated[int, typer.Option(min=1, help="Answers a problem at the other points.")] = 2,
    biases: Annotated[str, typer.Option(help="length_bias values of the trade-off.")] = "-16,-6,-2,4",
    budgets: Annotated[str, typer.Option(help="at_most budgets as shares of the base's mean.")] = "0.4,0.8,1.1",
    modes: Annotated[str, typer.Option(help="Length modes asked for.")] = "equal_to,at_most,at_least",
    controllers: Annotated[
        str | None, typer.Option(help="Controllers beside the base model, e.g. hard,posterior. Default: all.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Bound of every answer; default: that of the samples.")
    ] = None,
    speed: Annotated[bool, typer.Option(help="Measure tokens/s guided and unguided as well.")] = True,
    seed: Annotated[int, typer.Option(help="Of targets and sampling.")] = 0,
) -> None:
    """Ask for answers of given lengths, score them, compare with the base model and with the paper's rule.

    Interrupted runs are taken up where they stopped; every answer is kept in OUT/requests.jsonl.
    """
    from lenvm.evaluation.client import ServerSettings, sampling_of
    from lenvm.evaluation.data import read_natural
    from lenvm.evaluation.errors import EvaluationError
    from lenvm.evaluation.runner import Paths, run_evaluation
    from lenvm.evaluation.schema import write_results
    from lenvm.evaluation.tables import show
    from lenvm.format import LenvmFormatError

    console = wide_console()
    sizes = _sizes(
        modes=_words(modes),
        **({} if controllers is None else {"controllers": _words(controllers)}),
        targets=targets,
        bound_targets=bound_targets,
        median_samples=median_samples,
        share_samples=share_samples,
        curve_samples=curve_samples,
        biases=_floats(biases, "--biases"),
        budgets=_floats(budgets, "--budgets"),
        seed=seed,
    )
    try:
        data = read_natural(prompts, samples, max_prompts)
        settings = ServerSettings(
            server, concurrency, max_tokens or _max_tokens(data.sampling), sampling_of(data.sampling)
        )
        with _progress(console) as notify:
            results = run_evaluation(data, Paths(out, base, lenvm), settings, sizes, notify, speed)
    except (EvaluationError, LenvmFormatError) as error:
        console.print(f"[bold red]error:[/bold red] {error}", highlight=False)
        raise typer.Exit(1) from None
    write_results(results, out / "results.json")
    show(results, console)
    console.print(f"Everything above is in {out / 'results.json'}.", highlight=False)


@app.command()
def show(out: Annotated[Path, typer.Argument(help="Output directory of `lenvm eval control`.")]) -> None:
    """Print the tables of an earlier run again."""
    from lenvm.evaluation.errors import EvaluationError
    from lenvm.evaluation.schema import read_results
    from lenvm.evaluation.tables import show as show_tables

    console = wide_console()
    try:
        show_tables(read_results(out / "results.json"), console)
    except EvaluationError as error:
        console.print(f"[bold red]error:[/bold red] {error}", highlight=False)
        raise typer.Exit(1) from None
