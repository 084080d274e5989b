"""Images of prompts: found or unpacked, checked, put in their places in the messages, and sent."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lenvm.sampling.errors import SamplingError

PLACEHOLDER = "<image>"
"""Where an image goes in the text of a message, as in LlamaFactory's formats."""
PART = {"type": "image"}
"""The same as a part of a message."""
LONGEST_PATH = 4095
"""Bytes that a path may have; a longer text is an image written out."""
SIGNATURES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF", b"II*\x00", b"MM\x00*")
"""What files of images begin with."""
SUFFIXES = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}
"""File name suffixes where they are not the format's name in small letters."""


@dataclass(frozen=True)
class PromptImage:
    """One image of a prompt.

    Attributes:
        path: where it lies, absolute.
        sha256: of its bytes, in hexadecimal: what makes it this image, whatever its name.
    """

    path: Path
    sha256: str


def images_folder(out: Path) -> Path:
    """Where images go that a data set holds inside its rows."""
    return out.with_name(f"{out.stem}_images")


def read_images(value: Any, where: str, column: str, media: Path, folder: Path | None) -> tuple[PromptImage, ...]:
    """The images of a row.

    Args:
        value: a path, bytes, base64 (alone or as a data URL), or a `{bytes, path}` of Hugging Face's Image feature;
            one, a list of them, or None.
        where: the row, for messages.
        column: the value's column, for messages.
        media: what paths are relative to.
        folder: where bytes are written to, under their hash.

    Raises:
        SamplingError: for a value that is no image, and an image that is not there or cannot be opened.
    """
    if value is None:
        return ()
    many = value if isinstance(value, list) else [value]
    return tuple(_image(one, where, column, media, folder) for one in many)


def _image(value: Any, where: str, column: str, media: Path, folder: Path | None) -> PromptImage:
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, value)
    data = _inside(name, media) if isinstance(name, str) and not isinstance(data, bytes) else data
    if isinstance(data, bytes):
        if folder is None:
            raise SamplingError(f"{where}: `{column}` holds an image itself; here it must be the path of a file.")
        sha256, suffix = _checked(data, f"{where}: an image in `{column}`")
        return PromptImage(_stored(data, folder / f"{sha256}.{suffix}"), sha256)
    if not isinstance(name, str) or not name:
        raise SamplingError(
            f"{where}: `{column}` must be the path of an image, its bytes, or a list of these, got {_short(value)}; "
            "--columns images=NAME names another column."
        )
    path = Path(os.path.abspath(media / name))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SamplingError(
            f"{where}: the image {_short(name)} cannot be read in {media} ({error.strerror}); "
            "--media-dir names another folder."
        ) from None
    return PromptImage(path, _checked(data, f"{where}: the image {_short(name)}")[0])


def _inside(text: str, media: Path) -> bytes | None:
    """The bytes of an image that is written out as base64, alone or as a data URL; None for a path."""
    url = text.startswith("data:")
    if not url and (len(text) <= LONGEST_PATH and os.path.exists(media / text)):
        return None
    try:
        data = base64.b64decode(text.partition(",")[2] if url else text, validate=True)
    except ValueError:  # a path to nothing, which is reported as such
        return None
    # letters alone could be a name too: what no image begins like is taken for a path
    return data if url or len(text) > LONGEST_PATH or data.startswith(SIGNATURES) else None


def _checked(data: bytes, what: str) -> tuple[str, str]:
    """(SHA-256, file name suffix) of an image that can be opened."""
    try:
        from PIL import Image
    except ImportError:
        raise SamplingError("prompts with images need Pillow; install pillow.") from None
    try:
        with Image.open(io.BytesIO(data)) as image:
            kind = str(image.format)
            image.verify()
    except Exception as error:  # what Pillow raises over a broken file depends on its format
        reason = "its format is unknown" if "cannot identify" in str(error) else str(error)
        raise SamplingError(f"{what} cannot be opened ({reason}); repair it or leave the row out.") from None
    return hashlib.sha256(data).hexdigest(), SUFFIXES.get(kind, kind.lower())


def _stored(data: bytes, path: Path) -> Path:
    """Written whole or not at all, and once: the name says what is in the file."""
    path = Path(os.path.abspath(path))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.part")
        draft.write_bytes(data)
        os.replace(draft, path)
    return path


def place_images(messages: Sequence[dict[str, Any]], count: int | None, where: str) -> list[dict[str, Any]]:
    """The messages with a part for each image: where they show it, or before the first user message's text.

    Args:
        messages: chat messages; a part of type `image` or the text `<image>` is the place of an image.
        count: images of the row; None where it has no column for them, and `<image>` is a text like any other.
        where: the row, for messages.

    Raises:
        SamplingError: unless places and images are as many.
    """
    if count is None:
        parts = [part for m in messages if isinstance(m["content"], list) for part in m["content"]]
        if any(isinstance(part, dict) and part.get("type") in ("image", "image_url") for part in parts):
            raise SamplingError(f"{where} shows an image in its messages but has no `images`; list its path there.")
        return list(messages)
    placed = [{**m, "content": _parts(m["content"], where)} for m in messages]
    places = _places(placed)
    if not places and count:
        first = next((i for i, m in enumerate(placed) if m["role"] == "user"), None)
        if first is None:
            raise SamplingError(f"{where} has {count} image(s) but no message of the user to show them.")
        placed[first]["content"] = [dict(PART) for _ in range(count)] + placed[first]["content"]
    elif places != count:
        raise SamplingError(
            f"{where}: the messages show {places} image(s) and the row has {count}; write one {PLACEHOLDER} for each, "
            "or none to have them before the first question."
        )
    # messages without an image stay as they came, for templates that want a text
    return [new if _places([new]) else old for new, old in zip(placed, messages, strict=True)]


def shown_images(messages: Sequence[dict[str, Any]]) -> int:
    """How many images such messages show."""
    return _places([m for m in messages if isinstance(m["content"], list)])


def _places(messages: Sequence[dict[str, Any]]) -> int:
    return sum(part == PART for m in messages for part in m["content"])


def _parts(content: Any, where: str) -> list[dict[str, Any]]:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    found: list[dict[str, Any]] = []
    for part in parts if isinstance(parts, list) else [parts]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            found.append(dict(PART))
        elif kind == "text" and isinstance(part.get("text"), str):
            for i, text in enumerate(part["text"].split(PLACEHOLDER)):
                found += [dict(PART)] * (i > 0) + [{"type": "text", "text": text}] * bool(text)
        else:
            raise SamplingError(
                f"{where}: beside images the content of a message must be a text, or parts of type text and image, "
                f"got {_short(part)}."
            )
    return found


def openai_messages(messages: Sequence[dict[str, Any]], images: Sequence[PromptImage]) -> list[dict[str, Any]]:
    """The messages with the images inside, in OpenAI's format.

    Raises:
        OSError: if a file is gone.
    """
    urls = iter([data_url(image) for image in images])
    return [
        {
            **m,
            "content": [
                {"type": "image_url", "image_url": {"url": next(urls)}} if part == PART else part
                for part in m["content"]
            ],
        }
        if isinstance(m["content"], list)
        else m
        for m in messages
    ]


def data_url(image: PromptImage) -> str:
    """The file as it is, for a server that need not see this machine's disk.

    Raises:
        OSError: if it is gone.
    """
    from PIL import Image

    data = image.path.read_bytes()
    with Image.open(io.BytesIO(data)) as opened:
        kind = Image.MIME.get(str(opened.format), "image/png")
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def path_from(path: Path, folder: Path) -> str:
    """How a file in `folder` names an image: relative where it lies below, so that both may move, else absolute."""
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def carry_images(row: dict[str, Any], source: Path, out: Path, gathered: dict[Path, Path] | None = None) -> bool:
    """Let a row of `source` name its images rightly in `out`.

    Args:
        row: changed in place.
        source: the file it comes from.
        out: the file it goes to.
        gathered: gets old -> new path of the images in the folder that `lenvm sample` made beside `source`, which are
            then named in the folder beside `out`; without it they stay where they are.

    Returns:
        Whether the row changed.
    """
    images = row.get("images")
    if not isinstance(images, list):
        return False
    carried = []
    for name in images:
        path = source.parent / str(name)
        if not isinstance(name, str) or not path.is_file():  # as the training reads it: beside the data, or as given
            carried.append(name)
            continue
        if gathered is not None and path.parent == images_folder(source):
            gathered[path] = path = images_folder(out) / path.name
        carried.append(path_from(path, out.parent))
    row["images"] = carried
    return bool(carried != images)


def link_images(gathered: dict[Path, Path]) -> None:
    """Give images the places that `carry_images` promised: as links, or copies where there can be none."""
    for old, new in gathered.items():
        if new.exists():
            continue
        new.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(old, new)
        except OSError:
            shutil.copyfile(old, new)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
