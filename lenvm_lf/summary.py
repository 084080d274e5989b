"""Metrics that need the whole set: calibration by decile, and the error at a prompt against its samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lenvm.evaluation.prediction import relative_error, return_consistent_length

Array = np.ndarray[Any, Any]
DECILES = 10
MIN_SAMPLES = 2
"""Fewer completions of a prompt say nothing about its length in expectation."""


def calibration(predicted: Array, true: Array) -> list[dict[str, float]]:
    """Mean predicted against mean true remaining length, by decile of the prediction.

    Args:
        predicted: [M] tokens, at states of finished completions.
        true: [M] tokens.

    Returns:
        one entry a decile, shortest predictions first: `states`, `predicted`, `true`; fewer where M < 10.
    """
    order = np.argsort(predicted, kind="stable")
    parts = [part for part in np.array_split(order, DECILES) if len(part)]
    return [
        {
            "states": len(part),
            "predicted": float(predicted[part].mean(dtype=np.float64)),
            "true": float(true[part].mean(dtype=np.float64)),
        }
        for part in parts
    ]


def calibration_error(deciles: Sequence[dict[str, float]]) -> float:
    """Mean over the deciles of |mean predicted - mean true| / mean true, weighted by their states."""
    states = sum(d["states"] for d in deciles)
    return sum(d["states"] * abs(d["predicted"] - d["true"]) / d["true"] for d in deciles) / states


def boundary_errors(states: Sequence[dict[str, Any]], gamma: float) -> dict[str, float]:
    """Mean relative error before the first token, against what the samples of each prompt say (Eq. 13-15).

    The inverted value is compared with L_GT = ln(1 - mean(1 - gamma^L)) / ln gamma, which a perfect value would give;
    the expected length with the mean of L. Prompts count alike. A prompt with a cut sample has no ground truth and is
    left out, and so is one with fewer than MIN_SAMPLES samples.

    Args:
        states: one a completion, as `LengthMetrics.first_states` holds them.
        gamma: the checkpoint's.

    Returns:
        `mre`, `expected_mre` (with a length distribution) and `mre_prompts`; empty without such prompts.
    """
    prompts: dict[str, list[dict[str, Any]]] = {}
    for state in states:
        prompts.setdefault(state["prompt"], []).append(state)
    groups = [g for g in prompts.values() if len(g) >= MIN_SAMPLES and not any(s["censored"] for s in g)]
    if not groups:
        return {}
    lengths = [np.array([s["completion_length"] for s in g], np.float64) for g in groups]
    truth = [float(return_consistent_length(row, gamma)) for row in lengths]
    out = {"mre": _mean_relative_error([g[0]["value_length"] for g in groups], truth)}
    if "expected_length" in groups[0][0]:
        means = [float(row.mean()) for row in lengths]
        out["expected_mre"] = _mean_relative_error([g[0]["expected_length"] for g in groups], means)
    return out | {"mre_prompts": len(groups)}


def _mean_relative_error(predicted: Sequence[float], true: Sequence[float]) -> float:
    return float(np.abs(relative_error(predicted, true)).mean())
