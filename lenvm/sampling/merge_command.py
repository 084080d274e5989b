"""`lenvm merge`: the command line of putting shards together."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    parts: Annotated[list[Path], typer.Argument(help="Files of all shards, in any order.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write, and its sidecar.")],
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="Also where shards are not finished.")] = False,
) -> None:
    """Put the shards of one `lenvm sample --shard i/n` together: every row once, in the order of the prompts.

    The result is what one machine would have written; the sampling command without --shard can go on with it.
    """
    from rich.console import Console

    from lenvm.sampling.errors import SamplingError
    from lenvm.sampling.shards import merge as join

    try:
        merged = join(parts, out, allow_missing)
    except SamplingError as error:
        Console(stderr=True).print(str(error), style="red", soft_wrap=True, markup=False)
        raise typer.Exit(1) from None
    missing = f", {merged.missing} are missing" if merged.missing else ""
    Console().print(f"{merged.rows} completions in {out}{missing}.", highlight=False, soft_wrap=True)
