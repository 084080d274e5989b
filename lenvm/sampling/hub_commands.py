"""`lenvm push` and `lenvm pull`: data sets on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    samples: Annotated[Path, typer.Argument(help="JSONL file of completions, or a folder as `lenvm split` writes it.")],
    repository: Annotated[str, typer.Argument(help="Data set on the Hub, owner/name; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="If it is made: only for you.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; default: main.")] = None,
    prepare: Annotated[
        Path | None, typer.Option(help="Only lay the data set out in this folder, and push nothing.")
    ] = None,
) -> None:
    """Push completions to a data set on the Hugging Face Hub, with a card that says what they are.

    Every row is checked first. HF_TOKEN or `hf auth login` says who you are.
    """
    import tempfile

    from rich.console import Console

    from lenvm.sampling.errors import SamplingError
    from lenvm.sampling.hub import prepare_dataset, upload

    console = Console(stderr=True)
    try:
        with tempfile.TemporaryDirectory(prefix="lenvm-push-") as scratch:
            folder = prepare or Path(scratch) / "dataset"
            for name, found in prepare_dataset(samples, folder, repository).items():
                console.print(f"{name}: {found}", markup=False, soft_wrap=True, highlight=False)
            if prepare is not None:
                console.print(f"{folder} is what would be pushed.", markup=False, soft_wrap=True)
                return
            console.print(upload(folder, repository, private, revision), markup=False, soft_wrap=True)
    except SamplingError as error:
        console.print(str(error), style="red", soft_wrap=True, markup=False)
        raise typer.Exit(1) from None


def pull(
    repository: Annotated[str, typer.Argument(help="Data set on the Hub, owner/name, or a name that --preset knows.")],
    out: Annotated[Path, typer.Option(help="Folder of the files; an interrupted pull goes on.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: main.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Only files of this pattern, e.g. 'main/*'.")] = None,
) -> None:
    """Pull a data set from the Hugging Face Hub: completions that were pushed, or prompts to sample from."""
    from rich.console import Console

    from lenvm.sampling.errors import SamplingError
    from lenvm.sampling.hub import download

    console = Console(stderr=True)
    try:
        folder = download(repository, out, revision, include)
    except SamplingError as error:
        console.print(str(error), style="red", soft_wrap=True, markup=False)
        raise typer.Exit(1) from None
    files = sum(p.is_file() for p in folder.rglob("*") if ".cache" not in p.relative_to(folder).parts)
    console.print(f"{folder}: {files} files.", markup=False, soft_wrap=True)
