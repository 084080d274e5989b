"""`lenvm eval length`: Table 3 of the paper, and the error along the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lenvm.evaluation.command_parts import finish, progress, reported, wide_console


def length(
    prompts: Annotated[Path, typer.Option(help="Held-out prompts, JSONL: id, messages, optional domain.")],
    samples: Annotated[Path, typer.Option(help="The base's completions of them, as `lenvm sample` writes them.")],
    lenvm: Annotated[Path, typer.Option(help="Directory of the LenVM, read in this process.")],
    out: Annotated[Path, typer.Option(help="Output directory: results.json, tables.md.")],
    domain: Annotated[str, typer.Option(help="Key of the prompt file that names a prompt's domain.")] = "kind",
    max_prompts: Annotated[int | None, typer.Option(min=2, help="Only so many prompts.")] = None,
    followed: Annotated[int, typer.Option(min=0, help="Answers of a prompt that are followed token by token.")] = 4,
    base: Annotated[
        Path | None, typer.Option(help="Directory of the base model, for a LenVM that looks ahead.")
    ] = None,
) -> None:
    """How well lengths are predicted: before the first token (Eq. 13-15, by domain) and along the answer.

    Beside the LenVM stand the mean of the other prompts, the mean of the domain, a regression on the prompt's length,
    and the error that even a perfect predictor would show because the truth comes from N samples.
    """
    from lenvm.evaluation.data import read_natural
    from lenvm.evaluation.errors import EvaluationError
    from lenvm.evaluation.length import Course, finished_answers, length_outcome
    from lenvm.evaluation.scoring import predict_at_prompt
    from lenvm.evaluation.values import Text, local_values

    console = wide_console()
    with reported(console):
        data = read_natural(prompts, samples, max_prompts, domain)
        if len(data.prompts) < 2:
            raise EvaluationError(f"{samples} has completions of {len(data.prompts)} prompt; at least 2 are needed.")
        with progress(console) as notify:
            notify("predicting at the prompt", 0, 1)
            predicted = predict_at_prompt(lenvm, [p.token_ids for p in data.prompts], base, data.sampling)
            notify("predicting at the prompt", 1, 1)
            chosen = finished_answers(data.prompts, followed)
            texts = [Text(data.prompts[i].token_ids, data.prompts[i].samples[k].token_ids, True) for i, k in chosen]
            values = (
                local_values(lenvm, texts, lambda done, total: notify("following answers", done, total))[0]
                if texts
                else []
            )
        courses = [Course(i, len(t.completion), v) for (i, _), t, v in zip(chosen, texts, values, strict=True)]
        parameters = {"model": data.model, "sampling": data.sampling, "domain": domain, "followed": followed}
        outcome = length_outcome(data, predicted, courses, parameters)
    finish(outcome, out, console)
