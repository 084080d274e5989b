"""`lenvm distill` from directories to directories: load, distil, write the checkpoint."""

from __future__ import annotations

import copy
import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenvm.distillation.control import ControlCheck
from lenvm.distillation.errors import DistillationError
from lenvm.distillation.processes import Processes, usual_device
from lenvm.distillation.states import Completion, StateReader, check_teacher, read_completions
from lenvm.distillation.training import Distiller, Notify, Progress, Settings
from lenvm.format import LenvmConfig, LookaheadShape

RUN_FOLDER = "distill"
HELD_OUT_SHARE = 20
"""One prompt in so many is held out where no validation file is given."""
MOST_HELD_OUT = 256
"""Completions that the held-out KL is measured on."""


@dataclass(frozen=True)
class Paths:
    """What is read and written; `validation` may be None."""

    base: Path
    lenvm: Path
    samples: Path
    out: Path
    validation: Path | None = None


def distil(paths: Paths, settings: Settings, notify: Notify, processes: Processes | None = None) -> Progress:
    """Distil a lookahead head and write it to `paths.out`: an attached checkpoint, or the LenVM with one more head.

    Every process of a launcher calls it; the first one writes. The directory holds the best head so far at any time;
    `paths.out`/distill is what an interrupted run goes on from.

    Raises:
        DistillationError, LenvmFormatError: something does not fit; the message says what.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from lenvm.heads import LookaheadHead
    from lenvm.modeling import LengthValueModel

    logging.disable_progress_bar()
    completions, sampled = read_completions(paths.samples)
    if paths.validation is None:
        completions, held_out = split_by_prompt(completions)
    else:
        held_out = read_completions(paths.validation)[0]
        common = {c.prompt_id for c in completions} & {c.prompt_id for c in held_out}
        if common:
            raise DistillationError(
                f"{paths.samples} and {paths.validation} share {len(common)} prompts, for example "
                f"{min(common)!r}; hold out prompts that are not learnt from (`lenvm split`)."
            )
    held_out = spread(held_out, MOST_HELD_OUT)
    processes = processes or Processes(device=usual_device())
    place = processes.device
    teacher = LengthValueModel.from_pretrained(paths.lenvm, dtype="auto", attn_implementation="sdpa").to(place).eval()
    check_teacher(teacher, paths.lenvm)
    base = AutoModelForCausalLM.from_pretrained(paths.base, dtype="auto").to(place).eval()
    stops = stop_tokens(base, AutoTokenizer.from_pretrained(paths.base))
    reader = StateReader(
        base, teacher, sampled, stops, settings.candidates, settings.states, settings.state_of, processes
    )
    owner = base if settings.state_of == "base" else teacher
    source = owner.get_input_embeddings().weight.detach()
    hidden_size = owner.config.get_text_config().hidden_size
    torch.manual_seed(settings.seed)
    head = LookaheadHead(
        hidden_size,
        settings.rank,
        len(teacher.bins),
        tokens=len(source) if settings.embedding == "table" else None,
        source_size=source.shape[1],
    )
    head.reset_parameters()
    head.start_from(source.cpu())
    head.to(place)
    block = _block(paths, settings, teacher.lenvm, owner, hidden_size)

    def save_best() -> None:
        if settings.state_of == "base":
            from lenvm.attached import save_attached

            save_attached(paths.out, block, head, paths.base)
        else:
            _save_beside(paths, block, teacher, head)

    check = None
    if settings.control_every and processes.first:
        ended = [c for c in held_out if c.completion[-1] in stops]  # a cut completion has no length to ask for
        projected = None if settings.embedding == "table" else source
        check = ControlCheck(reader, spread(ended, settings.control_answers), block, projected) if ended else None
    identity = {name: str(getattr(paths, name)) for name in ("base", "lenvm", "samples", "validation")}
    identity["samples_hash"] = _hash(paths.samples)
    distiller = Distiller(
        head, reader, completions, held_out, None if settings.embedding == "table" else source, settings,
        paths.out / RUN_FOLDER, identity, check,
    )  # fmt: skip
    return distiller.run(save_best, notify)


def split_by_prompt(completions: list[Completion]) -> tuple[list[Completion], list[Completion]]:
    """Hold out one prompt in `HELD_OUT_SHARE`, by a hash of its id.

    Raises:
        DistillationError: too few prompts to hold any out.
    """

    def number(prompt_id: str) -> int:
        return int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:4], "big")

    prompts = sorted({c.prompt_id for c in completions}, key=number)
    if len(prompts) < 2:
        raise DistillationError("the samples have one prompt only; give more, or a file of others in --validation.")
    out = set(prompts[: max(1, len(prompts) // HELD_OUT_SHARE)])
    return [c for c in completions if c.prompt_id not in out], [c for c in completions if c.prompt_id in out]


def spread(completions: list[Completion], most: int) -> list[Completion]:
    """At most `most` of them, evenly over the list."""
    if len(completions) <= most:
        return completions
    return [completions[i * len(completions) // most] for i in range(most)]


def stop_tokens(base: Any, tokenizer: Any) -> list[int]:
    """Ids that end an answer: those of the base's generation config and config, and the tokenizer's own."""
    found: set[int] = set()
    for where in (base.generation_config, base.config, tokenizer):
        ids = getattr(where, "eos_token_id", None)
        found.update(i for i in (ids if isinstance(ids, list) else [ids]) if i is not None)
    stops = sorted(found)
    if not stops:
        raise DistillationError("neither the base model nor its tokenizer names a stop token (eos_token_id).")
    return stops


def _block(paths: Paths, settings: Settings, teacher: LenvmConfig, owner: Any, hidden_size: int) -> LenvmConfig:
    """The `lenvm` block of the new checkpoint; `owner` is the model whose states the head reads."""
    from lenvm.attached import base_hash, read_tensor

    source = None
    if settings.embedding == "projection":
        weight = owner.get_input_embeddings().weight
        source = next(name for name, value in owner.named_parameters() if value is weight)
        read_tensor(paths.base if settings.state_of == "base" else paths.lenvm, source)  # refused here, not when served
    shape = LookaheadShape(rank=settings.rank, embedding=settings.embedding, source=source)
    if settings.state_of == "lenvm":
        return LenvmConfig(
            gamma=teacher.gamma,
            heads=("value", "length", "lookahead"),
            bins=teacher.bins,
            base_model=teacher.base_model,
            spread=teacher.spread,
            lookahead=shape,
        )
    return LenvmConfig(
        gamma=teacher.gamma,
        heads=("lookahead",),
        bins=teacher.bins,
        base_model=teacher.base_model or str(paths.base),
        lookahead=shape,
        attached=True,
        base_hash=base_hash(paths.base),
        hidden_size=hidden_size,
    )


def _save_beside(paths: Paths, block: LenvmConfig, teacher: Any, head: Any) -> None:
    """Write the LenVM with the head beside its others."""
    from lenvm.convert import COPIED

    teacher.lookahead_head = copy.deepcopy(head).to(teacher.dtype)
    teacher.lenvm, teacher.config.lenvm = block, block.to_json()
    teacher.save_pretrained(paths.out)
    teacher.lookahead_head = None
    for pattern in COPIED:
        for file in paths.lenvm.glob(pattern):
            shutil.copyfile(file, paths.out / file.name)


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]
