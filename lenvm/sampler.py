"""Drawing from p': Gumbel noise keyed by (seed, position, token id).

The noise of a candidate depends on nothing else, so a row's draw does not depend on where it stands in the batch, on
who stands beside it, or on how many candidates it has; a seed gives the same answer again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

# SplitMix64's constants as signed 64-bit integers; int64 arithmetic wraps, which is what the hash wants
_INCREMENT = -7046029254386353131  # 0x9E3779B97F4A7C15
_MIX_A = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_B = -7723592293110705685  # 0x94D049BB133111EB


def _shift_right(x: Any, bits: int) -> Any:
    """Logical shift of int64 (torch's and numpy's are arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Any) -> Any:
    """SplitMix64's finaliser: one 64-bit integer to another, every bit depending on every bit."""
    x = x + _INCREMENT
    x = (x ^ _shift_right(x, 30)) * _MIX_A
    x = (x ^ _shift_right(x, 27)) * _MIX_B
    return x ^ _shift_right(x, 31)


def _key(seed: Any, position: Any, token_id: Any) -> Any:
    """The hash of three int64 tensors or numpy arrays."""
    return _mix(_mix(_mix(seed) ^ position) ^ token_id)


def keyed_uniform(seed: Tensor, position: Tensor, token_id: Tensor) -> Tensor:
    """Uniform in (0, 1), float64, of the broadcast shape of three int64 tensors."""
    if token_id.device.type == "cpu":
        return torch.as_tensor(_uniform(seed, position, token_id))
    return (_shift_right(_key(seed, position, token_id), 11).double() + 0.5) * 2.0**-53


def keyed_gumbel(seed: Tensor, position: Tensor, token_id: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, of the broadcast shape of three int64 tensors."""
    if token_id.device.type == "cpu":
        return torch.as_tensor(-np.log(-np.log(_uniform(seed, position, token_id))))
    return -torch.log(-torch.log(keyed_uniform(seed, position, token_id)))


def _uniform(seed: Tensor, position: Tensor, token_id: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """`keyed_uniform` of tensors on the CPU: forty operators on few numbers, and numpy starts one sooner than torch."""
    with np.errstate(over="ignore"):  # of 0-dimensional ones, which do not wrap silently
        key = _key(seed.numpy(), position.numpy(), token_id.numpy())
    uniform: np.ndarray[Any, np.dtype[np.float64]] = (_shift_right(key, 11).astype(np.float64) + 0.5) * 2.0**-53
    return uniform


def draw(log_p: Tensor, token_ids: Tensor, seed: Tensor, position: Tensor, greedy: Tensor) -> Tensor:
    """Choose a slot of each row: a sample of exp(log_p), or its arg max where greedy. No host synchronisation.

    Args:
        log_p: [R, K] float; -inf slots are never chosen.
        token_ids: [R, K] int64.
        seed: [R] int64, the request's.
        position: [R] int64, tokens emitted before this one.
        greedy: [R] bool.

    Returns:
        [R] int64 slots. Ties go to the lower token id.
    """
    noise = keyed_gumbel(seed[:, None], position[:, None], token_ids)
    score = noise.masked_fill_(greedy[:, None], 0.0).add_(log_p)
    last = torch.iinfo(torch.int64).max
    return token_ids.masked_fill(score < score.amax(-1, keepdim=True), last).argmin(-1)
