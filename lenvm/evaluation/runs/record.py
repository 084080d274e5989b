"""`training.json`: what a training was given, written beside its checkpoint so that trainings can be compared.

The host keeps its arguments in `training_args.bin` only, a pickle, which nothing here reads.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lenvm.evaluation.errors import EvaluationError

RECORD_FILE = "training.json"


class DataFacts(BaseModel):
    """A data set as the run used it, bad rows left out."""

    model_config = ConfigDict(extra="forbid")
    completions: int = Field(ge=1)
    prompts: int = Field(ge=1)
    tokens: int = Field(ge=1, description="of the completions")
    digest: str = Field(description="equal for the same completions' prompts and lengths, in any order")

    @classmethod
    def of(cls, prompt_hashes: ArrayLike, lengths: ArrayLike) -> DataFacts:
        """From the rows' prompt hashes and completion lengths, [N] each."""
        rows = np.stack([np.asarray(prompt_hashes, np.int64), np.asarray(lengths, np.int64)])
        rows = rows[:, np.lexsort(rows)]
        return cls(
            completions=rows.shape[1],
            prompts=len(np.unique(rows[0])),
            tokens=int(rows[1].sum()),
            digest=hashlib.sha256(rows.tobytes()).hexdigest()[:16],
        )


class TrainingRecord(BaseModel):
    """The file.

    Attributes:
        settings: every setting of the stage, and each of the host's that is not its default.
        parameters: of the whole model, heads included; trainable: those that were trained.
        train: None where the data was streamed.
        evaluation: by the prefix of the metrics: `eval`, or `eval_NAME` of several sets.
    """

    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    settings: dict[str, Any]
    parameters: int = Field(ge=1)
    trainable: int = Field(ge=0)
    train: DataFacts | None
    evaluation: dict[str, DataFacts]

    def write(self, folder: str | Path) -> None:
        """Write it into a run's output folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, RECORD_FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> TrainingRecord:
        """Read it from a run's output folder.

        Raises:
            EvaluationError: if it is not there or not valid.
        """
        path = folder / RECORD_FILE
        if not path.is_file():
            raise EvaluationError(
                f"there is no {path}, which `stage: lenvm` writes at the start of a training; train again with this "
                "version of lenvm."
            )
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise EvaluationError(f"{path} is not valid at {where}: {first['msg']}; train again.") from None


def read_json(path: Path) -> Any:
    """JSON of a run's file.

    Raises:
        EvaluationError: if it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise EvaluationError(f"{path} is not JSON; was the training interrupted? Train again.") from None
