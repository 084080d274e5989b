"""The prediction table: errors of the LenVM's predictions at the prompt, with baselines and the noise floor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lenvm.evaluation.bootstrap import mean_interval
from lenvm.evaluation.data import NaturalPrompt
from lenvm.evaluation.metrics import Floats
from lenvm.evaluation.prediction import (
    best_constant,
    coverage,
    leave_one_out_domain_mean,
    leave_one_out_mean,
    leave_one_out_regression,
    relative_error,
    return_consistent_length,
    sampling_noise,
)
from lenvm.evaluation.schema import Estimate, Prediction, Predictor, PromptPoint
from lenvm.evaluation.scoring import PromptPrediction


class Guess(NamedTuple):
    """One way to predict: [P] lengths against L_GT, and [P] against the mean length where it says that too."""

    key: str
    label: str
    of_return: Floats
    of_mean: Floats | None


def truth_of(prompts: Sequence[NaturalPrompt], gamma: float) -> tuple[Floats, Floats]:
    """L_GT (Eq. 14) and mean length of each prompt's completions, [P] each."""
    truth = np.array([float(return_consistent_length(p.lengths, gamma)) for p in prompts])
    return truth, np.array([float(p.lengths.mean()) for p in prompts])


def guesses(prompts: Sequence[NaturalPrompt], predicted: PromptPrediction) -> list[Guess]:
    """The LenVM's predictions at s_0 and what they must beat.

    The regression needs four prompts, the means of domains at least two domains of two prompts each; they are left out
    where there are fewer.

    Raises:
        ValueError: for fewer than two prompts.
    """
    truth, mean = truth_of(prompts, predicted.gamma)
    rows = [Guess("value", "LenVM, value z (Eq. 5)", predicted.from_value, predicted.from_value)]
    if predicted.expected is not None and predicted.from_distribution is not None:
        rows.append(
            Guess("distribution", "LenVM, length distribution", predicted.from_distribution, predicted.expected)
        )
    rows.append(Guess("mean", "mean of the other prompts", leave_one_out_mean(truth), leave_one_out_mean(mean)))
    kinds = [p.kind for p in prompts]
    count = Counter(kinds)
    if len(count) > 1 and min(count.values()) > 1:
        label = "mean of the domain's other prompts"
        rows.append(
            Guess("domain", label, leave_one_out_domain_mean(truth, kinds), leave_one_out_domain_mean(mean, kinds))
        )
    if len(prompts) >= 4:
        tokens = [len(p.token_ids) for p in prompts]
        label = "regression on the prompt's length"
        rows.append(
            Guess("regression", label, leave_one_out_regression(truth, tokens), leave_one_out_regression(mean, tokens))
        )
    size = len(prompts)
    constant = np.full(size, best_constant(truth)), np.full(size, best_constant(mean))
    rows.append(Guess("constant", "best constant in hindsight", *constant))
    return rows


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
    truth, mean = truth_of(prompts, gamma)

    def estimate(values: ArrayLike) -> Estimate | None:
        return Estimate.of(mean_interval(values, ids), 100.0)

    def predictor(guess: Guess) -> Predictor:
        against_mean = None if guess.of_mean is None else relative_error(guess.of_mean, mean)
        return Predictor(
            key=guess.key,
            label=guess.label,
            error_return=estimate(np.abs(relative_error(guess.of_return, truth))),
            error_mean=None if against_mean is None else estimate(np.abs(against_mean)),
            bias_mean=None if against_mean is None else estimate(against_mean),
        )

    rows = [predictor(guess) for guess in guesses(prompts, predicted)]
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
