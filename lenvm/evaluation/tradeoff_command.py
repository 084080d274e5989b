"""`lenvm eval tradeoff`: Figure 2 of the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lenvm.evaluation.command_parts import checked, finish, floats, progress, reported, wide_console


def tradeoff(
    server: Annotated[str, typer.Option(help="Address of a server started with --lenvm-model.")],
    data: Annotated[Path, typer.Option(help="Problems, JSONL: question or problem (or messages), and answer.")],
    out: Annotated[Path, typer.Option(help="Output directory: requests.jsonl, results.json, tables.md.")],
    base: Annotated[
        Path | None, typer.Option(help="Directory of the base model: scores one answer a problem and setting.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers a problem and setting; the paper: 64.")] = 8,
    biases: Annotated[str, typer.Option(help="length_bias values; 0 must meet the base model.")] = "-40,-16,-6,-2,0",
    budgets: Annotated[str, typer.Option(help="Budgets of posterior at_most, in tokens.")] = "",
    passes: Annotated[str, typer.Option(help="k of pass@k.")] = "1",
    limit: Annotated[int | None, typer.Option(min=2, help="Only so many problems, spread over the file.")] = None,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Leave out problems whose prompt is longer, by --base: for a short context."),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="Line before a bare question; default: the paper's for mathematics.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="Key of the question.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Bound of every answer.")] = 2048,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="The paper's, for guided and unguided alike.")] = 0.01,
    top_k: Annotated[
        int | None,
        typer.Option(min=-1, help="For guided and unguided alike; -1 is off. Default: as many as the server scores."),
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """How much accuracy shorter answers cost: tilting and budgets against cutting the base model's own answers.

    Answers are judged by math-verify. Interrupted runs are taken up where they stopped.
    """
    import asyncio
    from dataclasses import replace

    from lenvm.evaluation.assemble import TextScore
    from lenvm.evaluation.client import ServerSettings, server_candidates
    from lenvm.evaluation.errors import EvaluationError
    from lenvm.evaluation.grading import verified
    from lenvm.evaluation.problems import fitting, read_problems
    from lenvm.evaluation.runner import ask_plan, score_answers
    from lenvm.evaluation.tradeoff import TradeoffSizes, graded, make_plan, tradeoff_outcome
    from lenvm.instructions import MATH

    console = wide_console()
    sizes = checked(
        TradeoffSizes,
        samples=samples,
        biases=floats(biases, "--biases"),
        budgets=floats(budgets, "--budgets"),
        passes=floats(passes, "--passes"),
        seed=seed,
    )
    if max(sizes.passes) > samples:
        raise typer.BadParameter(f"pass@{max(sizes.passes)} needs as many answers; give --samples {max(sizes.passes)}.")
    if max_prompt_tokens is not None and base is None:
        raise typer.BadParameter("--max-prompt-tokens needs --base, whose tokenizer counts.")
    sampling = {"temperature": temperature, "top_p": top_p, **({"min_p": min_p} if min_p else {})}
    with reported(console):
        problems = read_problems(data, limit, MATH if instruction is None else instruction, question)
        if base is not None and any(p.images for p in problems):
            raise EvaluationError("--base scores answers by their text alone, and these problems have images; omit it.")
        whole = len(problems)
        if max_prompt_tokens is not None and base is not None:
            problems = fitting(problems, base, max_prompt_tokens)
        if any(b > max_tokens for b in sizes.budgets):
            raise EvaluationError(f"a budget above --max-tokens {max_tokens} bounds nothing; got {sizes.budgets}.")
        by_id = {p.id: p for p in problems}
        parameters = {
            "problems": [[p.id, p.answer, *(i.sha256 for i in p.images)] for p in problems],
            "sizes": sizes.model_dump(mode="json"),
            "instruction": problems[0].messages[-1]["content"],
        }
        settings = ServerSettings(server, concurrency, max_tokens, sampling)
        # A guided token is one of the K candidates that are scored: the base model alone must choose among as many, or
        # its text differs from that of length_bias 0 for a reason that has nothing to do with length.
        wide = asyncio.run(server_candidates(settings)) if top_k is None else top_k
        if wide != -1:
            settings = replace(settings, sampling={**sampling, "top_k": wide})
        with progress(console) as notify:
            asked = ask_plan(
                make_plan(problems, sizes),
                lambda request: by_id[request.prompt_id].asked,
                settings,
                out / "requests.jsonl",
                parameters,
                notify,
            )
            answers = asyncio.run(asked)
            notify("judging answers", 0, 1)
            found = graded(answers, problems, sizes, verified)
            notify("judging answers", 1, 1)
            log_probs: dict[str, TextScore] = {}
            if base is not None:
                from lenvm.sampling.tokens import PromptTokenizer

                tokenizer = PromptTokenizer(base)
                first = [a for a in answers if a.request.sample == 0]
                log_probs = score_answers(
                    first, lambda request: tokenizer.prompt_ids(by_id[request.prompt_id].messages), base, notify
                )
        recorded = {**parameters, "problems": len(problems), "data": data.name, "sampling": settings.sampling}
        outcome = tradeoff_outcome(
            problems,
            answers,
            found,
            sizes,
            {**recorded, "max_tokens": max_tokens, "concurrency": concurrency},
            log_probs,
        )
        if len(problems) < whole:
            outcome.summary.append(
                f"{whole - len(problems)} problems were left out: their prompts have more than {max_prompt_tokens} "
                "tokens."
            )
    finish(outcome, out, console)
