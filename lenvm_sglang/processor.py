"""The steering object: where candidates are cut, scored, guided and drawn.

SGLang computes the logits, applies penalties, grammar and bias, then its custom logits processors; right there this
one acts on the rows that carry length fields. A guided row leaves it **one-hot**, so that the host's temperature, top-p
and random numbers cannot act on it a second time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from torch import Tensor

from lenvm.candidates import Candidates, build_candidates, keep_mass, settle_sure_rows
from lenvm.definitions import length_from_logit
from lenvm.format import LenvmConfig
from lenvm.guidance import Scores, guide_rows, predicted_lengths, strict_bounds
from lenvm.lognormal import lognormal_log_q
from lenvm.sampler import draw
from lenvm_sglang.metrics import FallbackOutput, StepMetrics
from lenvm_sglang.outputs import QUANTILES, LengthOutput, SequenceOutput
from lenvm_sglang.scope import aim, probe_end
from lenvm_sglang.state import RowParameters, to_device
from lenvm_sglang.worker import LengthRows, Read, ValueWorker

_STATES_AT_ONCE = 256


@dataclass
class SamplingStep:
    """One call of the host's sampler over a batch with length fields.

    Attributes:
        processor: who acts in it.
        batch: the host's forward batch.
        steered: its rows whose token is drawn here, if any.
        watched: its rows that only ask for values, if any: the host draws their tokens.
        logits: the very tensor the host samples from; the host also preprocesses copies, which are left alone.
        wants_logprobs: the host will return log-probabilities,
        scale_logprobs: at the request's temperature rather than at 1.
        index: [R] int64 batch positions of the steered rows, on the device.
        base_logprobs: [R, V] float32 of the base model in these rows, if `wants_logprobs`.
        outputs: predicted lengths for the host.
    """

    processor: LengthValueLogitProcessor
    batch: Any
    steered: LengthRows | None
    watched: LengthRows | None
    logits: Tensor
    wants_logprobs: bool
    scale_logprobs: bool
    index: Tensor | None = None
    base_logprobs: Tensor | None = None
    outputs: list[LengthOutput | FallbackOutput] = field(default_factory=list)


class LengthValueLogitProcessor(CustomLogitProcessor):  # type: ignore[misc]
    """Steers the completion length with a length value model.

    Registered inside the server by the plug-in, for every request that carries length fields. It is never built from
    client bytes and does not need `--enable-custom-logit-processor`.
    """

    def __init__(self, worker: ValueWorker, metrics: StepMetrics | None = None) -> None:
        self.worker = worker
        self.metrics = metrics

    def _timed(self, phase: str) -> AbstractContextManager[None]:
        return nullcontext() if self.metrics is None else self.metrics.timed(phase)

    def __call__(self, logits: Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> Tensor:
        """The host's interface for processors without access to the KV cache; this one acts in `steer`.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("LengthValueLogitProcessor needs the forward batch; the plug-in calls steer().")

    def follow(self, batch: Any, rows: LengthRows) -> list[LengthOutput | SequenceOutput]:
        """After each forward of the base model: value KV of what it read, predictions at the prompt boundary, and
        every state of a sequence that is only read."""
        with self._timed("read"):
            return self._follow(batch, rows)

    def _follow(self, batch: Any, rows: LengthRows) -> list[LengthOutput | SequenceOutput]:
        read = self.worker.follow(batch, rows)
        if read is None:
            return []
        ends = list(accumulate(read.lengths))
        outputs: list[LengthOutput | SequenceOutput] = []
        wanted = [i for i, state in enumerate(rows.states) if rows.draws[i] and state.predicted_length is None]
        if wanted:
            lengths = prompt_lengths(self.worker.scores(read, [ends[i] - 1 for i in wanted]), self.worker.lenvm)
            index, states = [rows.index[i] for i in wanted], [rows.states[i] for i in wanted]
            outputs.append(LengthOutput(index, states, lengths, at_prompt=True))
        for i, state in enumerate(rows.states):
            if state.sequence_from is None:
                continue
            begin = max(read.prefixes[i], state.sequence_from)
            fresh = read.prefixes[i] + read.lengths[i] - begin
            if fresh > 0:
                tokens = range(ends[i] - fresh, ends[i])
                after_stop = [position in state.sequence_stops for position in range(begin, begin + fresh)]
                columns = self._columns(read, tokens)
                outputs.append(SequenceOutput(state, begin - state.sequence_from, after_stop, columns))
        return outputs

    def _columns(self, read: Read, tokens: range) -> Tensor:
        """`SEQUENCE_COLUMNS` of the states after `tokens`, [len(tokens), 5]; in pieces, because quantiles take a row
        of the longest trained length for each state."""
        pieces = []
        for start in range(0, len(tokens), _STATES_AT_ONCE):
            scores = self.worker.scores(read, tokens[start : start + _STATES_AT_ONCE])
            value = -torch.sigmoid(scores.z.float())
            pieces.append(torch.cat([value[:, None], prompt_lengths(scores, self.worker.lenvm)], dim=-1))
        return torch.cat(pieces)

    def begin(self, batch: Any, rows: LengthRows, logits: Tensor, scale_logprobs: bool) -> SamplingStep:
        """Open a sampling step."""
        return SamplingStep(
            processor=self,
            batch=batch,
            steered=rows.drawing(steered=True),
            watched=rows.drawing(steered=False),
            logits=logits,
            wants_logprobs=batch.return_logprob,
            scale_logprobs=scale_logprobs,
        )

    def steer(self, step: SamplingStep) -> None:
        """Cut, score, guide and draw; make the steered rows of `step.logits` one-hot in place.

        Called between the host's last change of the logits and its sampler. Does not wait for a CUDA device.
        """
        if step.steered is not None:
            with self._timed("choose"):
                self._steer(step, step.steered)

    def _steer(self, step: SamplingStep, rows: LengthRows) -> None:
        worker, batch = self.worker, step.batch
        device = step.logits.device
        index = to_device(rows.index, torch.int64, device)
        slots = batch.req_pool_indices[index].long()
        lengths = batch.seq_lens[index]
        parameters = worker.table.read(slots, lengths)
        logits = step.logits[index]
        step.index = index
        if step.wants_logprobs:
            temperature = parameters.sampling.temperature[:, None] if step.scale_logprobs else 1.0
            step.base_logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
        ban_stop, force_stop = strict_bounds(parameters.guidance)
        vocabulary = logits.shape[-1]
        candidates = build_candidates(
            logits,
            parameters.sampling,
            parameters.stop_token_ids,
            worker.width,
            ban_stop,
            force_stop,
            # the states are on the host: with no top-k on, ordering K tokens is enough
            reach=max([worker.width, *(s.top_k for s in rows.states if s.top_k < vocabulary)]),
        )
        candidates = self._fewer(candidates, parameters)
        thinking, guidance, scored = any(state.think_end >= 0 for state in rows.states), parameters.guidance, candidates
        if thinking:
            candidates, scored = probe_end(candidates, parameters.think_end)
        elif device.type == "cpu":
            # With no device to wait for, narrow the forward to the slots that any row uses.
            candidates = scored = narrow(candidates, used_slots(candidates))
        scores = worker.score(slots, lengths, longest_sequence(batch, rows), scored)
        if thinking:
            if batch.forward_mode.is_decode():
                over = batch.input_ids[index] == parameters.think_end
            else:
                over = to_device([state.thought for state in rows.states], torch.bool, device)
            guidance = aim(guidance, parameters.think_end, over, scored, scores, worker.lenvm)
        present = {state.request.control_code for state in rows.states}
        guided = guide_rows(candidates, scores, guidance, worker.lenvm, present)
        if self.metrics is not None:
            broken = guided.fell_back & ~finite_rows(candidates, scores)
            step.outputs.append(FallbackOutput(self.metrics, torch.stack([broken, guided.fell_back & ~broken])))
        choice = draw(
            guided.log_p, candidates.token_ids, parameters.seed, parameters.guidance.emitted, parameters.greedy
        )
        token = candidates.token_ids.gather(-1, choice[:, None])
        step.logits[index] = torch.full_like(logits, -torch.inf).scatter_(-1, token, 0.0)
        worker.remember(slots, choice)
        lengths_after = predicted_lengths(candidates, scores, worker.lenvm).gather(-1, choice[:, None])[:, 0]
        self._report(step, rows, lengths_after)

    def _fewer(self, candidates: Candidates, parameters: RowParameters) -> Candidates:
        """What the server's settings leave of the candidates where the base model is sure."""
        settings = self.worker.settings
        if settings.candidate_mass < 1:
            candidates = keep_mass(candidates, settings.candidate_mass)
        if settings.min_entropy > 0:
            emitted, greedy = parameters.guidance.emitted, parameters.greedy
            choice = draw(candidates.log_p, candidates.token_ids, parameters.seed, emitted, greedy)
            candidates = settle_sure_rows(candidates, choice, settings.min_entropy)
        return candidates

    def watch(self, step: SamplingStep, token_ids: Tensor) -> None:
        """Score the tokens that the host drew in rows which only ask for values; nothing is changed.

        Args:
            step: the sampling step.
            token_ids: [batch] what the host drew.
        """
        if step.watched is None:
            return
        worker, batch, rows = self.worker, step.batch, step.watched
        index = to_device(rows.index, torch.int64, token_ids.device)
        slots = batch.req_pool_indices[index].long()
        lengths = batch.seq_lens[index]
        token = token_ids[index].long()[:, None]
        candidates = Candidates(
            token_ids=token,
            log_p=torch.zeros(token.shape, device=token.device),
            is_stop=(worker.table.stops[slots] == token).any(-1, keepdim=True),
        )
        scores = worker.score(slots, lengths, longest_sequence(batch, rows), candidates)
        worker.remember(slots, torch.zeros_like(slots))
        self._report(step, rows, predicted_lengths(candidates, scores, worker.lenvm)[:, 0])

    @staticmethod
    def _report(step: SamplingStep, rows: LengthRows, lengths: Tensor) -> None:
        wanted = [i for i, state in enumerate(rows.states) if state.request.return_values]
        if not wanted:
            return
        if len(wanted) < len(rows.states):
            lengths = lengths[to_device(wanted, torch.int64, lengths.device)]
        index, states = [rows.index[i] for i in wanted], [rows.states[i] for i in wanted]
        step.outputs.append(LengthOutput(index, states, lengths, at_prompt=False))


def prompt_lengths(scores: Scores, lenvm: LenvmConfig) -> Tensor:
    """Predicted completion length at R prompt boundaries and its quantiles, [R, 1 + len(QUANTILES)] float32 tokens.

    From the length distribution; a value-only checkpoint gives the inverted value and the quantiles of the log-normal
    around it.
    """
    if scores.length_log_q is not None:
        log_q, bins = scores.length_log_q, lenvm.length_bins
        expected = bins.expected(log_q)
    else:
        log_q, bins = lognormal_log_q(scores.z, lenvm)
        expected = length_from_logit(scores.z, lenvm.gamma)
    return torch.stack([expected, *(bins.quantile(log_q, p).float() for p in QUANTILES)], dim=-1)


def finite_rows(candidates: Candidates, scores: Scores) -> Tensor:
    """[R] bool: the value model gave finite numbers for every candidate that is read."""
    read = candidates.kept & ~candidates.is_stop
    finite = scores.z.isfinite()
    if scores.length_log_q is not None:
        finite = finite & ~scores.length_log_q.isnan().any(-1)
    return (finite | ~read).all(-1)


def used_slots(candidates: Candidates) -> int:
    """How many of the first slots hold every candidate; at least one, also where logits were NaN and none is left."""
    used = candidates.kept.any(0).nonzero()
    return int(used.max()) + 1 if len(used) else 1


def narrow(candidates: Candidates, width: int) -> Candidates:
    """The first `width` slots of every row."""
    return Candidates(candidates.token_ids[:, :width], candidates.log_p[:, :width], candidates.is_stop[:, :width])


def longest_sequence(batch: Any, rows: LengthRows) -> int:
    """The most tokens that a row of `rows` has read, from the host's mirror of the sequence lengths if there is one."""
    mirror = batch.seq_lens if batch.seq_lens_cpu is None else batch.seq_lens_cpu
    return int(mirror[rows.index].max())
