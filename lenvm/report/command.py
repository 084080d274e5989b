"""`lenvm report`: the evaluation as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="Output directory of a command of `lenvm eval`, or of a pipeline.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    timings: Annotated[
        Path | None, typer.Option(help="The pipeline's timings.json; default: the one beside the results.")
    ] = None,
) -> None:
    """Write one HTML page with every table and figure of an evaluation; it needs no other file and no network."""
    from rich.console import Console

    from lenvm.evaluation.errors import EvaluationError
    from lenvm.report.page import write_report

    try:
        write_report(run, out, timings)
    except EvaluationError as error:
        Console(stderr=True).print(f"[bold red]error:[/bold red] {error}", highlight=False)
        raise typer.Exit(1) from None
    Console().print(f"The report is in {out}.", highlight=False, soft_wrap=True)
