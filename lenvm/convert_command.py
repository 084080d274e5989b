"""`lenvm convert`: the command line of conversions between checkpoint layouts."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Layout(str, Enum):
    """What is written."""

    lenvm = "lenvm"
    published = "published"


def convert(
    source: Annotated[Path, typer.Argument(help="Directory of the checkpoint to read.")],
    out: Annotated[Path, typer.Argument(help="Directory to write; must not exist or be empty.")],
    to: Annotated[
        Layout, typer.Option(help="lenvm: from the paper's published layout. published: into it.")
    ] = Layout.lenvm,
    gamma: Annotated[
        float | None, typer.Option(help="Discount of a published checkpoint (paper: 0.997 Qwen2.5, 0.9998 Qwen3).")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Model whose completions a published checkpoint was trained on.")
    ] = None,
) -> None:
    """Convert a published checkpoint of the paper (backbone and value_head.safetensors) into a length value model,
    or a length value model into that layout."""
    from rich.console import Console

    from lenvm.convert import from_published, to_published
    from lenvm.format import LenvmFormatError

    console = Console(stderr=True)
    try:
        if to is Layout.published:
            if gamma is not None or base_model is not None:
                raise LenvmFormatError("--gamma and --base-model are for --to lenvm; leave them out.")
            notes = to_published(source, out)
        else:
            if gamma is None or base_model is None:
                raise LenvmFormatError(
                    "a published checkpoint stores neither gamma nor its base model; give --gamma and --base-model."
                )
            from_published(source, out, gamma, base_model)
            notes = ["it has a value head only; evaluate it under `stage: lenvm` to see how well gamma fits."]
    except LenvmFormatError as error:
        console.print(str(error), style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
    for note in notes:
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    Console().print(f"The checkpoint is in {out}.", markup=False, highlight=False, soft_wrap=True)
