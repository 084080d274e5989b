"""`lenvm split`: the command line of the split by prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def split(
    samples: Annotated[Path, typer.Argument(help="JSONL file of completions, as `lenvm sample` writes it.")],
    out: Annotated[Path, typer.Option(help="Directory for train.jsonl, validation.jsonl and test.jsonl.")],
    validation: Annotated[float, typer.Option(help="Share of the prompts for validation.")] = 0.1,
    test: Annotated[float, typer.Option(help="Share of the prompts for a test set; 0 writes none.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another split.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Split samples into training and validation sets that share no prompt.

    A prompt's place is a hash of the prompt: more samples or prompts later move none of the old ones.
    """
    from rich.console import Console
    from rich.table import Table

    from lenvm.sampling.errors import SamplingError
    from lenvm.sampling.split import split_samples

    try:
        parts = split_samples(samples, out, validation, test, seed, force)
    except SamplingError as error:
        Console(stderr=True).print(str(error), style="red", soft_wrap=True, markup=False)
        raise typer.Exit(1) from None
    table = Table("part", "prompts", "rows", "file")
    for name, part in parts.items():
        table.add_row(name, str(part.prompts), str(part.rows), str(part.path))
    Console().print(table)
