"""Guidance without candidate rows: a lookahead head scores every candidate from one state.

`LookaheadWorker`: the LenVM reads one token a step, and its own state is looked ahead from. `AttachedWorker`: the base
model's hidden state, which the host has anyway, is looked ahead from; no second model, no second KV cache. Both keep
the last state of every running request by its row of the host's request pool, so that a token may be drawn later than
the forward that made its logits.
"""

from __future__ import annotations

import logging
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lenvm.attached import ARCHITECTURE, AttachedHead, read_tensor
from lenvm.candidates import Candidates
from lenvm.format import LenvmConfig, read_lenvm_config
from lenvm.guidance import Scores
from lenvm.heads import LookaheadHead
from lenvm_kernels import DrawBuffers, TiltSample, lookahead_scores
from lenvm_sglang.attention import SharedPrefixBackend
from lenvm_sglang.batches import DecodeBatch
from lenvm_sglang.fused import TokenForward
from lenvm_sglang.graphs import width_buckets
from lenvm_sglang.rows import LengthRows, Place, Places, Read
from lenvm_sglang.settings import Settings, local_directory
from lenvm_sglang.state import RowTable, to_device
from lenvm_sglang.versions import bind_slots
from lenvm_sglang.worker import ValueWorker, describe, runs

logger = logging.getLogger(__name__)


class LastStates:
    """The last state of each running request, and what the head sees from there.

    Args:
        lenvm: gamma and bins.
        head: with token vectors of its own (`LookaheadHead.with_table`), on the states' device.
        rows: of the host's request pool.
        dtype: of the states.
    """

    def __init__(self, lenvm: LenvmConfig, head: LookaheadHead, rows: int, dtype: torch.dtype) -> None:
        self.lenvm, self.head = lenvm, head
        self.states = torch.zeros(rows, head.hidden_size, dtype=dtype, device=head.w1.device)

    def keep(self, slots: Tensor, hidden: Tensor) -> None:
        """Note the states [R, H] of the request rows `slots` [R] int64."""
        self.states[slots] = hidden.to(self.states.dtype)

    @torch.no_grad()
    def scores(self, slots: Tensor, candidates: Candidates, value: bool) -> Scores:
        """Scores [R, K] of the states after each candidate, z only if `value`; no host synchronisation."""
        return lookahead_scores(self.states, slots, candidates.token_ids, self.head, self.lenvm, value)


class LookaheadWorker(ValueWorker):
    """A LenVM with a lookahead head: one value token a step, in the slot that the host gave it."""

    def __init__(self, scheduler: Any, settings: Settings) -> None:
        super().__init__(scheduler, settings)
        self.scratch_width = 0

    def allocate(self) -> None:
        """The value KV pool without scratch, the parameter table, and the states."""
        super().allocate()
        shape = self.lenvm.lookahead
        assert shape is not None
        head = self.runner.model.lookahead_head
        source = None if shape.source is None else read_tensor(self.settings.model, shape.source)
        head = head.with_table(None if source is None else source.to(head.w1.device))
        self.ahead = LastStates(self.lenvm, head, self.request_rows, self.runner.dtype)

    def build_forward(self) -> None:
        """One new token a row is an ordinary decode; in plain torch our backend does all rows in one call, and on a
        GPU our kernel's forward can become a CUDA graph."""
        way, pools = self.attention(), (self.pool, self.base.req_to_token_pool)
        self.tokens: Any = self.sequences
        if way == "gathered":
            self.tokens = SharedPrefixBackend(*pools, self.runner.dtype)
        elif way == "fused":
            self.tokens = TokenForward(self)
        self.batch = DecodeBatch()

    def warm_up(self) -> None:
        """Once the host has made its own CUDA graphs: try our attention on one token, and make those of it."""
        if not runs(self._probe):
            self.tokens = self.sequences
        self.make_graphs(self.tokens)
        if isinstance(self.tokens, TokenForward) and not self.tokens.graphs:
            # one token shares its prefix with nobody: only graphs speak for our kernel
            self.tokens = self.sequences

    def _probe(self) -> None:
        """What the host's attention can do is known; ours reads a token behind a short prefix."""
        if isinstance(self.tokens, TokenForward):
            self.tokens.probe()
        elif isinstance(self.tokens, SharedPrefixBackend):
            # both in the host's dump slot
            zero = torch.zeros(1, dtype=torch.int64, device=self.base.req_to_token_pool.req_to_token.device)
            where = self.tokens.prepare(zero, zero + 1, 1, zero[:, None])
            rotary = where.positions if self.sees_images else None
            self.forward(self.batch.fill(zero, where.positions, where.lengths, zero, rotary), self.tokens)

    def follow(self, batch: Any, rows: LengthRows, output: Any) -> Read | None:
        """Read what the base model read, and keep each row's last state."""
        assert self.ahead is not None
        if batch.forward_mode.is_decode():
            place = self.places.step(batch, rows)
            self.ahead.keep(place.slots, self._read_token(batch, rows, place))
            return None
        read = super().follow(batch, rows, output)
        assert read is not None
        slots = batch.req_pool_indices[to_device(rows.index, torch.int64, batch.seq_lens.device)].long()
        ends = to_device([end - 1 for end in accumulate(read.lengths)], torch.int64, read.hidden.device)
        self.ahead.keep(slots, read.hidden[ends])
        return read

    def _read_token(self, batch: Any, rows: LengthRows, place: Place) -> Tensor:
        """The value model's states [R, H] after the token that each row was just fed."""
        if isinstance(self.tokens, TokenForward):
            return self.tokens.read(batch, place)
        slots, lengths = place.slots, place.take(batch.seq_lens).long()
        new, before = place.take(batch.out_cache_loc).long(), lengths - 1
        rotary = self.rotary(place, before, 1)
        token = self.batch.fill(place.take(batch.input_ids), before, lengths, new, rotary)
        if isinstance(self.tokens, SharedPrefixBackend):
            longest = max(self.host_lengths(batch, place).tolist())
            self.tokens.prepare(slots, before, longest, new[:, None])
        else:
            token.req_pool_indices = slots
            if batch.seq_lens_cpu is not None:
                token.seq_lens_cpu = batch.seq_lens_cpu[rows.index]
                token.seq_lens_sum = int(token.seq_lens_cpu.sum())
            bind_slots(self.sequence_slots, token)
            self.tokens.init_forward_metadata(token)
        return self.forward(token, self.tokens)

    def memory(self, batch: Any, place: Place) -> Candidates | None:
        """Any memory will do for the step's candidates."""
        return None

    def drawn(self, place: Place, candidates: Candidates) -> TiltSample | None:
        """Nothing is drawn where candidates are scored."""
        return None

    def emitted(self, batch: Any, place: Place) -> Tensor:
        """[R] tokens that the rows' targets have counted before this step's."""
        return place.emitted(batch)

    def score(self, batch: Any, place: Place, candidates: Candidates, value: bool = True) -> Scores:
        """Scores of the states after each candidate, [R, K], from the states before them: nothing is fed."""
        assert self.ahead is not None
        self.scored_rows += len(place.slots)
        return self.ahead.scores(place.slots, candidates, value)

    def draw_buffers(self, place: Place, logits: Tensor | None) -> DrawBuffers:
        """Where a draw of the rows goes: their logits [B, V]. The next `follow` reads the token itself."""
        return super().draw_buffers(place, logits)._replace(chosen=None)

    def remember_first(self, place: Place) -> None:
        """The next `follow` reads the token; there is nothing to remember."""


class AttachedWorker:
    """A head on the base model's own hidden state. The host is told to keep those states (`settings.attach_states`)."""

    reads_base = True
    sees_images = False
    own_prefixes = False
    """A cached prefix serves requests with and without length fields alike: there is no value KV."""

    def __init__(self, scheduler: Any, settings: Settings) -> None:
        self.settings = settings
        self.base = scheduler.tp_worker.model_runner
        directory = local_directory(self.base.model_config.model_path)
        self.attached = AttachedHead.from_pretrained(settings.model, directory)
        self.lenvm = self.attached.lenvm
        self.vocabulary = self.base.model_config.vocab_size
        self.width = min(settings.max_candidates, self.vocabulary)
        self.widths = width_buckets(self.width)
        self.scored_rows = 0
        parameters = sum(p.numel() for p in self.attached.parameters())
        logger.info("lenvm: lookahead head of %d parameters loaded from %s", parameters, settings.model)

    def info(self) -> dict[str, Any]:
        """What `GET /lenvm/info` says of the head."""
        return describe(self.settings, ARCHITECTURE, self.width, self.lenvm)

    def bytes_per_token(self) -> int:
        """There is no value KV."""
        return 0

    def scratch_bytes(self, max_requests: int | None) -> int:
        """There are no scratch slots."""
        return 0

    def allocate(self) -> None:
        """The parameter table and the states, once the base's request pool exists."""
        requests = self.base.req_to_token_pool.req_to_token
        no_scratch = torch.zeros(requests.shape[0], 0, dtype=torch.int64, device=requests.device)
        self.places = Places(RowTable(requests.shape[0], requests.device), no_scratch, self.widths, self.vocabulary)
        self.waits_for_nobody = requests.device.type == "cpu"
        head = self.attached.lookahead_head.to(requests.device)
        self.ahead = LastStates(self.lenvm, head, requests.shape[0], self.base.dtype)
        weights = sum(p.numel() * p.element_size() for p in head.parameters())
        states = self.ahead.states.numel() * self.ahead.states.element_size()
        logger.info("lenvm: head of %.2f MB, states of %.2f MB, no KV cache", weights / 2**20, states / 2**20)

    def build_backends(self) -> None:
        """There is no forward of ours."""

    def warm_up(self) -> None:
        """There is no forward of ours."""

    def follow(self, batch: Any, rows: LengthRows, output: Any) -> Read | None:
        """Keep the base's last state of each row.

        Args:
            batch: the host's forward batch, after its forward.
            rows: its rows with length fields.
            output: the host's logits output, with the hidden states before the lm_head.

        Returns:
            Of a prefill, which rows were read (without their states); None for a decode step.
        """
        if output.hidden_states is None:
            raise RuntimeError("lenvm: the host kept no hidden states, so an attached head has nothing to read.")
        if batch.forward_mode.is_decode():
            place = self.places.step(batch, rows)
            self.ahead.keep(place.slots, place.take(output.hidden_states))
            return None
        index = to_device(rows.index, torch.int64, batch.seq_lens.device)
        slots = batch.req_pool_indices[index].long()
        self.places.write(slots, rows.states)
        where = index
        if batch.capture_hidden_mode.is_full():  # of every token, where the operator asked for that
            ends = list(accumulate(batch.extend_seq_lens_cpu))
            where = to_device([ends[i] - 1 for i in rows.index], torch.int64, index.device)
        self.ahead.keep(slots, output.hidden_states[where])
        lengths = [batch.extend_seq_lens_cpu[i] for i in rows.index]
        return Read(self.ahead.states[:0], [batch.extend_prefix_lens_cpu[i] for i in rows.index], lengths)

    def scores(self, read: Read, index: Any) -> Scores:
        """Raises: RuntimeError, always: states behind a sequence's tokens are not kept (`/lenvm/values` is refused)."""
        raise RuntimeError("lenvm: an attached head scores candidates, not the states of a sequence.")

    def score(self, batch: Any, place: Place, candidates: Candidates, value: bool = True) -> Scores:
        """Scores of the states after each candidate, [R, K], from the base's states before them."""
        self.scored_rows += len(place.slots)
        return self.ahead.scores(place.slots, candidates, value)

    def memory(self, batch: Any, place: Place) -> Candidates | None:
        """Any memory will do for the step's candidates."""
        return None

    def drawn(self, place: Place, candidates: Candidates) -> TiltSample | None:
        """Nothing is drawn where candidates are scored."""
        return None

    def emitted(self, batch: Any, place: Place) -> Tensor:
        """[R] tokens that the rows' targets have counted before this step's."""
        return place.emitted(batch)

    def draw_buffers(self, place: Place, logits: Tensor | None) -> DrawBuffers:
        """Where a draw of the rows goes: their logits [B, V]."""
        return DrawBuffers(logits, None if place.whole else place.index, None, place.slots, place.scratch)

    def remember_first(self, place: Place) -> None:
        """There is no KV to keep."""


def make_worker(scheduler: Any, settings: Settings) -> ValueWorker | AttachedWorker:
    """The worker that a checkpoint's heads call for."""
    lenvm = read_lenvm_config(settings.model)
    if lenvm.attached:
        return AttachedWorker(scheduler, settings)
    return (LookaheadWorker if lenvm.has_lookahead_head else ValueWorker)(scheduler, settings)
