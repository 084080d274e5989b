"""Writes `training.json` beside a checkpoint: what this training was given, in a form that can be compared."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

from datasets import IterableDataset

from lenvm.evaluation.runs.record import DataFacts, TrainingRecord
from lenvm_lf.arguments import LENVM_DEFAULTS

_SECRET = ("_token", "_api_key", "_secret", "_webhook_url")


def settings_of(*groups: Any) -> dict[str, Any]:
    """Every `lenvm_` key, and each other field of the host's argument classes that is not its default.

    Secrets, and what JSON has no form for, are left out.
    """
    found: dict[str, Any] = {}
    for group in groups:
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            value = value.value if isinstance(value, Enum) else value
            default = field.default_factory() if callable(field.default_factory) else field.default
            keep = field.name in LENVM_DEFAULTS or (field.init and value != default)
            if keep and not field.name.endswith(_SECRET) and _plain(value):
                found[field.name] = value
    return dict(sorted(found.items()))


def _plain(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, bool | int | float | str)
        or (isinstance(value, list | tuple) and all(map(_plain, value)))
    )


def facts_of(rows: Any) -> DataFacts | None:
    """Of usable rows; None of a stream or of nothing."""
    if rows is None or isinstance(rows, IterableDataset):
        return None
    return DataFacts.of(rows["prompt_hash"], rows["completion_length"])


def write_record(trainer: Any, model: Any, train_set: Any, eval_set: Any, *groups: Any) -> None:
    """Write the record of a training about to start.

    Args:
        trainer: says which process writes, and where.
        model: with its adapter, if there is one.
        train_set: usable rows, not packed.
        eval_set: usable rows, a dict of them by name, or None.
        *groups: the host's parsed arguments.
    """
    from llamafactory.extras.misc import count_parameters

    trainable, parameters = count_parameters(model)
    if trainer.is_world_process_zero():
        sets = {f"eval_{k}": v for k, v in eval_set.items()} if isinstance(eval_set, dict) else {"eval": eval_set}
        facts = {name: facts_of(rows) for name, rows in sets.items()}
        TrainingRecord(
            settings=settings_of(*groups),
            parameters=parameters,
            trainable=trainable,
            train=facts_of(train_set),
            evaluation={name: found for name, found in facts.items() if found is not None},
        ).write(trainer.args.output_dir)
