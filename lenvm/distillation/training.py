"""The distillation loop: rounds of reading states and fitting the head to them, resumable to the digit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from lenvm.distillation.errors import DistillationError
from lenvm.distillation.states import Completion, StateReader, States
from lenvm.heads import LookaheadHead
from lenvm.sampling.log import write_json


class Settings(BaseModel):
    """How a head is distilled; a run that is taken up again must have the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    state_of: Literal["base", "lenvm"] = "base"
    rank: int = Field(default=192, ge=1)
    embedding: Literal["table", "projection"] = "table"
    candidates: int = Field(default=16, ge=2)
    states: int = Field(default=16, ge=1, description="Most states of a completion.")
    round_size: int = Field(default=512, ge=1, description="Completions read in a round.")
    passes: int = Field(default=4, ge=1, description="How often a round's states are seen.")
    epochs: float = Field(default=3.0, gt=0, description="How often a completion is read.")
    batch: int = Field(default=256, ge=1, description="States of one step.")
    lr: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.02, ge=0)
    patience: int = Field(default=8, ge=1, description="Rounds without a better held-out KL or Length Score.")
    control_every: int = Field(default=4, ge=0, description="Rounds between two control checks; 0 makes none.")
    control_answers: int = Field(default=64, ge=1, description="Guided answers of a control check.")
    seed: int = 0


@dataclass
class Progress:
    """Where a run stands, after a whole round.

    Attributes:
        rounds: rounds done.
        steps: optimizer steps done.
        best: smallest held-out KL, in nats a candidate, and
        best_round: after which round.
        best_score: largest Length Score of the control checks, and
        best_score_round: after which round.
        history: one entry a round: steps, train and held-out KL, and the Length Score where it was measured.
    """

    rounds: int = 0
    steps: int = 0
    best: float = float("inf")
    best_round: int = 0
    best_score: float = 0.0
    best_score_round: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


Notify = Callable[[Progress, int], None]
"""Called after each round with the total of rounds."""


def distillation_loss(head: LookaheadHead, states: States, source: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sums of KL(teacher || student) and of weights over the candidates of S states.

    Returns:
        (sum_i w_i KL_i in nats, sum_i w_i), float32 scalars; the loss is their quotient.
    """
    student = torch.log_softmax(head(states.hidden, states.token_ids, source), dim=-1)
    kl = (states.log_q.exp() * (states.log_q - student)).sum(-1)
    return (states.weight * kl).sum(), states.weight.sum()


@torch.no_grad()
def held_out_kl(head: LookaheadHead, states: States, source: Tensor | None, batch: int = 1024) -> float:
    """Weighted mean KL in nats a candidate."""
    total, weight = 0.0, 0.0
    for index in torch.arange(len(states), device=states.hidden.device).split(batch):
        kl, w = distillation_loss(head, states.select(index), source)
        total, weight = total + kl.item(), weight + w.item()
    return total / weight


class Distiller:
    """Fits a head to a teacher.

    Args:
        head: the student, on the reader's device.
        reader: makes states of completions.
        completions: what to learn from, in any order.
        held_out: completions of other prompts.
        source: the embedding that a projecting head reads.
        settings: sizes and rates.
        folder: where the state of the run is kept.
        identity: what else must be the same for a run to be taken up (file and model names).
        check: control quality of a head, a Length Score; None without control checks.
    """

    def __init__(self, head: LookaheadHead, reader: StateReader, completions: Sequence[Completion],
                 held_out: Sequence[Completion], source: Tensor | None, settings: Settings, folder: Path,
                 identity: dict[str, Any], check: Callable[[LookaheadHead], float] | None = None) -> None:  # fmt: skip
        self.check = check
        self.head, self.reader, self.source, self.settings = head, reader, source, settings
        self.completions, self.held_out = completions, held_out
        self.folder = folder
        self.identity = {**identity, "settings": settings.model_dump(mode="json")}
        self.progress = Progress()
        self.optimizer = torch.optim.AdamW(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        self.total = max(1, round(settings.epochs * len(completions) / settings.round_size))

    def run(self, save_best: Callable[[], None], notify: Notify) -> Progress:
        """Distil to the end, or to the last round that still helped.

        Args:
            save_best: writes the head as it is; called whenever the held-out KL is the best so far.
            notify: progress. Both are called in the first process only, which fits the head; others read along.

        Raises:
            DistillationError: the folder holds a run with other parameters, or the loss is no number any more.
        """
        s, processes = self.settings, self.reader.processes
        if processes.first:
            self._take_up()
        unseen = self.reader.read(self.held_out, _generator(s.seed, 0, 1))
        if processes.first:
            notify(self.progress, self.total)
        while number := processes.agree(self._next()):
            generator = _generator(s.seed, number, 0)
            states = self.reader.read([self.completions[i] for i in self._members(number)], generator)
            if not processes.first:
                continue
            train_kl = self._fit(states, number, generator)
            kl = held_out_kl(self.head, unseen, self.source)
            if not math.isfinite(kl):
                raise DistillationError(f"the held-out KL is {kl} after round {number}; lower --lr and begin again.")
            self.progress.rounds = number
            entry = {"steps": self.progress.steps, "train_kl": train_kl, "held_out_kl": kl}
            if self.check is not None and (number % s.control_every == 0 or number == self.total):
                entry["length_score"] = score = self.check(self.head)
                if score > self.progress.best_score:
                    self.progress.best_score, self.progress.best_score_round = score, number
            self.progress.history.append(entry)
            if kl < self.progress.best:
                self.progress.best, self.progress.best_round = kl, number
                save_best()
            self._store()
            notify(self.progress, self.total)
        return self.progress

    def _next(self) -> int:
        """Number of the next round, 0 if there is none."""
        going = self.progress.rounds < self.total and self._waited() < self.settings.patience
        return self.progress.rounds + 1 if going else 0

    def _waited(self) -> int:
        """Rounds in which neither the KL nor control got better: one may stand still while the other goes on."""
        return self.progress.rounds - max(self.progress.best_round, self.progress.best_score_round)

    def _fit(self, states: States, number: int, generator: torch.Generator) -> float:
        """Fit the head to a round's states; mean KL of the last pass."""
        s = self.settings
        kl_sum = weight_sum = 0.0
        order = [torch.randperm(len(states), generator=generator) for _ in range(s.passes)]
        batches = [index for one in order for index in one.split(s.batch)]
        for k, index in enumerate(batches):
            done = (number - 1 + k / len(batches)) / self.total
            for group in self.optimizer.param_groups:
                group["lr"] = s.lr * (1.02 - min(1.0, done))
            kl, weight = distillation_loss(self.head, states.select(index.to(self.reader.device)), self.source)
            self.optimizer.zero_grad()
            (kl / weight).backward()
            self.optimizer.step()
            self.progress.steps += 1
            if k >= len(batches) - len(batches) // s.passes:
                kl_sum, weight_sum = kl_sum + kl.item(), weight_sum + weight.item()
        return kl_sum / max(weight_sum, 1e-9)

    def _members(self, number: int) -> list[int]:
        """Completions of a round: the next ones of an order that is drawn anew for each epoch."""
        size, count = self.settings.round_size, len(self.completions)
        wanted = range((number - 1) * size, number * size)
        orders = {
            e: torch.randperm(count, generator=_generator(self.settings.seed, e, 2)).tolist()
            for e in {i // count for i in wanted}
        }
        return [orders[i // count][i % count] for i in wanted]

    # ----- taking up an interrupted run -----------------------------------------------------------------------------

    def _store(self) -> None:
        from safetensors.torch import save_file

        tensors = {f"head.{k}": v.detach().contiguous() for k, v in self.head.state_dict().items()}
        for name, parameter in self.head.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"adam.{name}.{key}"] = torch.as_tensor(value).detach().contiguous()
        self.folder.mkdir(parents=True, exist_ok=True)
        # the weights name their round, so that a crash between both files cannot pair one with the other's
        fresh = self.folder / f"round-{self.progress.rounds:05d}.safetensors"
        save_file({k: v.cpu() for k, v in tensors.items()}, fresh)
        write_json(self.folder / "progress.json", {"identity": self.identity, "progress": vars(self.progress)})
        for old in self.folder.glob("round-*.safetensors"):
            if old != fresh:
                old.unlink()

    def _take_up(self) -> None:
        from safetensors.torch import load_file

        path = self.folder / "progress.json"
        if not path.is_file():
            return
        stored = json.loads(path.read_text(encoding="utf-8"))
        before = {**stored["identity"], **stored["identity"]["settings"]}
        now = {**self.identity, **self.identity["settings"]}
        differing = [k for k in now if k != "settings" and before.get(k) != now[k]]
        if differing:
            changes = ", ".join(f"{k}: {before.get(k)!r} then, {now[k]!r} now" for k in differing)
            raise DistillationError(
                f"{self.folder} holds a run with other parameters ({changes}); give the same ones to go on, remove it, "
                "or choose another --out."
            )
        self.progress = Progress(**stored["progress"])
        tensors = load_file(self.folder / f"round-{self.progress.rounds:05d}.safetensors")
        self.head.load_state_dict({k.removeprefix("head."): v for k, v in tensors.items() if k.startswith("head.")})
        for name, parameter in self.head.named_parameters():
            prefix = f"adam.{name}."
            moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            self.optimizer.state[parameter] = {
                k: v if k == "step" else v.to(parameter.device) for k, v in moments.items()
            }


def _generator(*parts: int) -> torch.Generator:
    """A stream of its own for each purpose of each round, so that a resumed run draws what the whole run would."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % (2**62)
    return torch.Generator().manual_seed(seed)
