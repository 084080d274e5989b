"""`lenvm sample`: the command line of sampling."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lenvm.sampling import defaults

if TYPE_CHECKING:
    from rich.console import Console

    from lenvm.sampling.prompts import Reading
    from lenvm.sampling.shards import Shard


class ApiName(str, Enum):
    """How the server is asked."""

    openai = "openai"
    sglang = "sglang"


def sample(
    prompts: Annotated[
        Path,
        typer.Argument(
            help="JSONL or parquet file, or dataset directory: `id`, `messages`, `images`; the rest is kept as `meta`."
        ),
    ],
    out: Annotated[Path, typer.Option(help="JSONL file of completions; continued if it is there.")],
    server: Annotated[
        list[str], typer.Option(help="Address of the server, with or without /v1; several share the work.")
    ] = ["http://127.0.0.1:30000"],  # noqa: B006 (typer copies it)
    api: Annotated[
        ApiName, typer.Option(help="sglang: /generate, token ids in and out. openai: /v1/chat/completions.")
    ] = ApiName.sglang,
    n: Annotated[int, typer.Option("--n", min=1, help="Completions a prompt.")] = defaults.N,
    temperature: Annotated[float, typer.Option(min=0.0)] = defaults.TEMPERATURE,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = defaults.TOP_P,
    top_k: Annotated[int, typer.Option(min=-1, help="-1 is off.")] = defaults.TOP_K,
    min_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = defaults.MIN_P,
    max_tokens: Annotated[int, typer.Option(min=1, help="A completion that reaches it is cut.")] = defaults.MAX_TOKENS,
    seed: Annotated[int, typer.Option(min=0, help="Every completion's own seed derives from it.")] = defaults.SEED,
    concurrency: Annotated[int, typer.Option(min=1, help="Completions in flight.")] = defaults.CONCURRENCY,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many prompts.")] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="Columns, instruction and split of a known data set: gsm8k, math, deepmath, wildchat, "
            "opencodereasoning-2, r1-onevision; drops prompts that occurred before."
        ),
    ] = None,
    columns: Annotated[
        str,
        typer.Option(
            help="Other names of columns, e.g. prompt=question,images=image (id, messages, prompt, system, images)."
        ),
    ] = "",
    split: Annotated[str | None, typer.Option(help="Which split of a dataset directory.")] = None,
    instruction: Annotated[
        str | None, typer.Option(help="Put before each question, and an empty line; empty for none.")
    ] = None,
    meta: Annotated[
        str | None, typer.Option(help="Columns that travel to the samples, e.g. answer,level; default: all others.")
    ] = None,
    media_dir: Annotated[
        Path | None, typer.Option(help="Folder that paths of images are relative to; default: the prompts' own.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw the lengths into this file (png, svg, pdf); needs lenvm[eval].")
    ] = None,
    first_turn: Annotated[
        bool, typer.Option("--first-turn", help="Keep conversations up to the first user message.")
    ] = False,
    deduplicate: Annotated[bool, typer.Option("--deduplicate", help="Leave out prompts that occurred before.")] = False,
    shard: Annotated[
        str | None, typer.Option(help="Draw part i of n, e.g. 2/4; `lenvm merge` puts the parts together.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model name; default: the server's first.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Tokenizer directory; default with sglang: the one the server names.")
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="Arguments of the chat template as JSON, e.g. '{\"enable_thinking\": false}'.")
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="After 429, 5xx and connection errors.")] = defaults.RETRIES,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds one request may take.")] = defaults.TIMEOUT,
) -> None:
    """Draw n completions of each prompt from a running server, with their exact token ids.

    An interrupted run goes on where it was. OPENAI_API_KEY is sent if it is set.
    """
    from pydantic import ValidationError
    from rich.console import Console

    from lenvm.sampling.errors import SamplingError
    from lenvm.sampling.picture import check_picture, draw_lengths
    from lenvm.sampling.settings import SamplingSettings
    from lenvm.sampling.shards import Shard

    console = Console(stderr=True)
    try:
        settings = SamplingSettings(
            n=n,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            max_tokens=max_tokens,
            seed=seed,
            concurrency=concurrency,
            retries=retries,
            timeout=timeout,
        )
        reading = _reading(prompts, out, preset, columns, instruction, first_turn, deduplicate, split, meta, media_dir)
        part = None if shard is None else Shard.parse(shard)
        if picture is not None:
            check_picture(picture)
        failed = run(
            prompts,
            out,
            server,
            api.value,
            settings,
            console,
            limit,
            model,
            tokenizer,
            _template(template),
            reading,
            part,
        )
        if picture is not None:
            draw_lengths(out, picture)
            console.print(f"{picture}: the lengths, drawn.", markup=False, soft_wrap=True, highlight=False)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        console.print(f"[red]{option}: {first['msg']}, got {first['input']}.[/red]", soft_wrap=True)
        raise typer.Exit(2) from None
    except SamplingError as error:
        console.print(str(error), style="red", soft_wrap=True, markup=False)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.print(f"interrupted; the same command continues {out}.", soft_wrap=True, markup=False)
        raise typer.Exit(130) from None
    if failed:
        raise typer.Exit(1)


def run(
    prompts_file: Path,
    out: Path,
    url: str | Sequence[str],
    api: str,
    settings: Any,
    console: Console,
    limit: int | None = None,
    model: str | None = None,
    tokenizer: Path | None = None,
    template: dict[str, Any] | None = None,
    reading: Reading | None = None,
    shard: Shard | None = None,
) -> dict[str, str]:
    """Sample with a progress bar and a line of statistics.

    Returns:
        prompt id -> reason for the prompts that failed; they are printed as well.

    Raises:
        SamplingError: if nothing can be drawn.
    """
    from lenvm.sampling.log import read_rows
    from lenvm.sampling.pool import ServerPool
    from lenvm.sampling.prompts import read_prompts
    from lenvm.sampling.run import sample as draw
    from lenvm.sampling.servers import OpenAIServer, SglangServer
    from lenvm.sampling.statistics import summarise

    prompts = read_prompts(prompts_file, limit, reading)
    kind = SglangServer if api == "sglang" else OpenAIServer
    urls = [url] if isinstance(url, str) else url
    pool = ServerPool([kind(one, settings, tokenizer, model, template) for one in urls])
    began = time.perf_counter()
    with progress_bar(console) as notify:
        result = draw(prompts, out, pool, settings, notify, shard)
    seconds = time.perf_counter() - began
    if result.repaired:
        console.print(f"{out}: a torn last line of {result.repaired} bytes was cut off.", markup=False, soft_wrap=True)
    for note in result.notes:
        console.print(f"note: {note}", style="yellow", markup=False, soft_wrap=True)
    for prompt_id, reason in result.failed.items():
        console.print(f"failed: prompt {prompt_id}: {reason}", style="red", markup=False, soft_wrap=True)
    if result.drawn or result.kept:
        console.print(f"{out}: {summarise(read_rows(out))}", markup=False, soft_wrap=True, highlight=False)
    console.print(
        f"{result.drawn} drawn in {seconds:.1f} s, {result.kept} were there, {len(result.failed)} prompts failed.",
        markup=False,
        highlight=False,
    )
    return result.failed


@contextmanager
def progress_bar(console: Console) -> Iterator[Callable[[int, int, int], None]]:
    """Completions, tokens/s and time left on a terminal; elsewhere a line every 30 seconds."""
    began = time.perf_counter()

    def speed(tokens: int) -> float:
        return tokens / max(1e-9, time.perf_counter() - began)

    if not console.is_terminal:
        last = began

        def line(done: int, total: int, tokens: int) -> None:
            nonlocal last
            now = time.perf_counter()
            if now - last >= 30.0:
                last = now
                console.print(f"  {done} of {total} completions, {speed(tokens):.0f} tokens/s", highlight=False)

        yield line
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("sampling"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]:.0f} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("sampling", total=None, speed=0.0)

        def update(done: int, total: int, tokens: int) -> None:
            bars.update(task, completed=done, total=total, speed=speed(tokens))

        yield update


def _reading(
    prompts: Path,
    out: Path,
    preset: str | None,
    columns: str,
    instruction: str | None,
    first_turn: bool,
    deduplicate: bool,
    split: str | None,
    meta: str | None,
    media: Path | None,
) -> Reading:
    """How the rows become prompts: as the preset says, and where an option says otherwise, as that says."""
    from lenvm.sampling.errors import SamplingError
    from lenvm.sampling.images import images_folder
    from lenvm.sampling.presets import Preset
    from lenvm.sampling.presets import preset as known
    from lenvm.sampling.prompts import Reading
    from lenvm.sampling.sources import split_names

    if split is not None and prompts.is_file():
        raise SamplingError(f"--split chooses among the files of a directory, and {prompts} is a file; omit it.")
    usual = Preset("", {}, "", "") if preset is None else known(preset)
    return Reading(
        columns={**usual.columns, **_columns(columns)},
        instruction=usual.instruction if instruction is None else instruction,
        first_turn=first_turn or usual.first_turn,
        # the sets repeat questions, and a prompt must not be in two parts of a split
        deduplicate=deduplicate or preset is not None,
        split=split or (usual.split if usual.split in split_names(prompts, usual.split) else None),
        meta=usual.meta if meta is None else [name.strip() for name in meta.split(",") if name.strip()],
        absent=usual.absent,
        media=media,
        images=images_folder(out),
    )


def _columns(text: str) -> dict[str, str]:
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if any(not equals or not name.strip() or not column.strip() for name, equals, column in pairs):
        raise typer.BadParameter(f"--columns takes name=column,name=column, got {text!r}.")
    return {name.strip(): column.strip() for name, _, column in pairs}


def _template(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise typer.BadParameter(f"--template must be a JSON object, got {text!r}.")
    return value
