"""What the scheduler knows of requests that carry length fields: one object a request, one table row a running one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lenvm.candidates import SamplingRows
from lenvm.guidance import Control, GuidanceRows, Mode
from lenvm.request import LengthRequest
from lenvm_sglang.scope import Scope

_INT_COLUMNS = ("mode", "control", "target", "start", "seed", "top_k", "strict", "greedy", "think_end")
_FLOAT_COLUMNS = ("sharpness", "tolerance", "bias", "temperature", "top_p", "min_p")


@dataclass
class RequestState:
    """A request with length fields. It hangs on the host's request object and lives exactly as long.

    Attributes:
        request: the validated fields.
        prompt_tokens: length of the prompt; tokens emitted so far are derived from it (never counted), so that a
            retraction cannot put them out of step.
        seed: int64 key of the draw's noise.
        stop_token_ids: ids that end the answer; empty under `ignore_eos`.
        temperature, top_k, top_p, min_p: the base model's own sampling settings.
        greedy: the host would take the arg max (temperature 0).
        rotary_shift: what the rotary position of a completion's token is above its place in the sequence: images take
            fewer positions than tokens, so it is at most 0. Known once the prompt is read.
        scope: where it stands between thinking and answer; None if the target counts the whole completion.
        predicted_length: expected completion length at the prompt boundary, in tokens; None until the prompt was read.
        quantiles: of the completion length at the prompt boundary, in tokens.
        values: predicted remaining length after each committed token, in tokens.
        reported: how many of `values` have been sent to the front end.
        sequence_from: position of the last prompt token in a request that only reads a finished conversation
            (`POST /lenvm/values`): every state from there on is scored, none is drawn from. None in all others.
        sequence_stops: of such a request, the positions of stop tokens behind its prompt.
        sequence: of such a request, one row (`lenvm_sglang.outputs.SEQUENCE_COLUMNS`) for each state read so far.
        failed: a forward of the value model raised; the request ends with an error.

    Numbers that the value model gave as NaN or infinity are None.
    """

    request: LengthRequest
    prompt_tokens: int
    seed: int
    stop_token_ids: tuple[int, ...]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    greedy: bool
    rotary_shift: int = 0
    scope: Scope | None = None
    predicted_length: float | None = None
    quantiles: list[float | None] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)
    reported: int = 0
    sequence_from: int | None = None
    sequence_stops: frozenset[int] = frozenset()
    sequence: list[list[float | None]] = field(default_factory=list)
    failed: bool = False

    def __post_init__(self) -> None:
        assert self.prompt_tokens >= 1, f"a prompt has at least one token, got {self.prompt_tokens}"
        assert self.temperature > 0, f"a greedy row gets temperature 1, got {self.temperature}"
        assert -(2**63) <= self.seed < 2**63, f"seeds are int64, got {self.seed}"

    def steers_at(self, position: int) -> bool:
        """Whether the completion token at `position` is guided, rather than only scored."""
        return self.request.steers and (self.scope is None or self.scope.steers(position))

    @property
    def start(self) -> int:
        """Tokens of the sequence before the first that the target counts."""
        return self.prompt_tokens + (0 if self.scope is None else self.scope.offset)

    @property
    def think_end(self) -> int:
        """The end tag, if the target counts the thinking; else -1."""
        return self.scope.tags.end if self.scope is not None and self.scope.counts == "thinking" else -1

    @property
    def thought(self) -> bool:
        """The host knows that the thinking is over."""
        return self.scope is not None and self.scope.thought is not None

    def take_report(self) -> dict[str, object]:
        """What the front end has not heard yet."""
        assert 0 <= self.reported <= len(self.values)
        fresh, self.reported = self.values[self.reported :], len(self.values)
        report: dict[str, object] = {
            "predicted_length": self.predicted_length,
            "quantiles": self.quantiles,
            "values": fresh,
        }
        if self.scope is not None:
            report["thought"] = self.scope.thought
        return {**report, "sequence": self.sequence} if self.sequence_from is not None else report


def draw_seed(request_seed: int | None, sample: int, rid: str) -> int:
    """The key of a request's noise, the same on every rank.

    Args:
        request_seed: the client's `seed`; None makes the draw depend on the request's id, which is random unless the
            client chose it.
        sample: which of the `n` answers this is.
        rid: the host's request id.
    """
    key = rid if request_seed is None else f"{request_seed}/{sample}"
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)


class RowParameters(NamedTuple):
    """Parameters of R rows on the device."""

    guidance: GuidanceRows
    sampling: SamplingRows
    stop_token_ids: Tensor  # [R, S] int64, padded with -1
    seed: Tensor  # [R] int64
    greedy: Tensor  # [R] bool
    start: Tensor  # [R] int64 tokens before the first that the target counts
    think_end: Tensor  # [R] int64, the end tag where the target counts the thinking, -1 elsewhere

    def after(self, emitted: Tensor) -> GuidanceRows:
        """What the rows ask for when their targets have counted `emitted` [R] tokens."""
        return replace(self.guidance, emitted=emitted)


class Rules(NamedTuple):
    """What the rows of a table ask for, [P] each; views of it, so that they say what is written later, too.

    Attributes:
        guidance: `emitted` is not of any row, `strict` int64.
        seed: int64.
        greedy: int64, not 0 where the arg max is taken.
    """

    guidance: GuidanceRows
    seed: Tensor
    greedy: Tensor


class RowTable:
    """Parameters of running requests on the device, one row for each slot of the host's request pool.

    A row is written when its request is prefilled, and read by index when the batch changes: no host work at each step.
    Rows of finished requests are simply overwritten by the slot's next owner.
    """

    def __init__(self, rows: int, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self.ints = torch.zeros(rows, len(_INT_COLUMNS), dtype=torch.int64, device=device)
        self.floats = torch.zeros(rows, len(_FLOAT_COLUMNS), dtype=torch.float32, device=device)
        self.stops = torch.full((rows, 4), -1, dtype=torch.int64, device=device)

    def write(self, slots: Tensor, states: Sequence[RequestState]) -> None:
        """Set the rows of `slots` [R] int64 to the parameters of R requests."""
        width = max(len(s.stop_token_ids) for s in states)
        if width > self.stops.shape[1]:
            self.stops = torch.nn.functional.pad(self.stops, (0, width - self.stops.shape[1]), value=-1)
        ints, floats, stops = [], [], []
        for s in states:
            r = s.request
            ints.append((int(r.mode_code), int(r.control_code), r.target or 0, s.start, s.seed, s.top_k,
                         int(r.strict), int(s.greedy), s.think_end))  # fmt: skip
            floats.append((r.sharpness, r.tolerance, r.bias or 0.0, s.temperature, s.top_p, s.min_p))
            stops.append(s.stop_token_ids + (-1,) * (self.stops.shape[1] - len(s.stop_token_ids)))
        self.ints[slots] = to_device(ints, torch.int64, self.device)
        self.floats[slots] = to_device(floats, torch.float32, self.device)
        self.stops[slots] = to_device(stops, torch.int64, self.device)

    def rules(self) -> Rules:
        """What `tilt_sample` reads of all rows, in memory that stays where it is."""
        i = dict(zip(_INT_COLUMNS, self.ints.unbind(1), strict=True))
        f = dict(zip(_FLOAT_COLUMNS, self.floats.unbind(1), strict=True))
        guidance = GuidanceRows(
            mode=i["mode"],
            control=i["control"],
            target=i["target"],
            emitted=i["start"],
            sharpness=f["sharpness"],
            tolerance=f["tolerance"],
            strict=i["strict"],
            bias=f["bias"],
        )
        return Rules(guidance, i["seed"], i["greedy"])

    @contextmanager
    def made_up(self) -> Iterator[None]:
        """Before anything is served: rows of every control and mode, taken away afterwards."""
        n = torch.arange(len(self.ints), device=self.device)
        ints = {"mode": n % len(Mode), "control": n % len(Control), "target": n % 9 + 2, "seed": n * 977}
        ints["greedy"] = n % 4 // 3
        floats = {"sharpness": 1.0 + n % 3, "tolerance": n % 2 * 0.1 * (ints["mode"] == Mode.EQUAL_TO), "bias": n - 3.0}
        before = self.ints.clone(), self.floats.clone()
        for table, names, columns in ((self.ints, _INT_COLUMNS, ints), (self.floats, _FLOAT_COLUMNS, floats)):
            for name, column in columns.items():
                table[:, names.index(name)] = column.to(table.dtype)
        try:
            yield
        finally:
            self.ints.copy_(before[0])
            self.floats.copy_(before[1])

    def parameters(self, slots: Tensor, stops: int, **known: bool) -> RowParameters:
        """Parameters of the rows `slots` [R]; they do not change while the requests run, except `emitted` (0 here).

        Args:
            slots: [R] int64.
            stops: most stop tokens of one of them: the table is as wide as the most of any request it ever held.
            known: what the host knows of their sampling settings: the last fields of `SamplingRows`.
        """
        i = dict(zip(_INT_COLUMNS, self.ints[slots].T.contiguous().unbind(0), strict=True))
        f = dict(zip(_FLOAT_COLUMNS, self.floats[slots].T.contiguous().unbind(0), strict=True))
        guidance = GuidanceRows(
            mode=i["mode"],
            control=i["control"],
            target=i["target"],
            emitted=torch.zeros_like(i["target"]),
            sharpness=f["sharpness"],
            tolerance=f["tolerance"],
            strict=i["strict"] > 0,
            bias=f["bias"],
        )
        sampling = SamplingRows(f["temperature"], i["top_k"], f["top_p"], f["min_p"], **known)
        return RowParameters(
            guidance,
            sampling,
            self.stops[slots, : max(stops, 1)],
            i["seed"],
            i["greedy"] > 0,
            i["start"],
            i["think_end"],
        )


def to_device(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host numbers to a device tensor without waiting for the device."""
    pin = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pin).to(device, non_blocking=True)
