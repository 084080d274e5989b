"""`lenvm eval lifebench`: Table 2 of the paper for any base model and its LenVM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lenvm.evaluation.command_parts import checked, finish, floats, progress, reported, wide_console, words


def lifebench(
    server: Annotated[str, typer.Option(help="Address of a server started with --lenvm-model.")],
    data: Annotated[Path, typer.Option(help="LIFEBench's items, JSONL: id, category, lang, task.")],
    base: Annotated[Path, typer.Option(help="Directory of the base model: scores texts in this process.")],
    out: Annotated[Path, typer.Option(help="Output directory: requests.jsonl, results.json, tables.md.")],
    targets: Annotated[str, typer.Option(help="Targets, in --unit.")] = "32,64,128,256,512,1024",
    unit: Annotated[
        str, typer.Option(help="tokens, as in the paper, or words, as in LIFEBench: of the constraint and the score.")
    ] = "tokens",
    modes: Annotated[str, typer.Option(help="Length modes asked for.")] = "equal_to,at_most,at_least",
    controllers: Annotated[
        str,
        typer.Option(
            help="Beside the base model: cut (max_tokens), boost (logit bias on stop tokens), countdown (asked in the "
            "prompt), hard, soft, posterior, posterior_strict."
        ),
    ] = "cut,boost,countdown,hard,posterior,posterior_strict",
    boost: Annotated[float, typer.Option(help="Logit bias of boost; negative under at_least.")] = 3.0,
    sharpness: Annotated[str, typer.Option(help="Sharpness values of the posterior.")] = "1,2,4",
    limit: Annotated[int | None, typer.Option(min=2, help="Only so many items, spread over the file.")] = None,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Leave out items whose prompt is longer: for models with a short context.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Bound of every answer; default: twice the largest target, or six times in words."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0)] = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="The paper's; see Appendix A.")] = 0.999,
    top_k: Annotated[int, typer.Option(min=-1, help="The paper's; -1 is off.")] = 15,
    judge: Annotated[
        str | None, typer.Option(help="Address of an OpenAI-compatible endpoint whose model rates every answer.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name there.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """LIFEBench with targets in tokens: Length Score and deviation, and what they cost in quality.

    Interrupted runs are taken up where they stopped. Both scorers are printed: the paper's (Eq. 17-18) and that of
    LIFEBench's released script.
    """
    from lenvm.evaluation.client import ServerSettings
    from lenvm.evaluation.judge import JudgeSettings
    from lenvm.evaluation.lifebench import LifebenchSizes, run_lifebench
    from lenvm.evaluation.lifebench_items import read_items

    console = wide_console()
    wanted = floats(targets, "--targets")
    if any(t != int(t) for t in wanted):
        raise typer.BadParameter(f"--targets must be whole numbers, got {targets!r}.")
    sizes = checked(
        LifebenchSizes,
        targets=tuple(int(t) for t in wanted),
        unit=unit,
        modes=words(modes),
        controllers=words(controllers),
        boost=boost,
        sharpness=floats(sharpness, "--sharpness"),
        limit=limit,
        max_prompt_tokens=max_prompt_tokens,
        seed=seed,
    )
    if (judge is None) != (judge_model is None):
        raise typer.BadParameter("--judge and --judge-model go together: the address, and the model's name there.")
    judging = None if judge is None or judge_model is None else JudgeSettings(judge, judge_model, concurrency)
    sampling = {"temperature": temperature, "top_p": top_p, **({} if top_k == -1 else {"top_k": top_k})}
    with reported(console):
        room = (2 if sizes.unit == "tokens" else 6) * max(sizes.targets)  # a word may be several tokens
        settings = ServerSettings(server, concurrency, max_tokens or room, sampling)
        with progress(console) as notify:
            items = read_items(data, sizes.limit)
            outcome = run_lifebench(items, base, out, settings, sizes, notify, judging)
    finish(outcome, out, console)
