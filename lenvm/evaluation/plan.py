"""Which answers are asked for: targets spread over each prompt's natural range, and the requests of every experiment.

A plan depends on the prompts, the base model's samples, the sizes and one seed, and on nothing else; so an interrupted
run takes up where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from lenvm.evaluation import defaults
from lenvm.evaluation.data import NaturalData, NaturalPrompt
from lenvm.evaluation.metrics import MODES, Mode

NATURAL_RANGE = (0.05, 0.95)
"""Quantiles of a prompt's own lengths between which a target counts as natural."""
BOUND_RANGE = (0.10, 0.90)
"""The same for at_most and at_least: a bound below the 10th percentile asks for what hardly exists."""
SHARE = 0.6
"""Share of the base's mean length at which the trade-off is judged."""


@dataclass(frozen=True)
class Controller:
    """A way to answer: its key in the results, its name for people, and the request fields it adds to a target.

    `cut` needs no LenVM: it sends the target as max_tokens and nothing else.
    """

    key: str
    label: str
    fields: dict[str, Any] | None = field(default_factory=dict)
    cut: bool = False

    def request_fields(self, mode: str, target: int) -> dict[str, Any]:
        """What one request adds; nothing at all for the base model."""
        if self.cut:
            return {"max_tokens": target}
        if self.fields is None:
            return {}
        return {"length_target": target, "length_mode": mode, **self.fields}


BASE = Controller("base", "base model", None)
CUT = Controller("cut", "cut by max_tokens", None, cut=True)
HARD = Controller("hard", "paper's hard rule", {"length_control": "hard"})
SOFT = Controller("soft", "soft", {"length_control": "soft"})
POSTERIOR = Controller("posterior", "posterior")
STRICT = Controller("posterior_strict", "posterior, strict", {"length_strict": True})
LOOSE = Controller("posterior_a1", "posterior, sharpness 1", {"length_sharpness": 1.0})
TIGHT = Controller("posterior_a4", "posterior, sharpness 4", {"length_sharpness": 4.0})
CONTROLLERS = {c.key: c for c in (BASE, HARD, SOFT, LOOSE, POSTERIOR, TIGHT, STRICT)}

IN_MODE: dict[Mode, tuple[Controller, ...]] = {
    "equal_to": (BASE, HARD, POSTERIOR, STRICT),
    "at_most": (BASE, HARD, POSTERIOR, STRICT),
    "at_least": (BASE, HARD, POSTERIOR, STRICT),
}
SIDE: tuple[Controller, ...] = (SOFT, LOOSE, TIGHT)
"""Compared under equal_to on one target a prompt only."""


class Sizes(BaseModel):
    """How much is asked. The defaults keep the whole evaluation within a few minutes on two CPU cores."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    targets: int = Field(default=defaults.TARGETS, ge=1)
    bound_targets: int = Field(default=defaults.BOUND_TARGETS, ge=1)
    median_samples: int = Field(default=defaults.MEDIAN_SAMPLES, ge=1)
    share_samples: int = Field(default=defaults.SHARE_SAMPLES, ge=1)
    curve_samples: int = Field(default=defaults.CURVE_SAMPLES, ge=1)
    biases: tuple[float, ...] = defaults.BIASES
    budgets: tuple[float, ...] = defaults.BUDGETS
    modes: tuple[Mode, ...] = MODES
    controllers: tuple[str, ...] = Field(default=tuple(CONTROLLERS), description="The base model is always asked.")
    seed: int = 0

    @field_validator("controllers")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(value) - set(CONTROLLERS))
        if unknown:
            raise ValueError(f"unknown controller {unknown[0]!r}, allowed are {', '.join(CONTROLLERS)}")
        return value

    def has(self, controller: Controller) -> bool:
        """Whether a controller is asked."""
        return controller is BASE or controller.key in self.controllers


@dataclass(frozen=True)
class Request:
    """One answer to ask for.

    Attributes:
        experiment: a mode, "median" (accuracy at the natural median), "bias" or "budget" (the trade-off).
        controller: key of the controller, or the setting's value in the trade-off.
        prompt_id: which prompt.
        target: length asked for; None without one.
        sample: number among repetitions.
        seed: of the sampling.
        fields: what the request body has beside the sampling: length fields, or max_tokens.
    """

    experiment: str
    controller: str
    prompt_id: str
    target: int | None
    sample: int
    seed: int
    fields: dict[str, Any]

    @property
    def key(self) -> str:
        """Unique in a plan, stable between runs."""
        return f"{self.experiment}/{self.controller}/{self.prompt_id}/{self.target}/{self.sample}"


def stable_seed(*parts: object) -> int:
    """A 31-bit seed from any parts, the same on every machine."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big") >> 1


def natural_targets(
    lengths: NDArray[np.int64], count: int, within: tuple[float, float], rng: np.random.Generator
) -> list[int]:
    """Targets at stratified random quantiles of a prompt's own lengths: one in each of `count` equal slices.

    Args:
        lengths: [N] L of the base's finished completions in tokens.
        count: how many targets.
        within: lowest and highest quantile.
        rng: decides where in its slice each quantile lies.

    Returns:
        lengths that occurred, increasing; equal ones may repeat where the distribution has atoms.
    """
    low, high = within
    levels = low + (high - low) * (np.arange(count) + rng.random(count)) / count
    return [int(q) for q in np.quantile(lengths, levels, method="inverted_cdf")]


def natural_median(prompt: NaturalPrompt) -> int:
    """The median length of the base's own finished completions of a prompt, a length that occurred."""
    return int(np.quantile(prompt.ended_lengths, 0.5, method="inverted_cdf"))


def budget(problems: Sequence[NaturalPrompt], share: float) -> int:
    """`share` of the base's mean length over all problems, in whole tokens, at least 1."""
    return max(1, round(share * float(np.mean([p.lengths.mean() for p in problems]))))


def make_plan(data: NaturalData, sizes: Sizes) -> list[Request]:
    """Every request of the evaluation, in a fixed order."""
    plan = list(_control(data.prompts, sizes))
    if data.problems:
        plan += _median(data.problems, sizes)
        plan += _trade_off(data.problems, sizes)
    return plan


def _control(prompts: Sequence[NaturalPrompt], sizes: Sizes) -> Iterator[Request]:
    for mode in sizes.modes:
        count = sizes.targets if mode == "equal_to" else sizes.bound_targets
        within = NATURAL_RANGE if mode == "equal_to" else BOUND_RANGE
        for prompt in prompts:
            rng = np.random.default_rng(stable_seed(sizes.seed, "targets", mode, prompt.id))
            targets = natural_targets(prompt.ended_lengths, count, within, rng)
            for controller in filter(sizes.has, IN_MODE[mode]):
                for k, target in enumerate(targets):
                    yield _request(mode, controller, prompt, target, k, sizes.seed)
            if mode == "equal_to":
                k = int(rng.integers(count))
                for controller in filter(sizes.has, SIDE):
                    yield _request(mode, controller, prompt, targets[k], k, sizes.seed)


def _median(problems: Sequence[NaturalPrompt], sizes: Sizes) -> Iterator[Request]:
    if "equal_to" not in sizes.modes:
        return
    for prompt in problems:
        for controller in filter(sizes.has, (HARD, POSTERIOR)):
            # the paper's rule takes an arg max: repeating it would repeat one answer
            for k in range(1 if controller is HARD else sizes.median_samples):
                yield _request("median", controller, prompt, natural_median(prompt), k, sizes.seed)


def _trade_off(problems: Sequence[NaturalPrompt], sizes: Sizes) -> Iterator[Request]:
    for share in sorted({*sizes.budgets, SHARE}) if sizes.has(POSTERIOR) and "at_most" in sizes.modes else ():
        target = budget(problems, share)
        fields = {"length_target": target, "length_mode": "at_most"}
        for prompt in problems:
            for k in range(sizes.share_samples if share == SHARE else sizes.curve_samples):
                yield _raw("budget", f"{share:g}", prompt, target, k, sizes.seed, fields)
    for beta in sizes.biases:
        for prompt in problems:
            for k in range(sizes.curve_samples):
                yield _raw("bias", f"{beta:g}", prompt, None, k, sizes.seed, {"length_bias": beta})


def _request(
    experiment: str, controller: Controller, prompt: NaturalPrompt, target: int, sample: int, seed: int
) -> Request:
    mode = experiment if experiment in MODES else "equal_to"
    return _raw(experiment, controller.key, prompt, target, sample, seed, controller.request_fields(mode, target))


def _raw(
    experiment: str,
    controller: str,
    prompt: NaturalPrompt,
    target: int | None,
    sample: int,
    seed: int,
    fields: dict[str, Any],
) -> Request:
    draw = stable_seed(seed, experiment, controller, prompt.id, sample)
    return Request(experiment, controller, prompt.id, target, sample, draw, fields)
