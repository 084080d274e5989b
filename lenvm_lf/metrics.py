"""Evaluation metrics, streamed batch by batch: token averages over the whole set, never means of batch means."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lenvm.definitions import length_from_logit
from lenvm.format import LenvmConfig
from lenvm.modeling import LengthValueOutput
from lenvm.objective import length_nll_sum, value_loss_sum
from lenvm_lf.collator import IGNORE

POSITIONS = (0, 25, 50, 75)
"""Relative positions t / L in % at which the error of the predicted length is reported (the paper's Figure 6)."""
TOKEN_CHANNELS = ("remaining", "z", "expected")
ROW_CHANNELS = ("censored", "value_loss", "length_nll", "p50", "p90")


@torch.no_grad()
def batch_statistics(
    output: LengthValueOutput, labels: Tensor, censored: Tensor, lenvm: LenvmConfig
) -> tuple[Tensor, Tensor]:
    """What the metrics need of a batch, small enough to gather from all ranks.

    Args:
        output: z [B, T], length_logits [B, T, bins] or None.
        labels: [B, T] int64 remaining length, -100 where there is no target.
        censored: [B, T] bool.

    Returns:
        tokens [B, T, 3] float32, channels TOKEN_CHANNELS (remaining is -100 off target, expected NaN without a length
        head); rows [B, 5] float32, channels ROW_CHANNELS (sums over the row's targets; quantiles at t = 0).
    """
    assert output.z is not None
    mask = labels != IGNORE
    first = mask.int().argmax(-1)
    expected = torch.full_like(output.z, float("nan"))
    quantiles = torch.full((len(labels), 2), float("nan"), device=labels.device)
    if output.length_logits is not None:
        log_q = torch.log_softmax(output.length_logits.float(), -1)
        expected = lenvm.length_bins.expected(log_q)
        start = log_q[torch.arange(len(labels), device=labels.device), first]
        quantiles = torch.stack([lenvm.length_bins.quantile(start, p) for p in (0.5, 0.9)], -1).float()
    value = torch.zeros(len(labels), device=labels.device)
    nll = torch.zeros_like(value)
    for i in range(len(labels)):
        m = mask[i]
        value[i] = value_loss_sum(output.z[i][m], labels[i][m], censored[i][m], lenvm.gamma)
        if output.length_logits is not None:
            nll[i] = length_nll_sum(output.length_logits[i][m], labels[i][m], censored[i][m], lenvm.length_bins)
    tokens = torch.stack([labels.float(), output.z.float(), expected], -1)
    cut = (censored & mask).any(-1).float()
    rows = torch.cat([torch.stack([cut, value, nll], -1), quantiles], -1)
    return tokens, rows


class LengthMetrics:
    """Accumulates `batch_statistics`; errors of lengths are over finished completions, whose length is known.

    Args:
        lenvm: the model's block.
        length_weight: weight of the length loss in `loss`.
    """

    def __init__(self, lenvm: LenvmConfig, length_weight: float) -> None:
        self.lenvm = lenvm
        self.length_weight = length_weight
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self._sums: dict[str, float] = {}
        self.predicted: list[np.ndarray[Any, Any]] = []
        self.true: list[np.ndarray[Any, Any]] = []
        self.first_states: list[dict[str, Any]] = []

    def _add(self, name: str, value: Any) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def update(self, tokens: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> None:
        """Add a batch: tokens [B, T, 3], rows [B, 5] as `batch_statistics` makes them."""
        z = torch.from_numpy(tokens[..., 1]).double()
        n_hat = length_from_logit(z, self.lenvm.gamma).numpy()
        short = torch.sigmoid(-z).numpy()  # 1 + V
        decay = -math.log(self.lenvm.gamma)
        has_length = self.lenvm.has_length_head
        for i in range(len(tokens)):
            n = tokens[i, :, 0].astype(np.float64)
            mask = n >= 1
            n = n[mask]
            if not len(n):
                continue
            predicted, expected = n_hat[i][mask], tokens[i, :, 2].astype(np.float64)[mask]
            row = dict(zip(ROW_CHANNELS, rows[i].tolist(), strict=True))
            total = n[0]
            self._add("targets", len(n))
            self._add("value_loss", row["value_loss"])
            self._add("length_nll", row["length_nll"])
            self._add("rows", 1)
            self.first_states.append(
                {
                    "completion_length": int(total),
                    "censored": bool(row["censored"]),
                    "value_length": round(float(predicted[0]), 3),
                }
                | (
                    {"expected_length": round(float(expected[0]), 3), "p50": int(row["p50"]), "p90": int(row["p90"])}
                    if has_length
                    else {}
                )
            )
            if row["censored"]:
                self._add("censored_targets", len(n))
                continue
            error = short[i][mask] - np.exp(-n * decay)  # V - G without cancellation
            self._add("finished_targets", len(n))
            self._add("finished_rows", 1)
            self._add("value_se", np.square(error).sum())
            self._add("value_ae", np.abs(error).sum())
            self._add("length_ae", np.abs(predicted - n).sum())
            self._add("total", total)
            self._add("value_bias", predicted[0] - total)
            for percent in POSITIONS:
                t = int(total) * percent // 100
                if t < len(n):
                    self._add(f"rows_{percent}", 1)
                    self._add(f"length_ae_{percent}", abs(predicted[t] - n[t]))
                    if has_length:
                        self._add(f"expected_ae_{percent}", abs(expected[t] - n[t]))
            if has_length:
                self._add("expected_ae", np.abs(expected - n).sum())
                self._add("expected_bias", expected[0] - total)
                self._add("covered_p50", total <= row["p50"])
                self._add("covered_p90", total <= row["p90"])
            self.predicted.append(predicted.astype(np.float32))
            self.true.append(n.astype(np.float32))

    def result(self) -> dict[str, float]:
        """Metrics over everything seen since `reset`."""
        s = self._sums

        def ratio(part: str, whole: str) -> float:
            return s.get(part, 0.0) / s[whole] if s.get(whole) else float("nan")

        value_loss, length_nll = ratio("value_loss", "targets"), ratio("length_nll", "targets")
        out = {
            "loss": value_loss + (self.length_weight * length_nll if self.lenvm.has_length_head else 0.0),
            "value_loss": value_loss,
            "value_mse": ratio("value_se", "finished_targets"),
            "value_mae": ratio("value_ae", "finished_targets"),
            "length_mae": ratio("length_ae", "finished_targets"),
            "value_length_bias": ratio("value_bias", "total"),
        }
        out |= {f"length_mae_{p}": ratio(f"length_ae_{p}", f"rows_{p}") for p in POSITIONS}
        if self.lenvm.has_length_head:
            out |= {
                "length_nll": length_nll,
                "expected_length_mae": ratio("expected_ae", "finished_targets"),
                "expected_length_bias": ratio("expected_bias", "total"),
                "coverage_p50": ratio("covered_p50", "finished_rows"),
                "coverage_p90": ratio("covered_p90", "finished_rows"),
            }
            out |= {f"expected_length_mae_{p}": ratio(f"expected_ae_{p}", f"rows_{p}") for p in POSITIONS}
        out = {name: value for name, value in out.items() if not math.isnan(value)}  # nothing finished: nothing to say
        return out | {"targets": int(s.get("targets", 0)), "censored_targets": int(s.get("censored_targets", 0))}
