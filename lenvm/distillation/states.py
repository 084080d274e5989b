"""States of sampled completions, their candidates, and the teacher's length distribution after each candidate.

Two passes a completion, nothing kept on disk. The base model reads it once: its states before the lm_head and its
logits, of which the candidate sets are cut exactly as a server cuts them. The teacher reads it once with a cache, then
all candidates of the chosen states in a second forward, each behind its own prefix and blind to the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lenvm.candidates import Candidates, SamplingRows, build_candidates
from lenvm.distillation.errors import DistillationError
from lenvm.distillation.processes import Processes

TOKENS_A_BATCH = 4096
LOGIT_BYTES = 256 * 2**20
"""Most memory for the base's logits of one batch: with a large vocabulary they outweigh everything else."""
WEIGHT_EXPONENT = 0.25
"""A candidate counts p(x)^0.25: rare ones steer as well, and must not be drowned by the likely ones."""
StateOf = Literal["base", "lenvm"]


@dataclass(frozen=True)
class Completion:
    """Token ids of one sampled completion, and of which prompt it is."""

    prompt_id: str
    prompt: tuple[int, ...]
    completion: tuple[int, ...]


@dataclass(frozen=True)
class SampledWith:
    """The sampling settings of a file of completions: they decide which candidates a state has."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float

    @classmethod
    def of(cls, sampling: Mapping[str, Any]) -> SampledWith:
        """From a row's `sampling`; what is not there is off."""
        given = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, **sampling}
        return cls(given["temperature"], given["top_p"], given["top_k"], given["min_p"])

    def rows(self, count: int, vocabulary: int, device: torch.device) -> SamplingRows:
        """The same settings for `count` rows."""

        def full(value: float) -> Tensor:
            return torch.full((count,), value, device=device)

        top_k = self.top_k if 0 < self.top_k < vocabulary else vocabulary
        return SamplingRows(
            # greedy samples: candidates come from the distribution at temperature 1, as in serving
            temperature=full(self.temperature or 1.0),
            top_k=torch.full((count,), top_k, dtype=torch.int64, device=device),
            top_p=full(self.top_p),
            min_p=full(self.min_p),
        )


def read_completions(path: Path) -> tuple[list[Completion], SampledWith]:
    """The completions of a `lenvm sample` file that have at least one token.

    Raises:
        DistillationError: the file is missing or empty, a row lacks its token ids, or the rows' settings differ.
    """
    if not path.is_file():
        raise DistillationError(f"there is no {path}; give a file that `lenvm sample` wrote.")
    found: list[Completion] = []
    settings: set[SampledWith] = set()
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                ids = row["completion_token_ids"]
                one = Completion(str(row["prompt_id"]), tuple(row["prompt_token_ids"]), tuple(ids))
                how = row.get("sampling") or {}
            except (ValueError, KeyError, TypeError):
                raise DistillationError(
                    f"{path}, line {number} is not a completion with prompt_id, prompt_token_ids and "
                    "completion_token_ids; give a file that `lenvm sample` wrote."
                ) from None
            if one.completion and one.prompt:
                found.append(one)
            settings.add(SampledWith.of(how))
    if not found:
        raise DistillationError(f"{path} has no completions.")
    if len(settings) > 1:
        raise DistillationError(f"{path} mixes {len(settings)} sampling settings; distil from one of them.")
    return found, settings.pop()


@dataclass(frozen=True)
class States:
    """S states with what the student is to say of their K candidates.

    Attributes:
        hidden: [S, H] float32, whose states they are is the reader's choice.
        token_ids: [S, K] int64 candidates.
        weight: [S, K] float32 p(x)^0.25, 0 for stop tokens and empty slots: those are no targets.
        log_q: [S, K, B] float32 of the teacher at s_t + x; 0 where the weight is.
    """

    hidden: Tensor
    token_ids: Tensor
    weight: Tensor
    log_q: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    def select(self, index: Tensor) -> States:
        """Some of them."""
        return States(**{name: value[index] for name, value in vars(self).items()})

    @staticmethod
    def cat(parts: Sequence[States]) -> States:
        """One after the other."""
        return States(**{name: torch.cat([getattr(p, name) for p in parts]) for name in vars(parts[0])})


STATES_DTYPES = (torch.float32, torch.int64, torch.float32, torch.float32)
"""Of the tensors of `States`, in their order."""


class StateReader:
    """Turns completions into states.

    Args:
        base: causal LM of transformers, in evaluation mode.
        teacher: LengthValueModel with a length head, in evaluation mode, on the same device.
        sampled: how the completions were sampled.
        stop_token_ids: tokens that end an answer.
        candidates: K, most candidates of a state.
        states: most states of a completion; the prompt's is always among them.
        state_of: whose hidden state the student reads.
        processes: who reads along; each takes some of the batches, and all get all states.
    """

    def __init__(self, base: Any, teacher: Any, sampled: SampledWith, stop_token_ids: Sequence[int], candidates: int,
                 states: int, state_of: StateOf, processes: Processes | None = None) -> None:  # fmt: skip
        self.processes = processes or Processes()
        self.base, self.teacher, self.sampled = base, teacher, sampled
        self.device = next(base.parameters()).device
        self.stops = torch.tensor([list(stop_token_ids)], dtype=torch.int64, device=self.device)
        self.candidates, self.states, self.state_of = candidates, states, state_of
        vocabulary = base.config.get_text_config().vocab_size
        self.tokens_a_batch = max(64, min(TOKENS_A_BATCH, LOGIT_BYTES // (4 * vocabulary)))

    @torch.no_grad()
    def read(self, completions: Sequence[Completion], generator: torch.Generator) -> States:
        """States of these completions, in an order that depends on them and the generator only."""
        chosen = [self._choose(len(c.completion), generator) for c in completions]
        batches = list(self._batches([len(c.prompt) + len(c.completion) for c in completions]))
        own = {
            number: self._read([completions[i] for i in batch], [chosen[i] for i in batch])
            for number, batch in self.processes.share(batches).items()
        }
        return States.cat([self._spread(own.get(number), number) for number in range(len(batches))])

    def _spread(self, states: States | None, number: int) -> States:
        """A batch's states, from the process that read it."""
        tensors = None if states is None else [getattr(states, f.name) for f in fields(States)]
        return States(*self.processes.spread(tensors, number, STATES_DTYPES))

    def _choose(self, length: int, generator: torch.Generator) -> list[int]:
        """t = 0 and others of 0..length-1, ascending."""
        others = torch.randperm(length - 1, generator=generator)[: self.states - 1] + 1
        return [0, *sorted(others.tolist())]

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
            if batch and lengths[i] * (len(batch) + 1) > self.tokens_a_batch:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _read(self, completions: Sequence[Completion], chosen: Sequence[Sequence[int]]) -> States:
        # the last token of a completion is read by nobody: no state of interest follows it
        texts = [[*c.prompt, *c.completion[:-1]] for c in completions]
        longest = max(map(len, texts))
        ids = torch.zeros(len(texts), longest, dtype=torch.int64)
        mask = torch.zeros(len(texts), longest, dtype=torch.int64)
        for i, text in enumerate(texts):
            ids[i, : len(text)] = torch.tensor(text)
            mask[i, : len(text)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        row = torch.tensor([i for i, ts in enumerate(chosen) for _ in ts], device=self.device)
        place = torch.tensor(
            [len(c.prompt) - 1 + t for c, ts in zip(completions, chosen, strict=True) for t in ts], device=self.device
        )
        hidden, logits = base_states(self.base, ids, mask)
        logits = logits[row, place]
        vocabulary = logits.shape[-1]
        settings = self.sampled.rows(len(row), vocabulary, self.device)
        reach = max(self.candidates, self.sampled.top_k if 0 < self.sampled.top_k < vocabulary else 0)
        stops = self.stops.expand(len(row), -1)
        found = build_candidates(logits, settings, stops, self.candidates, reach=reach)
        log_q, teacher_hidden = self._teach(ids, mask, row, place, found)
        if self.state_of == "lenvm":
            hidden = teacher_hidden
        targets = found.kept & ~found.is_stop
        weight = found.log_p.exp().pow(WEIGHT_EXPONENT).masked_fill(~targets, 0.0)
        states = States(hidden[row, place].float(), found.token_ids, weight, log_q)
        return states.select(targets.any(-1))

    def _teach(self, ids: Tensor, mask: Tensor, row: Tensor, place: Tensor, found: Candidates) -> tuple[Tensor, Tensor]:
        """Teacher's log q [S, K, B] after each target candidate, and its own states [b, T, H] on the way."""
        teacher = self.teacher
        first = teacher.backbone(input_ids=ids, attention_mask=mask, use_cache=True)
        prefix, width = ids.shape[1], found.token_ids.shape[1]
        state, slot = (found.kept & ~found.is_stop).nonzero(as_tuple=True)
        log_q = torch.zeros(len(row), width, len(teacher.bins), device=self.device)
        if len(state):
            owner = row[state]  # ascending, so candidates of a text lie together
            count = torch.bincount(owner, minlength=len(ids))
            column = torch.arange(len(state), device=self.device) - (count.cumsum(0) - count)[owner]
            most = int(count.max())
            tokens = torch.zeros(len(ids), most, dtype=torch.int64, device=self.device)
            positions = torch.zeros_like(tokens)
            tokens[owner, column] = found.token_ids[state, slot]
            positions[owner, column] = place[state] + 1
            # each candidate sees its own prefix and itself; padded ones see themselves and are read by nobody
            sees = torch.arange(prefix, device=self.device) < positions[..., None]  # [b, M, T]
            itself = torch.eye(most, dtype=torch.bool, device=self.device).expand(len(ids), most, most)
            allowed = torch.cat([sees, itself], dim=-1)[:, None]
            dtype = first.last_hidden_state.dtype
            additive = torch.zeros(allowed.shape, dtype=dtype, device=self.device)
            additive.masked_fill_(~allowed, torch.finfo(dtype).min)
            second = teacher.backbone(
                input_ids=tokens,
                attention_mask=additive,
                position_ids=positions,
                past_key_values=first.past_key_values,
                use_cache=True,
            ).last_hidden_state
            log_q[state, slot] = torch.log_softmax(teacher.length_head(second[owner, column]), dim=-1)
        return log_q, first.last_hidden_state


def base_states(base: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """States before the lm_head [b, T, H] and logits [b, T, V] of a causal LM, from one forward.

    The states are what the lm_head module is given, which is what a server has as its hidden states.
    """
    caught: list[Tensor] = []
    hook = base.get_output_embeddings().register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    try:
        logits = base(input_ids=ids, attention_mask=mask, use_cache=False).logits
    finally:
        hook.remove()
    return caught[0], logits


def check_teacher(teacher: Any, where: Path) -> None:
    """Refuse a teacher that cannot score candidates exactly.

    Raises:
        DistillationError: it has no length distribution, or layers that do not see their whole prefix.
    """
    if not teacher.lenvm.has_length_head:
        raise DistillationError(f"{where} has a value head only; a teacher needs the length head as well.")
    text = teacher.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise DistillationError(
            f"{where} has layers of the kind {', '.join(sorted(kinds - {'full_attention'}))}; a teacher needs full "
            "attention in every layer so far."
        )
