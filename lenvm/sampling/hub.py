"""Files of completions as a data set on the Hugging Face Hub, and back."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lenvm.sampling.errors import SamplingError
from lenvm.sampling.log import read_rows, sidecar_of
from lenvm.sampling.presets import PRESETS
from lenvm.sampling.sources import read_source
from lenvm.sampling.split import PARTS
from lenvm.sampling.statistics import SampleStatistics, summarise

NEEDED = ("prompt_id", "prompt_token_ids", "completion_token_ids", "finish_reason", "model", "sampling")
"""What makes a row a completion that a LenVM can learn from."""
CARD = """---
{front}---

# {title}

Completions of {models} drawn with `lenvm sample`, to train and judge length value models on: a row is one completion,
its prompt and answer as text and as token ids, with `finish_reason`, seed and sampling parameters.

| part | completions | prompts | tokens | length p5/50/95/99 | cut by max_tokens |
|---|---|---|---|---|---|
{rows}
Sampling: {sampling}

```bash
lenvm pull {repository} --out data
```
"""


def prepare_dataset(source: Path, folder: Path, repository: str) -> dict[str, SampleStatistics]:
    """Lay out a data set as it will stand on the Hub.

    Files are linked byte for byte; those with images are written anew, with the images beside them under the names of
    their contents.

    Args:
        source: a JSONL file of completions, which becomes the part `train`, or a folder with train.jsonl and, as
            `lenvm split` writes them, validation.jsonl and test.jsonl.
        folder: where to; it must be missing or empty.
        repository: `owner/name`, for the card.

    Returns:
        part -> its statistics.

    Raises:
        SamplingError: for a folder that is not empty, a missing or damaged source, a row that is no completion, or an
            image that is not there.
    """
    if folder.exists() and any(folder.iterdir()):
        raise SamplingError(f"{folder} is not empty; choose another --prepare.")
    parts = _parts(source)
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, SampleStatistics] = {}
    models: set[str] = set()
    sampling: set[str] = set()
    for name, path in parts.items():
        _lay(path, folder / f"{name}.jsonl", models, sampling)
        found[name] = summarise(read_rows(path))
    (folder / "README.md").write_text(_card(repository, found, models, sampling), encoding="utf-8")
    return found


def _parts(source: Path) -> dict[str, Path]:
    if source.is_file():
        return {"train": source}
    parts = {name: source / f"{name}.jsonl" for name in PARTS if (source / f"{name}.jsonl").is_file()}
    if not parts:
        raise SamplingError(
            f"{source} is neither a file of completions nor a folder with {', '.join(f'{p}.jsonl' for p in PARTS)}."
        )
    return parts


def _lay(path: Path, out: Path, models: set[str], sampling: set[str]) -> None:
    """Check a file of completions row by row, then link it, or write it anew with its images."""
    images = rows = 0
    for where, row in read_source(path):
        missing = [k for k in NEEDED if k not in row] if isinstance(row, dict) else list(NEEDED)
        if missing:
            raise SamplingError(f"{where} lacks {', '.join(missing)}; only files of `lenvm sample` can be pushed.")
        for name in row.get("images") or []:
            images += 1
            if not (path.parent / name).is_file():
                raise SamplingError(f"{where}: the image {name} is not there; put it back.")
        models.add(str(row["model"]))
        sampling.add(json.dumps(row["sampling"], sort_keys=True))
        rows += 1
    if not rows:
        raise SamplingError(f"{path} holds no completion.")
    if images:
        with out.open("w", encoding="utf-8") as lines:
            for _, row in read_source(path):
                row["images"] = [_image(path.parent / name, out.parent) for name in row.get("images") or []]
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    else:
        _link(path, out)
    if sidecar_of(path).is_file():
        _link(sidecar_of(path), sidecar_of(out))


def _image(path: Path, folder: Path) -> str:
    name = f"images/{hashlib.sha256(path.read_bytes()).hexdigest()}{path.suffix}"
    if not (folder / name).exists():
        (folder / "images").mkdir(exist_ok=True)
        _link(path, folder / name)
    return name


def _link(path: Path, out: Path) -> None:
    try:
        os.link(path.resolve(), out)
    except OSError:  # another file system
        shutil.copyfile(path, out)


def _card(repository: str, parts: dict[str, SampleStatistics], models: set[str], sampling: set[str]) -> str:
    import yaml

    front = {
        "tags": ["lenvm", "length-value-model"],
        "configs": [
            {"config_name": "default", "data_files": [{"split": name, "path": f"{name}.jsonl"} for name in parts]}
        ],
    }
    rows = "".join(
        f"| {name} | {s.completions} | {s.prompts} | {s.tokens} | "
        f"{'/'.join(map(str, s.percentiles.values()))} | {s.cut:.1%} |\n"
        for name, s in parts.items()
    )
    return CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=repository.rpartition("/")[2],
        models=" and ".join(f"`{m}`" for m in sorted(models)),
        rows=rows,
        sampling="; ".join(f"`{s}`" for s in sorted(sampling)),
        repository=repository,
    )


def upload(folder: Path, repository: str, private: bool, revision: str | None) -> str:
    """Push a prepared folder; a card that the data set has already stays as it is.

    Returns:
        the address of the commit.

    Raises:
        SamplingError: if the Hub cannot be reached or refuses.
    """
    hub = _hub()
    api = hub.HfApi()
    with _answers(hub, f"{repository} was not pushed"):
        api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        has_card = api.file_exists(repository, "README.md", repo_type="dataset", revision=revision)
        commit = api.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=folder,
            revision=revision,
            commit_message="Completions drawn with lenvm sample",
            ignore_patterns=["README.md"] if has_card else None,
        )
    return str(commit.commit_url)


def download(name: str, out: Path, revision: str | None, include: Sequence[str] | None) -> Path:
    """Pull a data set into a folder; what is there already is not loaded again.

    Args:
        name: `owner/name`, or the name of a preset.
        out: the folder; empty, missing, or of an earlier pull.
        revision: branch, tag or commit; default: the main branch.
        include: patterns of the files that are wanted; default: all.

    Raises:
        SamplingError: for a folder of something else, or if the Hub cannot be reached, refuses or has no such data set.
    """
    if out.exists() and any(out.iterdir()) and not (out / ".cache" / "huggingface").is_dir():
        raise SamplingError(f"{out} holds files that no pull has put there; choose another --out.")
    repository = PRESETS[name].hub if name in PRESETS else name
    hub = _hub()
    with _answers(hub, f"{repository} was not pulled"):
        hub.HfApi().snapshot_download(
            repository, repo_type="dataset", revision=revision, local_dir=out, allow_patterns=include
        )
    if all(p.name == ".cache" for p in out.iterdir()):
        raise SamplingError(f"{repository} has no file that {', '.join(include or ['*'])} names; give other --include.")
    return out


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise SamplingError("push and pull need huggingface_hub; install lenvm[serve] or lenvm[train].") from None
    return huggingface_hub


@contextmanager
def _answers(hub: Any, what: str) -> Iterator[None]:
    """The Hub's own errors, and those of the way there, as one sentence."""
    import httpx

    try:
        yield
    except hub.errors.GatedRepoError:
        raise SamplingError(f"{what}: it is gated; ask for access on its page, then `hf auth login`.") from None
    except hub.errors.RepositoryNotFoundError:
        raise SamplingError(
            f"{what}: the Hub has no such data set, or it is private; check the name, or `hf auth login`."
        ) from None
    except (hub.errors.HFValidationError, hub.errors.HfHubHTTPError, hub.errors.LocalTokenNotFoundError) as error:
        reason = re.sub(r"\s+", " ", str(error)).strip()
        raise SamplingError(f"{what}: {reason}") from None
    except (httpx.HTTPError, OSError) as error:
        reason = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
        raise SamplingError(f"{what}: the Hub cannot be reached ({reason}); try again when it can.") from None
