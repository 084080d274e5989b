"""What a file of completions looks like: lengths, how many were cut, and the settings they suggest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTILES = (5, 50, 95, 99)


@dataclass(frozen=True)
class SampleStatistics:
    """Lengths in tokens, stop token included.

    Attributes:
        completions, prompts: how many.
        tokens: completion tokens together.
        percentiles: 5th, 50th, 95th and 99th percentile of L (of the tokens seen, where a completion was cut).
        cut: share that max_tokens cut.
        spread: mean over prompts of standard deviation / mean of L within the prompt; 0 with one sample a prompt.
        gamma: what `lenvm_gamma: auto` would take.
        cutoff: smallest multiple of 8 that every prompt with its completion fits into (`cutoff_len`).
        miscounted: retokenised completions whose length is not what the server counted.
    """

    completions: int
    prompts: int
    tokens: int
    percentiles: dict[int, int]
    cut: float
    spread: float
    gamma: float
    cutoff: int
    miscounted: int

    def __str__(self) -> str:
        lengths = "/".join(str(self.percentiles[p]) for p in PERCENTILES)
        text = (
            f"{self.completions} completions of {self.prompts} prompts, {self.tokens} tokens; "
            f"length p{'/'.join(map(str, PERCENTILES))} {lengths}, within a prompt std/mean {self.spread:.2f}; "
            f"{self.cut:.1%} cut; suggested gamma {self.gamma:.4f}, cutoff_len {self.cutoff}"
        )
        return f"{text}; {self.miscounted} of another length than the server counted" if self.miscounted else text


def summarise(rows: Iterable[dict[str, Any]]) -> SampleStatistics:
    """Statistics of the rows of a completion file, of which there must be at least one."""
    from lenvm.definitions import gamma_from_lengths  # torch, only now: the command line should start quickly

    lengths: dict[str, list[int]] = {}
    cut = longest = miscounted = 0
    for row in rows:
        length = len(row["completion_token_ids"])
        lengths.setdefault(row["prompt_id"], []).append(length)
        longest = max(longest, len(row["prompt_token_ids"]) + length)
        cut += row["finish_reason"] == "length"
        miscounted += row.get("counted_tokens", length) != length
    flat = np.array([n for one in lengths.values() for n in one])
    spreads = [float(np.std(one) / np.mean(one)) for one in lengths.values() if len(one) > 1]
    return SampleStatistics(
        completions=len(flat),
        prompts=len(lengths),
        tokens=int(flat.sum()),
        percentiles={p: int(np.percentile(flat, p, method="inverted_cdf")) for p in PERCENTILES},
        cut=cut / len(flat),
        spread=float(np.mean(spreads)) if spreads else 0.0,
        gamma=gamma_from_lengths(flat.tolist()),
        cutoff=-(-longest // 8) * 8,
        miscounted=miscounted,
    )
