"""A small control evaluation inside distillation: is the head good at what it is for?

Held-out KL weighs every candidate of every state; an answer of the right length takes the right choice again and
again, above all near its end. So some held-out prompts are answered under guidance, each with the length of one of the
base's own completions as its target, and scored by the Length Score (Eq. 18).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lenvm.candidates import build_candidates
from lenvm.distillation.states import Completion, StateReader
from lenvm.evaluation.metrics import length_score
from lenvm.format import LenvmConfig
from lenvm.guidance import Control, GuidanceRows, Mode, guide_rows
from lenvm.heads import LookaheadHead
from lenvm.lookahead import scores_from_distribution
from lenvm.sampler import draw

SHARPNESS = 2.0
OVERRUN = 1.5
"""An answer is cut at so many times its target: its score is near 0 by then."""


class ControlCheck:
    """Guided answers of some prompts, all in one batch with a KV cache.

    Args:
        reader: models, sampling settings and stop tokens.
        completions: prompts to answer; each asks for the length of its own completion.
        lenvm: gamma and bins of the head.
        source: the embedding that a projecting head reads.
        seed: of the draws, the same at every call, so that heads are compared on the same noise.
    """

    def __init__(self, reader: StateReader, completions: Sequence[Completion], lenvm: LenvmConfig,
                 source: Tensor | None, seed: int = 0) -> None:  # fmt: skip
        self.reader, self.completions, self.lenvm, self.source, self.seed = reader, completions, lenvm, source, seed

    def __call__(self, head: LookaheadHead) -> float:
        """Mean Length Score, 0 to 100."""
        lengths = [len(answer) for answer in self.answers(head)]
        targets = [len(c.completion) for c in self.completions]
        return float(length_score(lengths, targets, "equal_to").mean())

    @torch.no_grad()
    def answers(self, head: LookaheadHead, greedy: bool = False) -> list[list[int]]:
        """Token ids of the answers, the stop token included where one was drawn."""
        reader, device = self.reader, self.reader.device
        rows = len(self.completions)
        longest = max(len(c.prompt) for c in self.completions)
        ids = torch.zeros(rows, longest, dtype=torch.int64, device=device)
        mask = torch.zeros(rows, longest, dtype=torch.int64, device=device)
        for i, c in enumerate(self.completions):  # padded on the left: every row's next token is in the last column
            ids[i, longest - len(c.prompt) :] = torch.tensor(c.prompt)
            mask[i, longest - len(c.prompt) :] = 1
        targets = torch.tensor([len(c.completion) for c in self.completions], device=device)
        seeds = torch.arange(rows, device=device) + self.seed * rows
        asked = self._asked(targets)
        found: list[list[int]] = [[] for _ in range(rows)]
        going = torch.ones(rows, dtype=torch.bool, device=device)
        caches: dict[str, Any] = {"base": None, "lenvm": None}
        for t in range(int(OVERRUN * int(targets.max())) + 1):
            going &= t < OVERRUN * targets
            if not going.any():
                break
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            hidden, logits = self._step(ids, mask, positions, caches)
            settings = reader.sampled.rows(rows, logits.shape[-1], device)
            stops = reader.stops.expand(rows, -1)
            candidates = build_candidates(logits, settings, stops, reader.candidates)
            log_q = torch.log_softmax(head(hidden, candidates.token_ids, self.source), dim=-1)
            scores = scores_from_distribution(log_q, self.lenvm)
            emitted = torch.full((rows,), t, device=device)
            wanted = GuidanceRows(**{**vars(asked), "emitted": emitted})
            log_p = guide_rows(candidates, scores, wanted, self.lenvm, {Control.POSTERIOR}).log_p
            choice = draw(log_p, candidates.token_ids, seeds, emitted, torch.full_like(going, greedy))
            token = candidates.token_ids.gather(-1, choice[:, None])
            for i in going.nonzero()[:, 0].tolist():
                found[i].append(int(token[i, 0]))
            going &= ~candidates.is_stop.gather(-1, choice[:, None])[:, 0]
            ids, mask = token, torch.cat([mask, torch.ones_like(token)], dim=-1)
        return found

    def _asked(self, targets: Tensor) -> GuidanceRows:
        def full(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full(targets.shape, value, dtype=dtype, device=targets.device)

        return GuidanceRows(
            mode=full(Mode.EQUAL_TO, torch.int64),
            control=full(Control.POSTERIOR, torch.int64),
            target=targets,
            emitted=torch.zeros_like(targets),
            sharpness=full(SHARPNESS, torch.float32),
            tolerance=full(0.0, torch.float32),
            strict=full(False, torch.bool),
            bias=full(0.0, torch.float32),
        )

    def _step(self, ids: Tensor, mask: Tensor, positions: Tensor, caches: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """States [R, H] that the head reads and logits [R, V], after `ids` [R, T]."""
        reader = self.reader
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "use_cache": True}
        caught: list[Tensor] = []
        hook = reader.base.get_output_embeddings().register_forward_pre_hook(lambda _, x: caught.append(x[0]))
        try:
            out = reader.base(**given, past_key_values=caches["base"])
        finally:
            hook.remove()
        caches["base"], hidden = out.past_key_values, caught[0]
        if reader.state_of == "lenvm":
            read = reader.teacher.backbone(**given, past_key_values=caches["lenvm"])
            caches["lenvm"], hidden = read.past_key_values, read.last_hidden_state
        return hidden[:, -1], out.logits[:, -1]
