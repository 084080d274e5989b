"""`lenvm distill`: the command line of distillation."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from lenvm.distillation.training import Progress


class StateOfName(str, Enum):
    """Whose hidden state the head reads."""

    base = "base"
    lenvm = "lenvm"


class EmbeddingName(str, Enum):
    """Where the head's token vectors come from."""

    table = "table"
    projection = "projection"


def distill(
    base: Annotated[Path, typer.Option(help="Directory of the base model that drew the samples.")],
    lenvm: Annotated[Path, typer.Option(help="Directory of the teacher: a length value model with a length head.")],
    samples: Annotated[Path, typer.Option(help="Completions to learn from, as `lenvm sample` writes them.")],
    out: Annotated[Path, typer.Option(help="Directory of the new checkpoint; an interrupted run goes on.")],
    validation: Annotated[
        Path | None, typer.Option(help="Completions of other prompts; default: one prompt in 20 of the samples.")
    ] = None,
    state_of: Annotated[
        StateOfName, typer.Option(help="base: an attached head, no second model. lenvm: one more head on the LenVM.")
    ] = StateOfName.base,
    rank: Annotated[int, typer.Option(min=1, help="Width r of the head.")] = 192,
    embedding: Annotated[
        EmbeddingName, typer.Option(help="Token vectors: an own table, or a projection of the model's embedding.")
    ] = EmbeddingName.table,
    candidates: Annotated[int, typer.Option(min=2, help="Most candidates of a state.")] = 16,
    states: Annotated[int, typer.Option(min=1, help="Most states of a completion.")] = 16,
    epochs: Annotated[float, typer.Option(min=0.01, help="How often a completion is read.")] = 3.0,
    round_size: Annotated[int, typer.Option(min=1, help="Completions read at a time.")] = 512,
    passes: Annotated[int, typer.Option(min=1, help="How often what was read is seen.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="States of one step.")] = 256,
    lr: Annotated[float, typer.Option(min=1e-8, help="Learning rate; falls linearly.")] = 2e-3,
    patience: Annotated[int, typer.Option(min=1, help="Rounds without a better held-out KL or Length Score.")] = 8,
    control_every: Annotated[
        int, typer.Option(min=0, help="Rounds between two checks of guided answers; 0 makes none.")
    ] = 4,
    seed: Annotated[int, typer.Option(help="Of the states, the order and the first weights.")] = 0,
) -> None:
    """Distil a lookahead head: the length distribution after every candidate, from the state before it.

    The teacher reads each candidate behind its prefix; the head learns to say the same without reading it.
    """
    from rich.console import Console

    from lenvm.distillation.errors import DistillationError
    from lenvm.distillation.processes import processes
    from lenvm.distillation.run import Paths, distil
    from lenvm.distillation.training import Settings
    from lenvm.format import LenvmFormatError

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    console = Console(stderr=True, quiet=several and os.environ["RANK"] != "0")  # one voice
    settings = Settings(
        state_of=state_of.value,
        rank=rank,
        embedding=embedding.value,
        candidates=candidates,
        states=states,
        round_size=round_size,
        passes=passes,
        epochs=epochs,
        batch=batch,
        lr=lr,
        patience=patience,
        control_every=control_every,
        seed=seed,
    )
    try:
        with processes() as here, _progress(console) as notify:
            progress = distil(Paths(base, lenvm, samples, out, validation), settings, notify, here)
    except (DistillationError, LenvmFormatError) as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command continues {out}.", markup=False, soft_wrap=True)
        raise typer.Exit(130) from None
    console.print(
        f"{out}: held-out KL {progress.best:.4f} nats after round {progress.best_round} of {progress.rounds}.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[Progress, int], None]]:
    """A bar with both KLs on a terminal; elsewhere a line a round."""
    if not console.is_terminal:

        def line(progress: Progress, total: int) -> None:
            if progress.history:
                console.print(f"  round {progress.rounds} of {total}: {_shown(progress)}", highlight=False)

        yield line
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("distilling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[shown]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console) as bars:
        task = bars.add_task("distilling", total=None, shown="")

        def update(progress: Progress, total: int) -> None:
            bars.update(task, completed=progress.rounds, total=total, shown=_shown(progress))

        yield update


def _shown(progress: Progress) -> str:
    if not progress.history:
        return ""
    last = progress.history[-1]
    score = f", Length Score {last['length_score']:.1f}" if "length_score" in last else ""
    return f"KL {last['train_kl']:.4f}, held out {last['held_out_kl']:.4f} (best {progress.best:.4f}){score}"
