"""The prediction table: errors of the LenVM's predictions at the prompt, with baselines and the noise floor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lenvm.evaluation.bootstrap import mean_interval
from lenvm.evaluation.data import NaturalPrompt
from lenvm.evaluation.metrics import Floats
from lenvm.evaluation.prediction import (
    best_constant,
    coverage,
    leave_one_out_mean,
    relative_error,
    return_consistent_length,
    sampling_noise,
)
from lenvm.evaluation.schema import Estimate, Prediction, Predictor, PromptPoint
from lenvm.evaluation.scoring import PromptPrediction


def prediction_table(prompts: Sequence[NaturalPrompt], predicted: PromptPrediction) -> Prediction:
    """Compare predictions at s_0 with the lengths of the base's own completions.

    Args:
        prompts: [P], each with its N samples.
        predicted: [P] predictions in the same order.

    Raises:
        ValueError: for fewer than two prompts.
    """
    ids = [p.id for p in prompts]
    lengths = [p.lengths for p in prompts]
    gamma = predicted.gamma
    truth = np.array([float(return_consistent_length(row, gamma)) for row in lengths])
    mean = np.array([float(row.mean()) for row in lengths])

    def estimate(values: ArrayLike) -> Estimate | None:
        return Estimate.of(mean_interval(values, ids), 100.0)

    def predictor(key: str, label: str, guess: ArrayLike, of_mean: ArrayLike | None) -> Predictor:
        against_mean: Floats | None = None if of_mean is None else relative_error(of_mean, mean)
        return Predictor(
            key=key,
            label=label,
            error_return=estimate(np.abs(relative_error(guess, truth))),
            error_mean=None if against_mean is None else estimate(np.abs(against_mean)),
            bias_mean=None if against_mean is None else estimate(against_mean),
        )

    rows = [predictor("value", "LenVM, value z (Eq. 5)", predicted.from_value, predicted.from_value)]
    if predicted.expected is not None and predicted.from_distribution is not None:
        rows.append(
            predictor("distribution", "LenVM, length distribution", predicted.from_distribution, predicted.expected)
        )
    rows.append(predictor("mean", "mean of the other prompts", leave_one_out_mean(truth), leave_one_out_mean(mean)))
    rows.append(
        predictor(
            "constant",
            "best constant in hindsight",
            np.full(len(truth), best_constant(truth)),
            np.full(len(mean), best_constant(mean)),
        )
    )
    rows.append(
        Predictor(
            key="floor",
            label="noise floor of the truth",
            error_return=estimate(sampling_noise(lengths, gamma)),
            error_mean=estimate(sampling_noise(lengths, None)),
        )
    )
    has = predicted.expected is not None
    return Prediction(
        samples_per_prompt=float(np.mean([len(row) for row in lengths])),
        gamma=gamma,
        predictors=rows,
        coverage_p50=estimate(coverage(lengths, predicted.p50)) if predicted.p50 is not None else None,
        coverage_p90=estimate(coverage(lengths, predicted.p90)) if predicted.p90 is not None else None,
        total_bias=100.0 * (float(predicted.expected.sum() / mean.sum()) - 1.0)
        if predicted.expected is not None
        else None,
        points=[
            PromptPoint(
                prompt_id=p.id,
                kind=p.kind,
                true_return=truth[i],
                true_mean=mean[i],
                from_value=float(predicted.from_value[i]),
                expected=float(predicted.expected[i]) if has and predicted.expected is not None else None,
                p50=float(predicted.p50[i]) if predicted.p50 is not None else None,
                p90=float(predicted.p90[i]) if predicted.p90 is not None else None,
            )
            for i, p in enumerate(prompts)
        ],
    )
