"""Made-up results of a plausible shape, for the page's tests. No figure here was measured."""

from __future__ import annotations

import numpy as np
import pytest

from lenvm.evaluation.metrics import kept, length_deviation, length_score
from lenvm.evaluation.schema import (
    ControlRow,
    Criterion,
    CurvePoint,
    Estimate,
    Example,
    HardCutCurve,
    MedianRow,
    NaturalSummary,
    Prediction,
    Predictor,
    PromptPoint,
    Results,
    Speed,
    TradeOff,
)


def about(value: float, half: float = 1.5, top: float = 1e9) -> Estimate:
    return Estimate(value=value, low=value - half, high=min(value + half, top), n=312, prompts=104)


def control_row(mode: str, key: str, label: str, rng: np.random.Generator, log_prob: float) -> ControlRow:
    targets = np.exp(rng.normal(3.6, 0.8, 312)).astype(int).clip(4, 300)
    natural = np.exp(rng.normal(3.6, 0.8, 312)).astype(int).clip(3, 384)
    if key == "base":
        lengths = natural
    elif mode == "equal_to":
        spread = 0.12 if key == "hard" else 0.03
        off = rng.random(312) < (0.7 if key == "hard" else 0.25)
        lengths = np.where(off, targets * np.exp(rng.normal(0, spread, 312)), targets).round().astype(int)
    elif key == "hard":
        lengths = np.full(312, 4) if mode == "at_most" else targets + 90
    else:
        lengths = np.minimum(natural, targets) if mode == "at_most" else np.maximum(natural, targets)
    return ControlRow(
        mode=mode, controller=key, label=label,
        length_score=about(float(length_score(lengths, targets, mode).mean()), 2.2, 100),
        deviation=about(100 * float(np.abs(length_deviation(lengths, targets)).mean())),
        kept=about(100 * float(kept(lengths, targets, mode).mean()), 3, 100),
        natural_stops=about(99.4, 0.5, 100), base_log_prob=about(log_prob, 0.03),
        log_prob_difference=None if key == "base" else about(log_prob + 0.96, 0.02),
        repetition=about(4.2), accuracy=about(3 if key == "hard" else 82, 4), mean_length=about(lengths.mean()),
        points=[(int(t), int(n)) for t, n in zip(targets, lengths, strict=True)],
    )  # fmt: skip


def curve_point(setting: float, label: str, length: float, accuracy: float) -> CurvePoint:
    return CurvePoint(
        setting=setting, label=label, mean_length=about(length), accuracy=about(accuracy, 4, 100),
        share_of_base=about(100 * accuracy / 82, 4), overruns=about(2.0), hard_cut_accuracy=max(0, accuracy - 30),
    )  # fmt: skip


@pytest.fixture(scope="session")
def results() -> Results:
    rng = np.random.default_rng(3)
    names = {"base": ("base model", -0.96), "hard": ("paper's hard rule", -3.61),
             "posterior": ("posterior", -0.99), "posterior_strict": ("posterior, strict", -1.02)}  # fmt: skip
    rows = [control_row(m, k, *v[:1], rng, v[1]) for m in ("equal_to", "at_most", "at_least") for k, v in names.items()]
    budgets = np.arange(5, 260, 5.0)
    mean = rng.gamma(4, 14, 60)
    tokens = ["Start", " 12", ",", " first", " buys", " 3", ":", " 12", " +", " 3", " =", " 15", ".", "\n", "Wait", ",",
              " check", " that", ":", " 15", " -", " 3", " =", " 12", ".", "\n", "Therefore", " 15", ".", " Answer",
              ":", " 15", "<|im_end|>"]  # fmt: skip
    left = np.arange(len(tokens) - 1, -1, -1) + np.where(np.arange(len(tokens)) < 14, -8, 1.5)
    return Results(
        created="2026-11-21T10:00:00+00:00", seconds=288.0,
        versions={"python": "3.11.7", "lenvm": "0.1.0", "torch": "2.13.0"},
        parameters={"model": "test data", "sizes": {"seed": 0}}, server={"gamma": 0.981},
        natural=NaturalSummary(
            prompts=104, problems=70, samples=6656, censored=0.1, mean_length=54.6,
            percentiles={"p5": 6, "p25": 20, "p50": 43, "p75": 77, "p95": 164, "p99": 250}, accuracy=about(82, 3),
        ),
        control=rows, side=rows[:3],
        median=[
            MedianRow(controller="base", label="base model", accuracy=about(82, 2), difference=None, kept=None),
            MedianRow(controller="posterior", label="posterior", accuracy=about(84), difference=about(2), kept=None),
        ],
        trade_off=TradeOff(
            base_accuracy=about(82, 3), base_mean_length=about(59.9),
            budgets=[curve_point(t, f"at_most {t}", *p) for t, p in
                     {21: (15.0, 48), 27: (20.1, 71), 36: (27.7, 80), 48: (34.9, 83), 66: (41.0, 82)}.items()],
            biases=[curve_point(b, f"length_bias {b}", *p) for b, p in
                    {-20: (5.2, 5), -10: (12, 22), -5: (24, 55), -2: (43, 75), 3: (92, 76), 8: (150, 48)}.items()],
            hard_cuts=[curve_point(t, f"cut at {t}", t * 0.8, t * 0.8) for t in (21, 27, 36, 48, 66)],
            curve=HardCutCurve(
                budgets=budgets.tolist(), mean_lengths=(60 * (1 - np.exp(-budgets / 55))).tolist(),
                accuracies=(82 * (1 - np.exp(-((budgets / 70) ** 2)))).tolist(),
            ),
        ),
        prediction=Prediction(
            samples_per_prompt=64, gamma=0.981,
            predictors=[Predictor(key="value", label="LenVM, value z (Eq. 5)", error_return=about(16.0),
                                  error_mean=about(31.0), bias_mean=about(-30)),
                        Predictor(key="mean", label="mean of the other prompts", error_return=about(73.0)),
                        Predictor(key="floor", label="noise floor of the truth", error_return=about(6.3))],
            coverage_p50=about(48), coverage_p90=about(87), total_bias=-6.0,
            points=[PromptPoint(prompt_id=str(i), kind="problem", true_return=0.81 * m, true_mean=m,
                                from_value=0.81 * m * float(rng.lognormal(0, 0.2)),
                                expected=m * float(rng.lognormal(-0.05, 0.2)), p50=m * 0.8, p90=m * 2)
                    for i, m in enumerate(map(float, mean))],
        ),
        speed=Speed(concurrency=16, unguided=2480, guided=810, ratio=810 / 2480, blocks=[]),
        example=Example(prompt="Tom has 12 eggs. First he buys 3. How many eggs has he now? <b>",
                        text="".join(tokens[:-1]), length=len(tokens), finish_reason="stop", at_prompt=24.0,
                        tokens=tokens, remaining=[max(0.0, float(v)) for v in left]),
        criteria=[Criterion(name="equal_to, Length Score", value=about(95.8), unit="", at_least=90),
                  Criterion(name="equal_to, base log-probability minus the base's own", value=about(-0.03, 0.02),
                            unit="nats", at_least=-0.1, at_most=0.1),
                  Criterion(name="posterior at_most 36: share of the base's accuracy", value=about(97.6), unit="%",
                            at_least=90),
                  Criterion(name="cutting at 36: share of the base's accuracy", value=about(56.1), unit="%",
                            at_most=50)],
    )  # fmt: skip
