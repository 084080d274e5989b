"""What guidance gains comes from what the value model knows: all of it with an oracle, nothing with noise.

A world where the first token decides how long the answer will be, and nothing can be chosen afterwards: so a rule
cannot profit from the stop token, whose length is known without any model.
"""

from __future__ import annotations

import pytest
import torch

from lenvm.bins import LengthBins
from lenvm.candidates import Candidates
from lenvm.definitions import logit_from_length
from lenvm.evaluation.metrics import length_score
from lenvm.format import LenvmConfig
from lenvm.guidance import Control, GuidanceRows, Mode, Scores, guide
from lenvm.sampler import draw

ROWS = 4000
BINS = LengthBins.for_max_length(80)
REMAINING = torch.tensor([n for n in BINS.centres if 3 <= n <= 40])
"""Of the state after each first token, in tokens."""
LENVM = LenvmConfig(gamma=0.97, bins=BINS.centres)
CONTROLS = (Control.POSTERIOR, Control.HARD, Control.SOFT)


def mean_score(control: Control, scores: Scores, targets: torch.Tensor) -> tuple[float, float]:
    """Mean Length Score of `ROWS` answers, and its standard error."""
    tokens = torch.arange(len(REMAINING)).expand(ROWS, -1)
    candidates = Candidates(tokens, torch.zeros(tokens.shape).log_softmax(-1), torch.zeros_like(tokens).bool())
    number = torch.zeros(ROWS, dtype=torch.int64)
    rows = GuidanceRows(
        mode=number + int(Mode.EQUAL_TO), control=number + int(control), target=targets, emitted=number,
        sharpness=torch.full((ROWS,), 4.0), tolerance=torch.zeros(ROWS), strict=torch.zeros(ROWS, dtype=torch.bool),
        bias=torch.zeros(ROWS),
    )  # fmt: skip
    log_p = guide(candidates, scores, rows, LENVM)
    slot = draw(log_p, tokens, torch.arange(ROWS), number, torch.zeros(ROWS, dtype=torch.bool))
    found = torch.from_numpy(length_score((REMAINING[slot] + 1).numpy(), targets.numpy(), "equal_to"))
    return float(found.mean()), float(found.std()) / ROWS**0.5


@pytest.fixture(scope="module")
def targets() -> torch.Tensor:
    return REMAINING[torch.randint(len(REMAINING), (ROWS,), generator=torch.Generator().manual_seed(0))] + 1


def oracle() -> Scores:
    """Certain of the length after every token."""
    exact = torch.full((len(REMAINING), len(BINS.centres)), -torch.inf)
    exact[torch.arange(len(REMAINING)), [BINS.centres.index(int(n)) for n in REMAINING]] = 0.0
    z = logit_from_length(REMAINING.float(), LENVM.gamma)
    return Scores(z.expand(ROWS, -1), exact.expand(ROWS, -1, -1))


def noise() -> Scores:
    """As sure of itself as a trained model, of lengths that have nothing to do with the tokens."""
    g = torch.Generator().manual_seed(1)
    z = logit_from_length(REMAINING[torch.randint(len(REMAINING), (ROWS, len(REMAINING)), generator=g)].float(), 0.97)
    return Scores(z, (torch.randn(ROWS, len(REMAINING), len(BINS.centres), generator=g) * 3).log_softmax(-1))


@pytest.mark.parametrize("control", CONTROLS[:2])
def test_an_oracle_scores_100(control: Control, targets: torch.Tensor) -> None:
    assert mean_score(control, oracle(), targets)[0] == 100.0


@pytest.mark.parametrize("control", CONTROLS)
def test_a_random_value_model_scores_like_the_base(control: Control, targets: torch.Tensor) -> None:
    base, error = mean_score(Control.NONE, noise(), targets)
    guided, guided_error = mean_score(control, noise(), targets)
    assert base + 5 < mean_score(control, oracle(), targets)[0]
    assert abs(guided - base) < 4 * (error**2 + guided_error**2) ** 0.5
