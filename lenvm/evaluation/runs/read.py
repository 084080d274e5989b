"""A finished `stage: lenvm` training as its folder tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.runs.record import RECORD_FILE, TrainingRecord, read_json

RESULTS_FILE, STATE_FILE = "eval_results.json", "trainer_state.json"
PLACES = (
    "output_dir", "logging_dir", "run_name", "dataset_dir", "eval_dataset", "media_dir", "tokenized_path", "cache_dir",
    "overwrite_output_dir", "overwrite_cache", "report_to", "disable_tqdm", "plot_loss", "do_eval", "do_predict",
    "eval_strategy", "eval_steps", "eval_delay", "per_device_eval_batch_size", "resume_from_checkpoint",
    "preprocessing_num_workers", "dataloader_num_workers", "local_rank", "val_size",
)  # fmt: skip
"""Settings that say where things lie and what is printed: they make no variant. So do all that begin with LOGGED."""
LOGGED = ("save_", "logging_", "ray_", "swanlab_", "hub_")


def whole(number: float) -> float | int:
    """The number, as an integer if it is one."""
    return int(number) if number == int(number) else number


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        name: given by the reader, or None.
        folder: its output folder.
        metrics: of the evaluation at its end, without the prefix.
        curve: (optimizer step, metrics) of each evaluation, the last at the end of training.
        record: what it was given; None where the folder does not hold it.
        digest: of the evaluation's completions, where the record has it.
    """

    name: str | None
    folder: Path
    metrics: Mapping[str, float]
    curve: Sequence[tuple[int, Mapping[str, float]]]
    record: TrainingRecord | None
    digest: str | None

    def metric(self, name: str) -> float:
        """A metric of the last evaluation.

        Raises:
            EvaluationError: if the evaluation does not have it.
        """
        if name not in self.metrics:
            raise EvaluationError(
                f"{self.folder / RESULTS_FILE} has no {name}; it has {', '.join(sorted(self.metrics))}. Was the "
                "evaluation set without finished completions?"
            )
        return float(self.metrics[name])

    @property
    def choices(self) -> dict[str, Any]:
        """What may make it a variant: settings, and what of the data was trained on. Empty without a record."""
        if self.record is None:
            return {}
        found = {k: v for k, v in self.record.settings.items() if k not in PLACES and not k.startswith(LOGGED)}
        if self.record.train is not None:
            data = self.record.train
            found |= {"samples per prompt": whole(round(data.completions / data.prompts, 1)), "prompts": data.prompts}
        return found


def read_runs(words: Sequence[str], evaluation_set: str | None = None) -> list[Run]:
    """Runs as named on the command line, all evaluated on the same completions.

    Args:
        words: FOLDER or NAME=FOLDER.
        evaluation_set: where several sets were evaluated (`eval_on_each_dataset`), the name of one.

    Raises:
        EvaluationError: if there are fewer than two, a folder is no finished run, or the evaluations differ.
    """
    prefix = f"eval_{evaluation_set}" if evaluation_set else "eval"
    runs = [_read_run(word, prefix) for word in words]
    if len(runs) < 2:
        raise EvaluationError(f"at least two trainings are compared, got {len(runs)}; name more folders.")
    first = runs[0]
    for run in runs[1:]:
        told = run.digest is not None and first.digest is not None
        if (run.digest != first.digest) if told else (run.metrics.get("targets") != first.metrics.get("targets")):
            raise EvaluationError(
                f"{first.folder} and {run.folder} were evaluated on different completions, so their errors do not "
                "compare; evaluate both on one file."
            )
    return runs


def _read_run(word: str, prefix: str) -> Run:
    name, equals, path = word.partition("=")
    if not equals or Path(word).is_dir():
        name, path = "", word
    folder = Path(path)
    if not folder.is_dir():
        raise EvaluationError(f"there is no folder {folder}; give the output folder of a training, or NAME=FOLDER.")
    results = folder / RESULTS_FILE
    if not results.is_file():
        raise EvaluationError(
            f"there is no {results}; train with `do_eval: true` and an evaluation set, and to the end."
        )
    found = read_json(results)
    metrics = _metrics(found, prefix)
    if "value_loss" not in metrics:
        names = sorted({k[5 : -len("_value_loss")] for k in found if k.startswith("eval_") and k.endswith("_value_loss")})
        raise EvaluationError(
            f"{results} has no {prefix}_value_loss"
            + (f"; give --evaluation-set, one of {', '.join(names)}." if names else ": it is no `stage: lenvm` run.")
        )
    record = TrainingRecord.read(folder) if (folder / RECORD_FILE).is_file() else None
    facts = record.evaluation.get(prefix) if record is not None else None
    return Run(name or None, folder, metrics, _curve(folder, prefix, metrics, record), record, facts.digest if facts else None)


def _metrics(found: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {k.removeprefix(f"{prefix}_"): v for k, v in found.items() if k.startswith(f"{prefix}_")}


def _curve(
    folder: Path, prefix: str, last: Mapping[str, float], record: TrainingRecord | None
) -> list[tuple[int, Mapping[str, float]]]:
    path = folder / STATE_FILE
    if not path.is_file():
        return []
    state = read_json(path)
    curve: list[tuple[int, Mapping[str, float]]] = [
        (entry["step"], _metrics(entry, prefix)) for entry in state["log_history"] if f"{prefix}_value_loss" in entry
    ]
    # the evaluation behind the training is not in the state; with load_best_model_at_end it is of an earlier step
    best = record is not None and record.settings.get("load_best_model_at_end")
    if not best and (not curve or curve[-1][0] < state["global_step"]):
        curve.append((state["global_step"], last))
    return curve
