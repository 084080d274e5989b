"""The layout of results.json: what the evaluation writes and the report reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lenvm.evaluation.bootstrap import Interval
from lenvm.evaluation.errors import EvaluationError

RESULTS_VERSION = 1


class Estimate(BaseModel):
    """A figure with its 95 % interval and how many completions and prompts are behind it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    value: float
    low: float
    high: float
    n: int
    prompts: int

    @classmethod
    def of(cls, interval: Interval | None, factor: float = 1.0) -> Estimate | None:
        """From an interval, in another unit; None stays None."""
        if interval is None or not math.isfinite(interval.value):
            return None
        scaled = interval.scaled(factor)
        return cls(value=scaled.value, low=scaled.low, high=scaled.high, n=scaled.n, prompts=scaled.prompts)


class ControlRow(BaseModel):
    """One controller under one mode. Percentages are 0-100; log-probabilities are nats a token."""

    model_config = ConfigDict(extra="forbid")
    mode: str
    controller: str
    label: str
    length_score: Estimate
    deviation: Estimate
    kept: Estimate
    natural_stops: Estimate | None = Field(description="see assemble.natural_stop")
    base_log_prob: Estimate | None
    log_prob_difference: Estimate | None
    repetition: Estimate
    accuracy: Estimate | None
    mean_length: Estimate
    released_score: Estimate | None = Field(default=None, description="see metrics.released_score")
    cut_sentences: Estimate | None = Field(default=None, description="see metrics.cut_sentence")
    points: list[tuple[int, int]] = Field(default_factory=list, description="pairs of asked and obtained tokens")


class MedianRow(BaseModel):
    """Accuracy at the problems' natural median length; `difference` is against the base's own samples, in points."""

    model_config = ConfigDict(extra="forbid")
    controller: str
    label: str
    accuracy: Estimate
    difference: Estimate | None
    kept: Estimate | None


class CurvePoint(BaseModel):
    """One setting of the trade-off: mean truncated length in tokens and accuracy in per cent."""

    model_config = ConfigDict(extra="forbid")
    setting: float
    label: str
    mean_length: Estimate
    accuracy: Estimate
    share_of_base: Estimate | None
    overruns: Estimate | None = None
    hard_cut_accuracy: float | None = Field(default=None, description="of the hard cut at the same mean length")


class HardCutCurve(BaseModel):
    """Cutting the base's own samples at every budget."""

    model_config = ConfigDict(extra="forbid")
    budgets: list[float]
    mean_lengths: list[float]
    accuracies: list[float]


class TradeOff(BaseModel):
    """Accuracy against length on the problems."""

    model_config = ConfigDict(extra="forbid")
    base_accuracy: Estimate
    base_mean_length: Estimate
    budgets: list[CurvePoint]
    biases: list[CurvePoint]
    hard_cuts: list[CurvePoint]
    curve: HardCutCurve


class Predictor(BaseModel):
    """One way of predicting a length at the prompt; errors and bias in per cent."""

    model_config = ConfigDict(extra="forbid")
    key: str
    label: str
    error_return: Estimate | None = Field(default=None, description="MRE against L_GT, Eq. 15")
    error_mean: Estimate | None = Field(default=None, description="MRE against the mean length")
    bias_mean: Estimate | None = Field(default=None, description="mean signed relative error against the mean length")


class PromptPoint(BaseModel):
    """Truth and predictions of one prompt, in tokens."""

    model_config = ConfigDict(extra="forbid")
    prompt_id: str
    kind: str
    true_return: float
    true_mean: float
    from_value: float
    expected: float | None
    p50: float | None
    p90: float | None


class Prediction(BaseModel):
    """Prompt-boundary prediction (section 3.4)."""

    model_config = ConfigDict(extra="forbid")
    samples_per_prompt: float
    gamma: float
    predictors: list[Predictor]
    coverage_p50: Estimate | None
    coverage_p90: Estimate | None
    total_bias: float | None = Field(
        default=None, description="sum of E[L] over sum of mean lengths, minus 1, per cent"
    )
    points: list[PromptPoint]


class Speed(BaseModel):
    """Completion tokens a second through the client."""

    model_config = ConfigDict(extra="forbid")
    concurrency: int
    unguided: float
    guided: float
    ratio: float
    blocks: list[dict[str, float | bool]]


class Example(BaseModel):
    """One answer with the predicted remaining length after each prefix."""

    model_config = ConfigDict(extra="forbid")
    prompt: str
    text: str
    length: int
    finish_reason: str
    at_prompt: float | None
    tokens: list[str]
    remaining: list[float]


class NaturalSummary(BaseModel):
    """What the base does by itself, from the samples file."""

    model_config = ConfigDict(extra="forbid")
    prompts: int
    problems: int
    samples: int
    censored: float = Field(description="share of completions cut by max_tokens, per cent")
    mean_length: float
    percentiles: dict[str, float]
    accuracy: Estimate | None
    lengths: list[int] = Field(default_factory=list, description="histogram: completions of 0, 1, 2, ... tokens")


class Criterion(BaseModel):
    """A threshold of the project and what was measured; `met` is judged on the point estimate."""

    model_config = ConfigDict(extra="forbid")
    name: str
    value: Estimate
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def met(self) -> bool:
        """Whether the point estimate is within the bounds."""
        over = self.at_least is None or self.value.value >= self.at_least
        return over and (self.at_most is None or self.value.value <= self.at_most)


class Results(BaseModel):
    """results.json."""

    model_config = ConfigDict(extra="forbid")
    version: int = RESULTS_VERSION
    created: str
    seconds: float
    versions: dict[str, str]
    parameters: dict[str, Any]
    server: dict[str, Any] = Field(default_factory=dict, description="what /lenvm/info says")
    natural: NaturalSummary
    control: list[ControlRow]
    side: list[ControlRow] = Field(default_factory=list, description="other controllers, fewer targets")
    median: list[MedianRow] = Field(default_factory=list)
    trade_off: TradeOff | None = None
    prediction: Prediction | None = None
    speed: Speed | None = None
    example: Example | None = None
    criteria: list[Criterion] = Field(default_factory=list)

    def row(self, mode: str, controller: str) -> ControlRow | None:
        """One row of the control table."""
        return next((r for r in self.control if (r.mode, r.controller) == (mode, controller)), None)


def write_results(results: Results, path: Path) -> None:
    """Write results.json; replaced in one step, so that a reader never sees half of it."""
    temporary = path.with_suffix(".json.part")
    temporary.write_text(results.model_dump_json(indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_results(path: Path) -> Results:
    """Read results.json.

    Raises:
        EvaluationError: if it is missing, of another version or not valid.
    """
    if not path.is_file():
        raise EvaluationError(f"there is no {path}; make it with `lenvm eval control`.")
    content = json.loads(path.read_text(encoding="utf-8"))
    version = content.get("version")
    if version != RESULTS_VERSION:
        raise EvaluationError(
            f"{path} has version {version!r}, this program reads {RESULTS_VERSION}; run `lenvm eval control` again."
        )
    try:
        return Results.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise EvaluationError(
            f"{path} is not valid at {'.'.join(map(str, first['loc']))}: {first['msg']}; "
            "run `lenvm eval control` again."
        ) from None
