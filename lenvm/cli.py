"""The command line `lenvm`: what the package can do.

The modules imported here import nothing heavy themselves; torch and the rest come in when a command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lenvm import __version__
from lenvm.convert_command import convert
from lenvm.distillation.command import distill
from lenvm.evaluation.commands import app as evaluation
from lenvm.pipeline.commands import app as pipeline
from lenvm.report.command import report
from lenvm.sampling.commands import sample
from lenvm.sampling.hub_commands import pull, push
from lenvm.sampling.merge_command import merge
from lenvm.sampling.split_command import split
from lenvm.view.command import view

main = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Length value models: predict and control how many tokens a language model will write.",
)
main.command()(sample)
main.command()(merge)
main.command()(split)
main.command()(push)
main.command()(pull)
main.command()(convert)
main.command()(distill)
main.command()(report)
main.command()(view)
main.add_typer(evaluation, name="eval")
main.add_typer(pipeline, name="pipeline")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"lenvm {__version__}")
        raise typer.Exit


@main.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


@main.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Directory of a length value model.")],
) -> None:
    """Print what a length value model is: heads, gamma, bins, base model, architecture."""
    import json

    from rich.console import Console

    from lenvm.format import LenvmFormatError, read_lenvm_config

    console = Console()
    try:
        block = read_lenvm_config(checkpoint)
    except LenvmFormatError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    shown = {
        "architectures": config.get("architectures"),
        "hidden_size": config.get("hidden_size"),
        "lenvm": block.to_json(),
    }
    console.print_json(json.dumps(shown))


@main.command()
def harness() -> None:
    """Print the folder of the tasks for lm-evaluation-harness, for its --include_path."""
    from lenvm.harness import FOLDER

    typer.echo(FOLDER)
