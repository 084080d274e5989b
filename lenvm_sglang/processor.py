"""The steering object: where candidates are cut, scored, guided and drawn.

SGLang computes the logits, applies penalties, grammar and bias, then its custom logits processors; right there this
one acts on the rows that carry length fields. The host's temperature, top-p and random numbers cannot act on a guided
row a second time: it leaves here **one-hot**, or, where all rows are guided, the host's sampler is passed by.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor
from torch import Tensor

from lenvm.candidates import Candidates, keep_mass, settle_sure_rows
from lenvm.definitions import length_from_logit
from lenvm.format import LenvmConfig
from lenvm.guidance import Control, GuidanceRows, Scores, predicted_lengths
from lenvm.lognormal import lognormal_log_q
from lenvm.lookahead import prompt_distribution, prompt_summary
from lenvm.sampler import draw
from lenvm_kernels import build_candidates, extent, prepare, tilt_sample
from lenvm_sglang.metrics import FallbackOutput, StepMetrics
from lenvm_sglang.outputs import QUANTILES, LengthOutput, SequenceOutput
from lenvm_sglang.rows import LengthRows, Place, Read
from lenvm_sglang.scope import aim, probe_end
from lenvm_sglang.state import RowParameters, to_device
from lenvm_sglang.worker import ValueWorker

if TYPE_CHECKING:
    from lenvm_sglang.lookahead import AttachedWorker

_STATES_AT_ONCE = 256
BY_VALUE = frozenset({Control.HARD, Control.SOFT, Control.BIAS})
"""Controls that read z; the posterior reads the length distribution."""


class Drawn(NamedTuple):
    """What was drawn in R steered rows.

    Attributes:
        rows: [R] int64 batch positions.
        token_ids: [R] int64.
        base_logprobs: [R, V] float32 of the base model in these rows; None if the host does not return any.
    """

    rows: Tensor
    token_ids: Tensor
    base_logprobs: Tensor | None

    @classmethod
    def of(cls, parts: Sequence[Drawn]) -> Drawn:
        """All rows of the parts."""
        rows, token_ids = (torch.cat(tensors) for tensors in ([p.rows for p in parts], [p.token_ids for p in parts]))
        logprobs = [part.base_logprobs for part in parts if part.base_logprobs is not None]
        return cls(rows, token_ids, torch.cat(logprobs) if logprobs else None)


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
        one_hot: the rows drawn are made one-hot, because the host's sampler goes on from there.
        drawn: in the steered rows, once they are.
        outputs: predicted lengths for the host.
    """

    processor: LengthValueLogitProcessor
    batch: Any
    steered: LengthRows | None
    watched: LengthRows | None
    logits: Tensor
    wants_logprobs: bool
    scale_logprobs: bool
    one_hot: bool = True
    drawn: Drawn | None = None
    outputs: list[LengthOutput | FallbackOutput] = field(default_factory=list)

    @property
    def all_steered(self) -> bool:
        """A token is drawn here for every row of the batch."""
        return self.steered is not None and len(self.steered.index) == len(self.logits)

    @property
    def all_drawn(self) -> bool:
        """It has been."""
        return self.drawn is not None and len(self.drawn.rows) == len(self.logits)

    def write_drawn(self) -> None:
        """Make the rows drawn one-hot, after all."""
        if self.drawn is not None:
            self.logits.index_fill_(0, self.drawn.rows, -torch.inf)
            self.logits[self.drawn.rows, self.drawn.token_ids] = 0.0


class LengthValueLogitProcessor(CustomLogitProcessor):  # type: ignore[misc]
    """Steers the completion length with a length value model.

    Registered inside the server by the plug-in, for every request that carries length fields. It is never built from
    client bytes and does not need `--enable-custom-logit-processor`.
    """

    def __init__(self, worker: ValueWorker | AttachedWorker, metrics: StepMetrics | None = None) -> None:
        self.worker = worker
        self.metrics = metrics
        prepare(torch.device(worker.base.device))

    def _timed(self, phase: str) -> AbstractContextManager[None]:
        return nullcontext() if self.metrics is None else self.metrics.timed(phase)

    def __call__(self, logits: Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> Tensor:
        """The host's interface for processors without access to the KV cache; this one acts in `steer`.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("LengthValueLogitProcessor needs the forward batch; the plug-in calls steer().")

    def follow(self, batch: Any, rows: LengthRows, output: Any) -> list[LengthOutput | SequenceOutput]:
        """After each forward of the base model: value KV of what it read, predictions at the prompt boundary, and
        every state of a sequence that is only read."""
        with self._timed("read"):
            return self._follow(batch, rows, output)

    def _follow(self, batch: Any, rows: LengthRows, output: Any) -> list[LengthOutput | SequenceOutput]:
        read = self.worker.follow(batch, rows, output)
        if read is None:
            return []
        ends = list(accumulate(read.lengths))
        outputs: list[LengthOutput | SequenceOutput] = []
        wanted = [i for i, state in enumerate(rows.states) if rows.draws[i] and state.predicted_length is None]
        if wanted:
            index, states = [rows.index[i] for i in wanted], [rows.states[i] for i in wanted]
            if self.worker.ahead is None:
                lengths = prompt_lengths(self.worker.scores(read, [ends[i] - 1 for i in wanted]), self.worker.lenvm)
            else:
                chosen = LengthRows(index, states, [True] * len(index), [False] * len(index))
                lengths = self._prompt_ahead(batch, chosen, output.next_token_logits)
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

    def _prompt_ahead(self, batch: Any, rows: LengthRows, logits: Tensor) -> Tensor:
        """`prompt_lengths` from one state before the first token: sum_x p(x) q(n - 1 | s_0 + x) over the candidates
        that the requests' own sampling settings leave of the base's logits."""
        worker = self.worker
        assert worker.ahead is not None
        place = worker.places.find(batch, rows)
        parameters = place.parameters
        candidates = build_candidates(
            place.take(logits), parameters.sampling, parameters.stop_token_ids, place.width, None, place.reach
        )
        after = worker.ahead.scores(place.slots, candidates, value=False).length_log_q
        assert after is not None
        pmf = prompt_distribution(candidates, after, worker.lenvm.length_bins)
        return prompt_summary(pmf, QUANTILES)

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
            steered=rows.steering,
            watched=rows.watching,
            logits=logits,
            wants_logprobs=batch.return_logprob,
            scale_logprobs=scale_logprobs,
        )

    def steer(self, step: SamplingStep) -> Drawn:
        """Cut, score, guide and draw the steered rows; make them one-hot in `step.logits` if that is wanted.

        Called between the host's last change of the logits and its sampler. Does not wait for a CUDA device.
        """
        assert step.steered is not None
        with self._timed("choose"):
            return self._steer(step, step.steered)

    def _steer(self, step: SamplingStep, rows: LengthRows) -> Drawn:
        worker, batch = self.worker, step.batch
        place = worker.places.find(batch, rows)
        parameters = place.parameters
        guidance = parameters.after(worker.emitted(batch, place))
        logits = place.take(step.logits)
        base_logprobs = None
        if step.wants_logprobs:
            temperature = parameters.sampling.temperature[:, None] if step.scale_logprobs else 1.0
            base_logprobs = torch.log_softmax(logits.float() / temperature, dim=-1)
        candidates = build_candidates(
            logits,
            parameters.sampling,
            parameters.stop_token_ids,
            place.width,
            guidance if place.strict else None,
            place.reach,
            worker.memory(batch, place),
        )
        candidates = self._fewer(candidates, parameters, guidance)
        thinking, scored = place.thinking, candidates
        if thinking:
            candidates, scored = probe_end(candidates, parameters.think_end)
        elif worker.waits_for_nobody:
            # With no device to wait for, narrow the forward to the slots that any row uses.
            # At least one, also where no token is possible and none is left.
            candidates = scored = narrow(candidates, max(extent(candidates)[0], 1))
        by_value = not place.present.isdisjoint(BY_VALUE)
        scores = worker.score(batch, place, scored, by_value)
        present = place.present
        if thinking:
            present = present | {Control.NONE}  # what `aim` releases
            if batch.forward_mode.is_decode():
                over = place.take(batch.input_ids) == parameters.think_end
            else:
                over = to_device([state.thought for state in rows.states], torch.bool, logits.device)
            guidance = aim(guidance, parameters.think_end, over, scored, scores, worker.lenvm)
        # by the rows' own rules, and into no logits
        sample = None if thinking or step.one_hot else worker.drawn(place, candidates)
        if sample is None:
            sample = tilt_sample(
                candidates,
                scores,
                guidance,
                worker.lenvm,
                parameters.seed,
                parameters.greedy,
                present,
                statistics=self.metrics is not None,
                lengths=place.reported is not None,
                into=worker.draw_buffers(place, step.logits if step.one_hot else None),
            )
        if self.metrics is not None:
            assert sample.status is not None
            step.outputs.append(FallbackOutput(self.metrics, sample.status))
        self._report(step, place, sample.length)
        return Drawn(place.index, sample.token_id, base_logprobs)

    def _fewer(self, candidates: Candidates, parameters: RowParameters, guidance: GuidanceRows) -> Candidates:
        """What the server's settings leave of the candidates where the base model is sure."""
        settings = self.worker.settings
        if settings.candidate_mass < 1:
            candidates = keep_mass(candidates, settings.candidate_mass)
        if settings.min_entropy > 0:
            emitted, greedy = guidance.emitted, parameters.greedy
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
        place = worker.places.find(batch, rows)
        token = place.take(token_ids).long()[:, None]
        candidates = Candidates(
            token_ids=token,
            log_p=torch.zeros(token.shape, device=token.device),
            is_stop=(place.parameters.stop_token_ids == token).any(-1, keepdim=True),
        )
        scores = worker.score(batch, place, candidates, value=False)
        worker.remember_first(place)
        self._report(step, place, predicted_lengths(candidates, scores, worker.lenvm)[:, 0])

    @staticmethod
    def _report(step: SamplingStep, place: Place, lengths: Tensor | None) -> None:
        reported = place.reported
        if reported is not None:
            assert lengths is not None
            part = lengths if reported.part is None else lengths[reported.part]
            step.outputs.append(LengthOutput(reported.index, reported.states, part, at_prompt=False))


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


def narrow(candidates: Candidates, width: int) -> Candidates:
    """The first `width` slots of every row."""
    if width == candidates.log_p.shape[1]:
        return candidates
    return Candidates(candidates.token_ids[:, :width], candidates.log_p[:, :width], candidates.is_stop[:, :width])
