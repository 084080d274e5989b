"""`lenvm view`: the command line of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lenvm.evaluation.command_parts import progress, reported, wide_console


def view(
    samples: Annotated[Path, typer.Argument(help="The base's completions, as `lenvm sample` writes them.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("view.html"),
    lenvm: Annotated[Path | None, typer.Option(help="Directory of the LenVM: read in this process.")] = None,
    server: Annotated[str | None, typer.Option(help="Or a server started with --lenvm-model.")] = None,
    requests: Annotated[
        Path | None, typer.Option(help="requests.jsonl of `lenvm eval control`: answers of given lengths to compare.")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Id of a prompt; may be repeated.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts, where none is named.")] = 3,
    answers: Annotated[int, typer.Option(min=1, help="Answers of each prompt and controller.")] = 3,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer of the samples; default: the LenVM's directory.")
    ] = None,
) -> None:
    """One interactive page about one or many answers: predicted and true remaining length along their tokens.

    The file holds everything it needs, the charting library too (about 5 MB), and can be passed on as it is.
    """
    from lenvm.evaluation.errors import EvaluationError
    from lenvm.view.answers import choose, read_views
    from lenvm.view.page import write_view

    console = wide_console()
    with reported(console):
        words = tokenizer or lenvm
        if words is None:
            raise EvaluationError("with --server the tokenizer must be named; give --tokenizer DIR.")
        chosen = choose(samples, requests, prompt or (), prompts, answers)
        with progress(console) as notify:
            views = read_views(chosen, lenvm, server, words, lambda done, total: notify("reading answers", done, total))
        write_view(views, f"{len(views)} answers", out)
    console.print(f"{len(views)} answers are in {out}.", highlight=False, soft_wrap=True)
