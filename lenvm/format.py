"""The `lenvm` block of a checkpoint's config.json: what makes a directory a length value model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lenvm.bins import LengthBins
from lenvm.targets import Representation, ValueSpace

FORMAT_VERSION = 1
ARCHITECTURE_SUFFIX = "ForLengthValue"
HeadName = Literal["value", "length", "lookahead"]
HEAD_SETS: tuple[tuple[HeadName, ...], ...] = (("value",), ("value", "length"), ("value", "length", "lookahead"))
"""Heads that a checkpoint with a backbone may have; an attached one has the lookahead head alone."""


class LenvmFormatError(ValueError):
    """A checkpoint that is not a length value model this version can read; the message says what to do."""


class Spread(BaseModel):
    """Spread of the true remaining length around n_hat, fitted on validation: ln n ~ Normal(ln n_hat + shift, sigma).

    Knots over ln(n_hat), between which both are interpolated linearly; constant outside.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    log_n_hat: tuple[float, ...]
    shift: tuple[float, ...]
    sigma: tuple[float, ...]

    @model_validator(mode="after")
    def _same_lengths(self) -> Spread:
        if not len(self.log_n_hat) == len(self.shift) == len(self.sigma) >= 1:
            raise ValueError("log_n_hat, shift and sigma must have the same length, at least 1")
        if any(b <= a for a, b in zip(self.log_n_hat, self.log_n_hat[1:], strict=False)):
            raise ValueError("log_n_hat must increase strictly")
        if min(self.sigma) <= 0:
            raise ValueError(f"sigma must be positive, got {min(self.sigma)}")
        return self


class AblationTarget(BaseModel):
    """What the value logit was trained on where it is not the discounted return (`lenvm.targets`).

    Only checkpoints of such a comparison carry it; nothing but training, evaluation and export reads them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    representation: Representation
    longest: int | None = Field(default=None, ge=1)


class LookaheadShape(BaseModel):
    """Of a lookahead head (`lenvm.heads.LookaheadHead`): its rank r, and where its token vectors E come from.

    `table`: an own table [V, r]. `projection`: the embedding [V, d] of the backbone whose state it reads, times [d, r];
    `source` is that embedding's name in the files of the checkpoint, or of the base model where the head is attached.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    rank: int = Field(ge=1)
    embedding: Literal["table", "projection"] = "table"
    source: str | None = None

    @model_validator(mode="after")
    def _source_of_a_projection(self) -> LookaheadShape:
        if (self.embedding == "projection") != (self.source is not None):
            raise ValueError("`source` names the embedding of a projection: give it there, and nowhere else")
        return self


class LenvmConfig(BaseModel):
    """The `lenvm` block. Frozen; unknown keys are refused, so that a newer format is never read by halves."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int = FORMAT_VERSION
    heads: tuple[HeadName, ...] = ("value", "length")
    gamma: float = Field(gt=0.0, lt=1.0)
    bins: tuple[int, ...] = ()
    base_model: str = ""
    spread: Spread | None = None
    target: AblationTarget | None = None
    lookahead: LookaheadShape | None = None
    attached: Literal[True] | None = None
    base_hash: str | None = None
    hidden_size: int | None = Field(default=None, ge=1)

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: int) -> int:
        if value != FORMAT_VERSION:
            raise ValueError(f"format {value} is not known, this version reads format {FORMAT_VERSION}")
        return value

    @model_validator(mode="after")
    def _heads_and_bins(self) -> LenvmConfig:
        if self.attached and self.heads != ("lookahead",):
            raise ValueError(f"heads of an attached length value model must be ['lookahead'], got {list(self.heads)}")
        if not self.attached and self.heads not in HEAD_SETS:
            allowed = " or ".join(str(list(heads)) for heads in HEAD_SETS)
            raise ValueError(f"heads must be {allowed}, got {list(self.heads)}")
        if (self.heads != ("value",)) != bool(self.bins):
            raise ValueError("bins and the length head go together: give both or neither")
        if self.has_lookahead_head != (self.lookahead is not None):
            raise ValueError("the head `lookahead` and its shape `lookahead` go together: give both or neither")
        if {self.base_hash is not None, self.hidden_size is not None} != {bool(self.attached)}:
            raise ValueError("base_hash and hidden_size belong to an attached length value model, both of them")
        if self.bins:
            LengthBins(self.bins)
        if self.target is not None and self.target.representation == "return":
            raise ValueError("target is left out where it is the discounted return")
        _ = self.value_space
        return self

    @property
    def value_space(self) -> ValueSpace:
        """What the value logit stands for."""
        if self.target is None:
            return ValueSpace(self.gamma)
        return ValueSpace(self.gamma, self.target.representation, self.target.longest)

    @property
    def has_length_head(self) -> bool:
        return "length" in self.heads

    @property
    def has_lookahead_head(self) -> bool:
        return "lookahead" in self.heads

    @property
    def length_bins(self) -> LengthBins:
        """The bins.

        Raises:
            LenvmFormatError: if the checkpoint has a value head only.
        """
        if not self.bins:
            raise LenvmFormatError("this checkpoint has a value head only, it carries no length distribution.")
        return LengthBins.cached(self.bins)

    def to_json(self) -> dict[str, Any]:
        """What goes into config.json."""
        return self.model_dump(mode="json", exclude_none=True)

    @classmethod
    def parse(cls, block: Any, where: str) -> LenvmConfig:
        """Read the block found at `where`.

        Raises:
            LenvmFormatError: naming the place, the wrong value and the allowed ones.
        """
        if not isinstance(block, dict):
            raise LenvmFormatError(
                f"{where} is not a length value model: its config.json has no `lenvm` block. Train one with "
                "`llamafactory-cli train` under `stage: lenvm`."
            )
        try:
            return cls.model_validate(block)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(str(p) for p in e['loc']) or 'block'}: {e['msg'].removeprefix('Value error, ')} "
                f"(got {e.get('input')!r})"
                for e in error.errors()
            )
            raise LenvmFormatError(f"the `lenvm` block of {where} is not valid: {problems}.") from None


def refuse_ablation(lenvm: LenvmConfig, where: str) -> LenvmConfig:
    """The block itself, for everything that reads values as discounted returns.

    Raises:
        LenvmFormatError: if its value logit stands for something else.
    """
    if lenvm.target is not None:
        raise LenvmFormatError(
            f"{where} was trained with `lenvm_target: {lenvm.target.representation}`, a comparison that only "
            "`stage: lenvm` reads; serve and load a checkpoint trained with the default `return`."
        )
    return lenvm


def read_lenvm_config(directory: str | Path) -> LenvmConfig:
    """The `lenvm` block of a checkpoint directory whose values are discounted returns.

    Raises:
        LenvmFormatError: if there is no directory, no config.json or no valid block, or the block is an ablation's.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise LenvmFormatError(
            f"{directory} is not a length value model: there is no {path}. Give the directory that training wrote."
        )
    config = json.loads(path.read_text(encoding="utf-8"))
    return refuse_ablation(LenvmConfig.parse(config.get("lenvm"), str(directory)), str(directory))


def write_lenvm_config(directory: str | Path, lenvm: LenvmConfig) -> None:
    """Replace the `lenvm` block of a checkpoint directory's config.json, leaving everything else as it is."""
    path = Path(directory) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["lenvm"] = lenvm.to_json()
    temporary = path.with_suffix(".json.part")
    temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)
