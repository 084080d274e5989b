"""`length_scope`: the part of a reasoning model's completion that a target counts.

`answer` counts what follows the end-of-thinking tag. The value model predicts how much of the whole completion is still
to come, which after that tag is the rest of the answer: so the thinking is left to the base model, and the answer is
guided like any completion.

`thinking` counts up to the tag, which it includes. What is still to come while thinking is the rest of the thinking
*and* the answer, so the target is moved by the expected answer, A = E[n | s_t + tag], which the value model says at
every step when the tag is one of the candidates it scores: thinking of T tokens is a completion of T + A.

The host launches a step before it has seen the token of the step before it. To do the same with and without this
overlap, a phase takes effect on the second token after the one that decided it: the first token behind the tag is the
base model's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lenvm.candidates import Candidates
from lenvm.format import LenvmConfig
from lenvm.guidance import Control, GuidanceRows, Mode, Scores, predicted_lengths


class ThinkTags(NamedTuple):
    """Token ids of the tags around a model's thinking; `start` is None where it is not one token."""

    start: int | None
    end: int


@dataclass
class Scope:
    """Where one request stands between thinking and answer. Positions count completion tokens.

    Attributes:
        counts: `thinking` or `answer`.
        tags: of the base model.
        opened: the completion begins inside the thinking, or its first token opened it.
        steered_from: first position at which `opened` may be acted upon.
        thought: tokens of the thinking, its end tag included; None as long as it is not known to be over.
        answered_from: first position at which `thought` may be acted upon.
        scanned: committed tokens looked at so far.
    """

    counts: str
    tags: ThinkTags
    opened: bool = False
    steered_from: int = 0
    thought: int | None = None
    answered_from: int = 0
    scanned: int = 0

    @classmethod
    def begin(
        cls, counts: str, tags: ThinkTags, prompt: Sequence[int], stops: frozenset[int], reasoning: bool
    ) -> Scope:
        """Of a new request.

        Args:
            counts: `thinking` or `answer`.
            tags: of the base model.
            prompt: token ids. Only what follows its last stop token concerns this turn.
            stops: stop token ids.
            reasoning: the host knows that the completion begins with thinking.
        """
        scope = cls(counts, tags, opened=reasoning)
        if not reasoning:
            for token in reversed(prompt):
                if token in stops:
                    break
                if token in tags:
                    scope.opened = token == tags.start
                    scope.thought = 0 if token == tags.end else None
                    break
        return scope

    def read(self, completion: Sequence[int]) -> bool:
        """Look at committed tokens; whether they ended the thinking."""
        before = self.thought
        while self.thought is None and self.scanned < len(completion):
            token = completion[self.scanned]
            self.scanned += 1
            if token == self.tags.end:
                self.thought, self.answered_from = self.scanned, self.scanned + 1
            elif self.scanned == 1 and not self.opened:
                self.opened = token == self.tags.start
                self.steered_from = self.answered_from = 2
                self.thought = None if self.opened else 0
        return self.thought != before

    def steers(self, position: int) -> bool:
        """Whether the token at `position` is guided."""
        answering = self.thought is not None and position >= self.answered_from
        if self.counts == "answer":
            return answering
        return self.opened and position >= self.steered_from and not answering

    @property
    def offset(self) -> int:
        """Completion tokens before the first that counts."""
        return (self.thought or 0) if self.counts == "answer" else 0


def counted(counts: str, thought: int | None, completion_tokens: int) -> int:
    """Tokens of a finished completion that a target counts."""
    if counts == "all":
        return completion_tokens
    thinking = completion_tokens if thought is None else min(thought, completion_tokens)
    return thinking if counts == "thinking" else completion_tokens - thinking


def probe_end(candidates: Candidates, end: Tensor) -> tuple[Candidates, Candidates]:
    """Make the end tag a token that is scored.

    Args:
        candidates: [R, K].
        end: [R] int64 end tag of the rows whose thinking is counted, -1 in others.

    Returns:
        What may be drawn, and what is scored: where the tag is no candidate, the last slot goes to it, which can then
        be scored but not drawn.
    """
    absent = (end >= 0) & ~((candidates.token_ids == end[:, None]) & candidates.kept).any(-1)
    last = torch.zeros_like(candidates.kept)
    last[:, -1] = absent
    token_ids = torch.where(last, end[:, None], candidates.token_ids)
    is_stop = candidates.is_stop & ~last
    drawn = Candidates(token_ids, candidates.log_p.masked_fill(last, -torch.inf), is_stop)
    return drawn, Candidates(token_ids, candidates.log_p.masked_fill(last, 0.0), is_stop)


def aim(
    guidance: GuidanceRows, end: Tensor, over: Tensor, probed: Candidates, scores: Scores, lenvm: LenvmConfig
) -> GuidanceRows:
    """Move the targets of thinking rows from thinking to the whole completion.

    Args:
        guidance: of R rows, whose targets count thinking where `end` is set.
        end: [R] as in `probe_end`.
        over: [R] bool, the last token was the end tag, which the host has not seen yet: the base model's turn.
        probed: what was scored, from `probe_end`.
        scores: of it.
        lenvm: of the value model.

    Returns:
        Rows with T + A for T, A the expected answer if the thinking ended now. Past the bound the shortest way out is
        the tag itself, so a thinking row is never further than at it. Does not synchronise with the host.
    """
    thinking = end >= 0
    tag = probed.token_ids == end[:, None]
    answer = predicted_lengths(probed, scores, lenvm).masked_fill(~tag, 0.0).sum(-1).nan_to_num().round().long()
    total = guidance.left.clamp(min=0) + answer + guidance.emitted + 1
    released = thinking & (over | ((guidance.mode == Mode.AT_LEAST) & (guidance.left <= 0)))
    return replace(
        guidance,
        target=torch.where(thinking, total, guidance.target),
        control=guidance.control.masked_fill(released, int(Control.NONE)),
    )
