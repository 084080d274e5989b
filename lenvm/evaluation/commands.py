"""`lenvm eval`: measure length control and length prediction against a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lenvm.evaluation import defaults
from lenvm.evaluation.command_parts import (
    checked,
    floats,
    joined,
    max_tokens_of,
    progress,
    reported,
    wide_console,
    words,
)
from lenvm.evaluation.length_command import length
from lenvm.evaluation.lifebench_command import lifebench
from lenvm.evaluation.runs.command import ablations, scaling
from lenvm.evaluation.tokens_command import tokens
from lenvm.evaluation.tradeoff_command import tradeoff

app = typer.Typer(help="Measure length control, its price in quality, and length prediction.", no_args_is_help=True)
app.command()(lifebench)
app.command()(length)
app.command()(tokens)
app.command()(tradeoff)
app.command()(ablations)
app.command()(scaling)


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
    max_prompts: Annotated[int, typer.Option(min=2, help="Held-out prompts used.")] = defaults.MAX_PROMPTS,
    targets: Annotated[int, typer.Option(min=1, help="equal_to targets a prompt.")] = defaults.TARGETS,
    bound_targets: Annotated[
        int, typer.Option(min=1, help="at_most / at_least targets a prompt.")
    ] = defaults.BOUND_TARGETS,
    median_samples: Annotated[
        int, typer.Option(min=1, help="Answers a problem at its median length.")
    ] = defaults.MEDIAN_SAMPLES,
    share_samples: Annotated[
        int, typer.Option(min=1, help="Answers a problem at 60 % of the base's length.")
    ] = defaults.SHARE_SAMPLES,
    curve_samples: Annotated[
        int, typer.Option(min=1, help="Answers a problem at the other points.")
    ] = defaults.CURVE_SAMPLES,
    biases: Annotated[str, typer.Option(help="length_bias values of the trade-off.")] = joined(defaults.BIASES),
    budgets: Annotated[str, typer.Option(help="at_most budgets as shares of the base's mean.")] = joined(
        defaults.BUDGETS
    ),
    modes: Annotated[str, typer.Option(help="Length modes asked for.")] = joined(defaults.MODES),
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
    from lenvm.evaluation.plan import Sizes
    from lenvm.evaluation.runner import Paths, run_evaluation
    from lenvm.evaluation.schema import write_results
    from lenvm.evaluation.tables import show

    console = wide_console()
    sizes = checked(
        Sizes,
        modes=words(modes),
        **({} if controllers is None else {"controllers": words(controllers)}),
        targets=targets,
        bound_targets=bound_targets,
        median_samples=median_samples,
        share_samples=share_samples,
        curve_samples=curve_samples,
        biases=floats(biases, "--biases"),
        budgets=floats(budgets, "--budgets"),
        seed=seed,
    )
    with reported(console):
        data = read_natural(prompts, samples, max_prompts)
        settings = ServerSettings(
            server, concurrency, max_tokens or max_tokens_of(data.sampling), sampling_of(data.sampling)
        )
        with progress(console) as notify:
            results = run_evaluation(data, Paths(out, base, lenvm), settings, sizes, notify, speed)
    write_results(results, out / "results.json")
    show(results, console)
    console.print(f"Everything above is in {out / 'results.json'}.", highlight=False)


@app.command()
def show(out: Annotated[Path, typer.Argument(help="Output directory of a command of `lenvm eval`.")]) -> None:
    """Print the tables of an earlier run again."""
    from lenvm.evaluation.outcome import is_outcome, read_outcome
    from lenvm.evaluation.schema import read_results
    from lenvm.evaluation.tables import show as show_tables
    from lenvm.evaluation.tables import show_outcome

    console = wide_console()
    path = out / "results.json"
    with reported(console):
        if is_outcome(path):
            show_outcome(read_outcome(path), console)
        else:
            show_tables(read_results(path), console)
