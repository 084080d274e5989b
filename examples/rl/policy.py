"""A policy-gradient step with the advantage of Appendix C, and what it needs: drawing answers, and grading them.

The estimator is the plain one: a few answers to each prompt, the reward minus the mean of its prompt's rewards as
A_task (one number an answer, as in RLOO and Dr. GRPO), A_length of each token from the LenVM, one update for each batch
drawn. It is a loop of its own because the RL library of the training environment, TRL 0.24 (the newest that
LlamaFactory 0.9.5 allows), does not import its trainers under transformers 5. `lenvm.rl` has TRL's tensor layout: in
a TRL that does, `token_advantages` is what a subclass of GRPOTrainer would add to its batch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "demo"))

import torch
from torch import Tensor
from world import grade

from lenvm import LengthValueModel
from lenvm.rl import combine, length_advantages, state_values


@dataclass(frozen=True)
class Answers:
    """Answers drawn from a policy: G to each of N prompts, those of a prompt together, B = N G.

    Attributes:
        ids: [B, T] int64, prompts padded on the left, completions on the right.
        seen: [B, T] int64, 1 where there is a token.
        mask: [B, T] bool, tokens of the completion, its stop token included.
        finished: [B] bool, whether it ended by itself.
        right: [B] float32, 1 where the final answer is right: the reward.
    """

    ids: Tensor
    seen: Tensor
    mask: Tensor
    finished: Tensor
    right: Tensor

    @property
    def lengths(self) -> Tensor:
        """[B] tokens of each completion."""
        return self.mask.sum(1)


@torch.no_grad()
def draw(
    policy: Any, tokenizer: Any, problems: Sequence[dict[str, Any]], count: int, max_tokens: int, **sampling: Any
) -> Answers:
    """`count` graded answers to each problem.

    Args:
        policy: a causal LM.
        tokenizer: with a chat template.
        problems: rows of the demo's prompt files, with `messages` and `answer`.
        max_tokens: a longer answer is cut there, and wrong.
        **sampling: `top_p`, `top_k`; without them the whole distribution, as a policy gradient needs it.
    """
    texts = [tokenizer.apply_chat_template(p["messages"], tokenize=False, add_generation_prompt=True) for p in problems]
    prompts = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    settings = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0} | sampling
    settings |= {"cache_implementation": "static", "disable_compile": True}  # a growing cache is copied at every token
    ids = policy.generate(**prompts, **settings, num_return_sequences=count, max_new_tokens=max_tokens)
    completion = ids[:, prompts["input_ids"].shape[1] :]
    stops = (completion == tokenizer.eos_token_id).int()
    after = stops.cumsum(1) - stops  # stop tokens before this place
    answer = after == 0
    before = prompts["attention_mask"].repeat_interleave(count, 0)
    texts = tokenizer.batch_decode(completion.where(answer, tokenizer.pad_token_id), skip_special_tokens=True)
    right = [float(grade(text, problems[i // count]["answer"])) for i, text in enumerate(texts)]
    return Answers(
        ids=ids,
        seen=torch.cat([before, answer.long()], 1),
        mask=torch.cat([torch.zeros_like(before, dtype=torch.bool), answer], 1),
        finished=stops.any(1),
        right=torch.tensor(right),
    )


@torch.no_grad()
def token_advantages(answers: Answers, lenvm: LengthValueModel | None, group: int, scale: float, lam: float) -> Tensor:
    """A_task + s A_length, Eq. 26.

    Args:
        answers: B completions, `group` to a prompt.
        lenvm: the value baseline of the length reward; None where scale is 0.
        group: completions of a prompt.
        scale: s; above 0 shortens.
        lam: lambda of Eq. 24.

    Returns:
        [B, T]; what stands off the completions is not meant to be used.
    """
    rewards = answers.right.view(-1, group)
    task = (rewards - rewards.mean(1, keepdim=True)).view(-1, 1)
    if lenvm is None:
        return task.expand(answers.ids.shape)
    # no position ids: rotary positions are relative, so the padding on the left changes nothing
    z = lenvm(input_ids=answers.ids, attention_mask=answers.seen).z
    values, last = state_values(z, answers.mask, answers.finished)
    return combine(task, length_advantages(values, answers.mask, lenvm.lenvm.gamma, lam, last), scale)


def update(policy: Any, optimizer: torch.optim.Optimizer, answers: Answers, advantage: Tensor, rows: int = 16) -> None:
    """One step along the policy gradient, the mean over the batch's tokens of A grad log p.

    Args:
        policy: a causal LM, the one that drew the answers.
        optimizer: of its parameters.
        answers: B completions.
        advantage: [B, T].
        rows: completions of a forward pass; those of like length go together, so that little of it is padding.
    """
    tokens = answers.mask.sum()
    for part in answers.lengths.argsort().split(rows):
        columns = answers.seen[part].any(0)
        ids, seen, mask, weight = (x[part][:, columns] for x in (answers.ids, answers.seen, answers.mask, advantage))
        logits = policy(input_ids=ids, attention_mask=seen).logits[:, :-1]
        chosen = mask[:, 1:]
        log_p = -torch.nn.functional.cross_entropy(logits[chosen], ids[:, 1:][chosen], reduction="none")
        (-(weight[:, 1:][chosen] * log_p).sum() / tokens).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
