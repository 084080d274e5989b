"""`lenvm eval ablations` and `lenvm eval scaling`: Figures 3, 5 and 6 from finished trainings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lenvm.evaluation.command_parts import finish, reported, wide_console

Runs = Annotated[
    list[str], typer.Argument(help="Output folders of finished `stage: lenvm` trainings, each FOLDER or NAME=FOLDER.")
]
Out = Annotated[Path, typer.Option(help="Output directory: tables.md, table.csv, figures.png, results.json.")]
EvaluationSet = Annotated[
    str | None, typer.Option(help="Name of one set, where the trainings evaluated several (eval_on_each_dataset).")
]


def ablations(runs: Runs, out: Out, evaluation_set: EvaluationSet = None) -> None:
    """Trainings that differ in a choice: error at 0, 25, 50 and 75 % of the answer, and over the training.

    The first is the reference. What varies is read from each folder's training.json.
    """
    from lenvm.evaluation.runs.ablations import ablations_outcome
    from lenvm.evaluation.runs.read import read_runs

    console = wide_console()
    with reported(console):
        outcome = ablations_outcome(read_runs(runs, evaluation_set), {"runs": runs, "evaluation_set": evaluation_set})
    finish(outcome, out, console)


def scaling(
    runs: Runs,
    out: Out,
    metric: Annotated[str, typer.Option(help="What is drawn: a metric of the evaluation.")] = "length_mae",
    evaluation_set: EvaluationSet = None,
) -> None:
    """Error against samples a prompt, prompts and parameters, with the slope where there are three points or more."""
    from lenvm.evaluation.runs.read import read_runs
    from lenvm.evaluation.runs.scaling import METRICS, scaling_outcome

    console = wide_console()
    if metric not in METRICS:
        raise typer.BadParameter(f"--metric must be one of {', '.join(METRICS)}, got {metric!r}.")
    with reported(console):
        parameters = {"runs": runs, "metric": metric, "evaluation_set": evaluation_set}
        outcome = scaling_outcome(read_runs(runs, evaluation_set), metric, parameters)
    finish(outcome, out, console)
