"""Evaluation metrics, streamed batch by batch: token averages over the whole set, never means of batch means."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lenvm.format import LenvmConfig
from lenvm.modeling import LengthValueOutput
from lenvm.objective import length_nlls, value_losses
from lenvm_lf.collator import IGNORE
from lenvm_lf.summary import Array, boundary_errors, calibration, calibration_error

POSITIONS = (0, 25, 50, 75)
"""Relative positions t / L in % at which the error of the predicted length is reported (the paper's Figure 6)."""
TOKEN_CHANNELS = ("remaining", "z", "expected")
QUANTILES = (0.1, 0.5, 0.9)
QUANTILE_NAMES = tuple(f"p{round(100 * p)}" for p in QUANTILES)
ROW_CHANNELS = ("censored", "value_loss", "length_nll", *QUANTILE_NAMES)


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
        head); rows [B, 6] float32, channels ROW_CHANNELS (sums over the row's targets; quantiles at t = 0).
    """
    assert output.z is not None
    mask = labels != IGNORE
    first = mask.int().argmax(-1)
    expected = torch.full_like(output.z, float("nan"))
    quantiles = torch.full((len(labels), len(QUANTILES)), float("nan"), device=labels.device)
    if output.length_logits is not None:
        log_q = torch.log_softmax(output.length_logits.float(), -1)
        expected = lenvm.length_bins.expected(log_q)
        start = log_q[torch.arange(len(labels), device=labels.device), first]
        quantiles = torch.stack([lenvm.length_bins.quantile(start, p) for p in QUANTILES], -1).float()
    value, nll = torch.zeros(2, len(labels), device=labels.device)
    row = mask.nonzero()[:, 0]
    n, cut_states = labels[mask], censored[mask]
    value.index_add_(0, row, value_losses(output.z[mask], n, cut_states, lenvm.value_space))
    if output.length_logits is not None:
        nll.index_add_(0, row, length_nlls(output.length_logits[mask], n, cut_states, lenvm.length_bins))
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
        self.predicted: list[Array] = []
        self.expected: list[Array] = []
        self.true: list[Array] = []
        self.first_states: list[dict[str, Any]] = []

    def _add(self, name: str, value: Any) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def update(self, tokens: Array, rows: Array, prompts: Array) -> None:
        """Add a batch: tokens [B, T, 3], rows [B, 6] as `batch_statistics` makes them; prompts [B] int64 hashes, equal
        for samples of one prompt."""
        z = torch.from_numpy(tokens[..., 1]).double()
        space = self.lenvm.value_space
        n_hat = space.length(z).numpy()
        shortfall = space.shortfall(z, torch.from_numpy(tokens[..., 0]).double().clamp(min=1)).numpy()
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
                    "prompt": f"{int(prompts[i]) & 0xFFFFFFFFFFFFFFFF:016x}",
                    "completion_length": int(total),
                    "censored": bool(row["censored"]),
                    "value_length": round(float(predicted[0]), 3),
                }
                | (
                    {"expected_length": round(float(expected[0]), 3)}
                    | {name: int(row[name]) for name in QUANTILE_NAMES}
                    if has_length
                    else {}
                )
            )
            if row["censored"]:
                self._add("censored_targets", len(n))
                continue
            error = shortfall[i][mask]  # V - G
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
                for name in QUANTILE_NAMES:
                    self._add(f"covered_{name}", total <= row[name])
                self.expected.append(expected.astype(np.float32))
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
            }
            out |= {f"coverage_{name}": ratio(f"covered_{name}", "finished_rows") for name in QUANTILE_NAMES}
            out |= {f"expected_length_mae_{p}": ratio(f"expected_ae_{p}", f"rows_{p}") for p in POSITIONS}
        out |= boundary_errors(self.first_states, self.lenvm.gamma)
        out |= {f"{name}_calibration_error": calibration_error(part) for name, part in self.calibration().items()}
        out = {name: value for name, value in out.items() if not math.isnan(value)}  # nothing finished: nothing to say
        return out | {"targets": int(s.get("targets", 0)), "censored_targets": int(s.get("censored_targets", 0))}

    def calibration(self) -> dict[str, list[dict[str, float]]]:
        """Deciles (`lenvm_lf.summary.calibration`) of n_hat (`value`) and of E[n] (`expected`) over all finished states
        seen; empty without any."""
        if not self.true:
            return {}
        true = np.concatenate(self.true)
        found = {"value": self.predicted, "expected": self.expected}
        return {name: calibration(np.concatenate(parts), true) for name, parts in found.items() if parts}
