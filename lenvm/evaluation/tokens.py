"""Tokens that lengthen and shorten answers (section 3.6): what each token did to the predicted remaining length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lenvm.evaluation.bootstrap import Interval, group_intervals, mean_interval
from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.metrics import Floats
from lenvm.evaluation.outcome import Cell, Outcome, Plot, Series, Sheet, new_outcome
from lenvm.evaluation.schema import Estimate
from lenvm.evaluation.values import StateValues

THRESHOLD = 0.01
"""A TD residual beyond this counts as lengthening or shortening."""
ROUNDING = 1e-9
BEFORE, AFTER = 10, 5
"""Tokens of context on either side."""
DRAWN = 12
"""Tokens of either kind in the figure."""


@dataclass(frozen=True)
class Answered:
    """A completion with its values.

    Attributes:
        prompt_id: the prompt, the unit that is resampled.
        pieces: [L] the text each token adds.
        values: at its L + 1 states.
    """

    prompt_id: str
    pieces: Sequence[str]
    values: StateValues


@dataclass(frozen=True)
class TokenEffect:
    """What one token, over all its occurrences, did.

    Attributes:
        token: its text, without surrounding spaces and in lower case; line breaks and spaces alone are written out.
        effect: mean of -delta (positive: lengthens), with its interval by prompt.
        change: mean change of the expected total length in tokens, with its interval.
        lengthening, shortening: shares of occurrences beyond the threshold.
        contexts: occurrences with the strongest effect, each of another prompt.
    """

    token: str
    effect: Interval
    change: Interval
    lengthening: float
    shortening: float
    contexts: tuple[str, ...]


def token_name(piece: str) -> str:
    """The key under which occurrences are counted together."""
    bare = piece.strip().lower()
    return bare or piece.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "␣") or "(nothing)"


def token_effects(
    answers: Sequence[Answered], gamma: float, min_count: int = 20, min_prompts: int = 5, contexts: int = 3
) -> list[TokenEffect]:
    """Effects of every token that occurs often enough, the most lengthening first.

    Args:
        answers: completions with values.
        gamma: the checkpoint's discount.
        min_count: occurrences a token needs.
        min_prompts: prompts it must occur in: an interval over fewer says little.
        contexts: examples kept of each.
    """
    effects = [-a.values.td_residuals(gamma) for a in answers]
    changes = [a.values.changes() for a in answers]
    names = [[token_name(piece) for piece in a.pieces] for a in answers]
    for a, effect in zip(answers, effects, strict=True):
        if len(a.pieces) != len(effect):
            raise ValueError(f"an answer of {len(a.pieces)} tokens has values for {len(effect)}.")
    flat = [name for row in names for name in row]
    prompts = [a.prompt_id for a in answers for _ in a.pieces]
    joined = np.concatenate(effects) if effects else np.empty(0)
    count = _counts(flat, prompts)
    often = {name for name, (n, p) in count.items() if n >= min_count and p >= min_prompts}
    keep = np.array([name in often for name in flat], dtype=bool)
    if not keep.any():
        return []
    kept_names = [name for name, k in zip(flat, keep, strict=True) if k]
    kept_prompts = [p for p, k in zip(prompts, keep, strict=True) if k]
    mean_effect = group_intervals(joined[keep], kept_prompts, kept_names)
    mean_change = group_intervals(np.concatenate(changes)[keep], kept_prompts, kept_names)
    up = group_intervals(joined[keep] > THRESHOLD, kept_prompts, kept_names)
    down = group_intervals(joined[keep] < -THRESHOLD, kept_prompts, kept_names)
    shown = _contexts(answers, names, effects, often, contexts, {k: v.value for k, v in mean_effect.items()})
    found = [
        TokenEffect(name, mean_effect[name], mean_change[name], up[name].value, down[name].value, tuple(shown[name]))
        for name in mean_effect
    ]
    return sorted(found, key=lambda t: -t.effect.value)


def _counts(names: Sequence[str], prompts: Sequence[str]) -> dict[str, tuple[int, int]]:
    where: dict[str, list[str]] = {}
    for name, prompt in zip(names, prompts, strict=True):
        where.setdefault(name, []).append(prompt)
    return {name: (len(found), len(set(found))) for name, found in where.items()}


def _contexts(
    answers: Sequence[Answered],
    names: Sequence[Sequence[str]],
    effects: Sequence[Floats],
    often: set[str],
    count: int,
    mean: Mapping[str, float],
) -> dict[str, list[str]]:
    """The occurrences that go furthest in the token's own direction, one a prompt."""
    best: dict[str, dict[str, tuple[float, int, int]]] = {name: {} for name in often}
    for i, (answer, row, effect) in enumerate(zip(answers, names, effects, strict=True)):
        for t, name in enumerate(row):
            if name in often:
                strength = float(effect[t]) if mean[name] >= 0 else -float(effect[t])
                held = best[name].get(answer.prompt_id)
                if held is None or strength > held[0]:
                    best[name][answer.prompt_id] = (strength, i, t)
    return {
        name: [_around(answers[i].pieces, t) for _, i, t in sorted(places.values(), reverse=True)[:count]]
        for name, places in best.items()
    }


def _around(pieces: Sequence[str], t: int) -> str:
    before, after = "".join(pieces[max(0, t - BEFORE) : t]), "".join(pieces[t + 1 : t + 1 + AFTER])
    text = f"{'…' if t > BEFORE else ''}{before}⟦{pieces[t]}⟧{after}{'…' if t + 1 + AFTER < len(pieces) else ''}"
    return text.replace("\n", "⏎")


def tokens_outcome(
    answers: Sequence[Answered], gamma: float, parameters: dict[str, Any], top: int = 30, **limits: int
) -> Outcome:
    """Tables of the tokens that lengthen and shorten, and of all residuals together.

    Raises:
        EvaluationError: if no token occurs often enough.
    """
    effects = token_effects(answers, gamma, **limits)
    if not effects:
        raise EvaluationError(
            f"no token occurs often enough in {len(answers)} answers; give more samples, or lower --min-count."
        )
    longer = [t for t in effects if t.effect.low > ROUNDING][:top]
    shorter = [t for t in reversed(effects) if t.effect.high < -ROUNDING][:top]
    groups = (("lengthen", longer[:DRAWN], "hard"), ("shorten", shorter[:DRAWN][::-1], "posterior"))
    return new_outcome(
        "tokens",
        "Tokens that lengthen and shorten",
        parameters,
        summary=[
            f"{len(answers)} answers to {len({a.prompt_id for a in answers})} prompts, "
            f"{sum(len(a.pieces) for a in answers)} tokens; {len(effects)} different tokens occur often enough.",
            "The effect of a token is minus its TD residual, V(s) - gamma V(s + token) + (1 - gamma): positive where "
            "the answer became longer than the state before it expected. It describes; it does not prove a cause.",
        ],
        sheets=[
            _residuals(answers, gamma),
            _table("Tokens that lengthen", longer),
            _table("Tokens that shorten", shorter),
            _context_table(longer, shorter),
        ],
        plots=[
            Plot(
                name="effects",
                title="Effect, and occurrences",
                x_label="",
                y_label="mean change of the expected length, tokens",
                series=[
                    Series(label=label, x=[0.0] * len(found), y=[t.change.value for t in found],
                           y_low=[t.change.low for t in found], y_high=[t.change.high for t in found],
                           names=[f"{t.token}  {t.effect.n:,}×" for t in found], style="rows", colour=colour)
                    for label, found, colour in groups
                    if found
                ],
            ),
            *_clouds(longer, shorter),
        ],
    )  # fmt: skip


def _clouds(longer: Sequence[TokenEffect], shorter: Sequence[TokenEffect]) -> list[Plot]:
    """Figure 4: words as large as their occurrences beyond the threshold are many."""
    plots = []
    for name, found, colour in (("lengthen", longer, "hard"), ("shorten", shorter, "posterior")):
        shares = [t.lengthening if name == "lengthen" else t.shortening for t in found]
        counts = [(t.token, share * t.effect.n) for t, share in zip(found, shares, strict=True) if share > 0.0]
        if counts:
            words = Series(label=name, x=[0.0] * len(counts), y=[n for _, n in counts], names=[w for w, _ in counts],
                           style="words", colour=colour)  # fmt: skip
            title = f"Tokens that {name}, by occurrences beyond {THRESHOLD}"
            plots.append(Plot(name=f"cloud_{name}", title=title, x_label="", y_label="", series=[words]))
    return plots


def _table(title: str, found: Sequence[TokenEffect]) -> Sheet:
    rows: list[list[Cell]] = [
        [t.token, Estimate.of(t.effect), Estimate.of(t.change), 100.0 * t.lengthening, 100.0 * t.shortening, t.effect.n,
         t.effect.prompts]
        for t in found
    ]  # fmt: skip
    return Sheet(
        title=title,
        head=["token", "effect", "change, tokens", f"> {THRESHOLD} %", f"< -{THRESHOLD} %", "occurrences", "prompts"],
        rows=rows,
        digits=[1, 4, 2],
        note="Tokens whose 95 % interval (by prompt) leaves zero out; of many tokens without any effect one in twenty "
        "would be here.",
    )


def _context_table(longer: Sequence[TokenEffect], shorter: Sequence[TokenEffect]) -> Sheet:
    rows: list[list[Cell]] = [[t.token, text] for t in [*longer[:10], *shorter[:10]] for text in t.contexts]
    return Sheet(title="In context", head=["token", "strongest occurrences, one a prompt"], rows=rows)


def _residuals(answers: Sequence[Answered], gamma: float) -> Sheet:
    """Mean residual along the answer: of a perfect value model it is zero everywhere."""
    parts = (("first quarter", 0.0, 0.25), ("second", 0.25, 0.5), ("third", 0.5, 0.75), ("last", 0.75, 1.0))
    residuals = [a.values.td_residuals(gamma) for a in answers]
    prompts = [a.prompt_id for a, row in zip(answers, residuals, strict=True) for _ in row]
    flat = np.concatenate(residuals)
    at = np.concatenate([np.arange(len(row)) / len(row) for row in residuals])
    rows: list[list[Cell]] = []
    for name, low, high in (("whole answer", 0.0, 1.0), *parts):
        here = (at >= low) & (at < high)
        if not here.any():
            continue
        chosen = [p for p, k in zip(prompts, here, strict=True) if k]
        rows.append(
            [name, Estimate.of(mean_interval(flat[here], chosen)), float(flat[here].std()),
             100.0 * float(np.mean(flat[here] < -THRESHOLD)), 100.0 * float(np.mean(flat[here] > THRESHOLD)),
             int(here.sum())]
        )  # fmt: skip
    return Sheet(
        title="TD residuals",
        head=["", "mean", "std", "lengthening %", "shortening %", "tokens"],
        rows=rows,
        digits=[1, 5, 4],
        note="A calibrated value model has a mean residual of zero in every part of the answer.",
    )


def read_answered(
    samples: Path, lenvm: Path | None, server: str | None, tokenizer: Path, per_prompt: int, progress: Any
) -> tuple[list[Answered], float, dict[str, Any]]:
    """Samples with their values.

    Args:
        samples: JSONL as `lenvm sample` writes it.
        lenvm: directory of the LenVM, or None with a server.
        server: address of a server with a LenVM, or None.
        tokenizer: directory of the tokenizer that the samples were drawn with.
        per_prompt: answers of a prompt that are read.
        progress: called with answers done and their total.

    Returns:
        the answers, gamma, and what should be recorded about them.

    Raises:
        EvaluationError: as `values_of` and `read_samples`.
    """
    from lenvm.evaluation.pieces import token_pieces
    from lenvm.evaluation.samples import read_samples
    from lenvm.evaluation.values import Text, values_of

    rows = read_samples(samples, per_prompt)
    texts = [Text(r.prompt_token_ids, r.token_ids, r.finish_reason == "stop", r.images) for r in rows]
    values, gamma = values_of(texts, lenvm, server, progress)
    pieces = token_pieces(tokenizer, [r.token_ids for r in rows])
    found = [Answered(r.prompt_id, p, v) for r, p, v in zip(rows, pieces, values, strict=True)]
    parameters = {"samples": samples.name, "per_prompt": per_prompt, "gamma": gamma, "model": rows[0].model}
    return found, gamma, parameters
