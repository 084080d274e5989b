"""`lenvm pipeline`: run a recipe, serve its models."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lenvm.pipeline.runner import Runner

app = typer.Typer(help="Prompts to report from one recipe; serve what it made.", no_args_is_help=True)

RecipePath = Annotated[Path, typer.Argument(help="YAML file, see examples/README.md.")]
OutPath = Annotated[Path | None, typer.Option(help="Folder of the run; default: the recipe's, or runs/NAME.")]
Changes = Annotated[list[str] | None, typer.Option("--set", help="key.key=value, replaces a value of the recipe.")]
TrainPython = Annotated[
    Path | None, typer.Option(help="Python of the training environment; default: the one beside this environment.")
]


@app.command()
def run(
    recipe: RecipePath,
    out: OutPath = None,
    changes: Changes = None,
    first: Annotated[str | None, typer.Option("--from", help="Run this stage and all after it again.")] = None,
    only: Annotated[str | None, typer.Option("--only", help="Run this stage alone, again.")] = None,
    train_python: TrainPython = None,
) -> None:
    """Run what is not done yet: prepare, train_base, sample, train_lenvm, evaluate, report.

    Interrupt it whenever you like: the same command goes on where it was.
    """
    with _errors("the same command goes on where it was."), _runner(recipe, out, changes, train_python) as runner:
        runner.run(first=first, only=only)
        _show(runner.context.out / "evaluation")
        page = runner.context.out / "report" / "index.html"
        if page.is_file():
            runner.context.console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)


def _show(evaluation: Path) -> None:
    """Print the tables of an evaluation, if it is there: the report on the terminal."""
    from lenvm.evaluation.commands import wide_console
    from lenvm.evaluation.schema import read_results
    from lenvm.evaluation.tables import show

    if (evaluation / "results.json").is_file():
        show(read_results(evaluation / "results.json"), wide_console())


@app.command()
def serve(
    recipe: RecipePath,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    out: OutPath = None,
    changes: Changes = None,
    train_python: TrainPython = None,
) -> None:
    """Serve the base model with its LenVM; what is missing of them is made first. Ctrl-C ends it."""
    with _errors("the server has ended."), _runner(recipe, out, changes, train_python) as runner:
        from lenvm.pipeline.serving import serve_pair

        serve_pair(runner, host, port or None)


@contextmanager
def _runner(recipe: Path, out: Path | None, changes: list[str] | None, train_python: Path | None) -> Iterator[Runner]:
    from rich.console import Console

    from lenvm.pipeline.recipe import load_recipe
    from lenvm.pipeline.runner import Runner, status_line
    from lenvm.pipeline.stages import Context

    loaded = load_recipe(recipe, changes)
    console = Console()
    folder = (out or loaded.folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with status_line(console) as status, _folder_lock(folder):
        yield Runner(Context(loaded, folder, train_python or _train_python(), console, status))


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Two runs in one folder would destroy each other's work."""
    import fcntl

    from lenvm.pipeline.errors import PipelineError

    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PipelineError(
                f"another pipeline is at work in {folder}; wait for it or give another --out."
            ) from None
        yield


def _train_python() -> Path:
    """The training environment beside this one (as `make envs` builds them), else this interpreter."""
    beside = Path(sys.prefix).parent / "train" / "bin" / "python"
    return beside if beside.is_file() else Path(sys.executable)


@contextmanager
def _errors(interrupted: str) -> Iterator[None]:
    """Errors as one line and an exit code; SIGTERM ends children as Ctrl-C does."""
    from rich.console import Console

    from lenvm.pipeline.errors import PipelineError

    console = Console(stderr=True)

    def terminate(*_: Any) -> None:
        raise KeyboardInterrupt

    # SIGINT too: a shell starts background jobs with it ignored, and Python would leave it so
    before = {number: signal.signal(number, terminate) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except PipelineError as error:
        console.print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print(f"interrupted; {interrupted}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
