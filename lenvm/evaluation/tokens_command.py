"""`lenvm eval tokens`: which tokens lengthen and which shorten (section 3.6)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lenvm.evaluation.command_parts import finish, progress, reported, wide_console


def tokens(
    samples: Annotated[Path, typer.Option(help="The base's completions, as `lenvm sample` writes them.")],
    out: Annotated[Path, typer.Option(help="Output directory: results.json, tables.md.")],
    lenvm: Annotated[Path | None, typer.Option(help="Directory of the LenVM: read in this process.")] = None,
    server: Annotated[str | None, typer.Option(help="Or a server started with --lenvm-model.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer of the samples; default: the LenVM's directory.")
    ] = None,
    per_prompt: Annotated[int, typer.Option(min=1, help="Answers of a prompt that are read.")] = 16,
    min_count: Annotated[int, typer.Option(min=1, help="Occurrences a token needs.")] = 20,
    min_prompts: Annotated[int, typer.Option(min=2, help="Prompts a token must occur in.")] = 5,
    contexts: Annotated[int, typer.Option(min=0, help="Examples shown of a token.")] = 3,
    top: Annotated[int, typer.Option(min=1, help="Tokens in each table.")] = 30,
) -> None:
    """Tokens after which an answer is expected to be longer or shorter than before them.

    The effect of a token is minus its TD residual, averaged over its occurrences, with an interval by prompt.
    """
    from lenvm.evaluation.errors import EvaluationError
    from lenvm.evaluation.tokens import read_answered, tokens_outcome

    console = wide_console()
    with reported(console):
        words = tokenizer or lenvm
        if words is None:
            raise EvaluationError("with --server the tokenizer must be named; give --tokenizer DIR.")
        with progress(console) as notify:
            read = read_answered(
                samples, lenvm, server, words, per_prompt, lambda done, total: notify("reading answers", done, total)
            )
        answers, gamma, parameters = read
        limits = {"min_count": min_count, "min_prompts": min_prompts, "contexts": contexts}
        outcome = tokens_outcome(answers, gamma, {**parameters, **limits}, top, **limits)
    finish(outcome, out, console)
