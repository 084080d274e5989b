"""Prompts with images: where they come from, where they are shown, what is asked, and what the rows say."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoTokenizer
from typer.testing import CliRunner

from lenvm.cli import main
from lenvm.sampling.errors import SamplingError
from lenvm.sampling.images import images_folder
from lenvm.sampling.prompts import Prompt, Reading, prompts_hash, read_prompts
from lenvm.sampling.run import SamplingResult, sample
from lenvm.sampling.servers import OpenAIServer, SglangServer
from lenvm.sampling.settings import SamplingSettings
from lenvm.sampling.split import split_samples
from lenvm_lf.rows import parse_row
from tests.sampling.conftest import Scripted

SHOWN = {"type": "image"}
TEMPLATE = (
    "{% for m in messages %}<start>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% else %}[picture]{% endif %}{% endfor %}"
    "{% endif %}<stop>{% endfor %}{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def encoded(colour: int, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (12, 8), (colour, 0, 0)).save(out, kind)
    return out.getvalue()


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, and a file that is none."""
    (tmp_path / "pics").mkdir()
    for i in range(3):
        (tmp_path / "pics" / f"{i}.png").write_bytes(encoded(i))
    (tmp_path / "pics" / "broken.png").write_bytes(encoded(0)[:-20])
    (tmp_path / "pics" / "text.png").write_text("not a picture")
    return tmp_path


@pytest.fixture(scope="module")
def seeing_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer with a chat template that shows images."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    tokenizer.chat_template = TEMPLATE
    directory = tmp_path_factory.mktemp("seeing")
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def prompts_file(folder: Path) -> Path:
    """Two prompts with images, one without a place for them, and one of text."""
    return write(
        folder / "prompts.jsonl",
        {"id": "a", "messages": user("What is <image>?"), "images": ["pics/0.png"], "kind": "test"},
        {"id": "b", "messages": user("Compare."), "images": ["pics/1.png", str(folder / "pics" / "2.png")]},
        {"id": "c", "messages": user("Just <image> words.")},
    )


def draw(
    prompts: Path | list[Prompt], out: Path, url: str, tokenizer: Path | None, api: str = "sglang"
) -> SamplingResult:
    settings = SamplingSettings(n=3, max_tokens=20, concurrency=4, retries=0, seed=7)
    kind = SglangServer if api == "sglang" else OpenAIServer
    found = read_prompts(prompts) if isinstance(prompts, Path) else prompts
    return sample(found, out, kind(url, settings, tokenizer), settings)


@pytest.mark.parametrize(
    ("content", "count", "placed"),
    [
        ("What is <image>?", 1, [words("What is "), SHOWN, words("?")]),
        ("<image><image>\nCompare.", 2, [SHOWN, SHOWN, words("\nCompare.")]),
        ("No place.", 2, [SHOWN, SHOWN, words("No place.")]),
        ([SHOWN, words("A part.")], 1, [SHOWN, words("A part.")]),
        ([{**SHOWN, "text": None}, {**words("<image>"), "index": None}], 2, [SHOWN, SHOWN]),
        ([words("No place.")], 1, [SHOWN, words("No place.")]),
    ],
)
def test_where_images_go(content: Any, count: int, placed: list[dict[str, Any]], folder: Path):
    images = ["pics/0.png"] * count
    path = write(folder / "q.jsonl", {"id": 1, "messages": user(content), "images": images})
    (prompt,) = read_prompts(path)
    assert prompt.messages == user(placed)
    assert len(prompt.images) == count
    assert parse_row({"messages": prompt.messages, "completion": "x", "images": images})["_prompt"]


def test_images_come_before_the_first_users_text_and_other_messages_stay(folder: Path):
    chat = [{"role": "system", "content": "Be kind."}, *user("one"), {"role": "assistant", "content": "1"}, *user("2")]
    path = write(folder / "q.jsonl", {"id": 1, "messages": chat, "images": "pics/0.png"})
    (prompt,) = read_prompts(path)
    assert [m["content"] for m in prompt.messages] == ["Be kind.", [SHOWN, words("one")], "1", "2"]


def test_the_first_turn_keeps_its_own_images(folder: Path):
    chat = [*user("<image> one"), {"role": "assistant", "content": "1"}, *user("<image> two")]
    path = write(folder / "q.jsonl", {"id": 1, "messages": chat, "images": ["pics/0.png", "pics/1.png"]})
    (prompt,) = read_prompts(path, reading=Reading(first_turn=True))
    assert prompt.messages == user([SHOWN, words(" one")])
    assert [image.path.name for image in prompt.images] == ["0.png"]


def test_paths_are_relative_to_the_prompts_or_the_media_folder(folder: Path):
    questions = {"uuid": ["x", "y"], "q": ["What?", "Why?"], "image": ["pics/0.png", None]}
    (folder / "set").mkdir()
    pq.write_table(pa.table(questions), folder / "set" / "q.parquet")
    columns = {"id": "uuid", "prompt": "q", "images": "image"}
    prompts = read_prompts(folder / "set", reading=Reading(columns, "Think.", media=folder))
    assert prompts[0].messages == user([SHOWN, words("Think.\n\nWhat?")])
    assert prompts[0].images[0].path == folder / "pics" / "0.png"
    assert prompts[0].images[0].sha256 == hashlib.sha256(encoded(0)).hexdigest()
    assert (prompts[1].messages, prompts[1].images, prompts[1].meta) == (user("Think.\n\nWhy?"), (), {})
    with pytest.raises(SamplingError, match=r"q\.parquet, row 1: the image 'pics/0\.png' cannot be read .*--media-dir"):
        read_prompts(folder / "set", reading=Reading(columns))
    with pytest.raises(SamplingError, match=r"--media-dir must be the folder"):
        Reading(columns, media=folder / "nowhere")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"images": ["gone.png"]}, "the image 'gone.png' cannot be read in .*No such file"),
        ({"images": ["pics"]}, "the image 'pics' cannot be read in .*directory"),
        ({"images": ["pics/text.png"]}, "'pics/text.png' cannot be opened .its format is unknown"),
        ({"images": ["pics/broken.png"]}, "'pics/broken.png' cannot be opened"),
        ({"images": 3}, "`images` must be the path of an image, .* got 3"),
        ({"images": [""]}, "`images` must be the path of an image, .* got ''"),
        ({"images": ["pics/0.png"], "content": "<image> <image>"}, "show 2 image.s. and the row has 1"),
        ({"images": ["pics/0.png"] * 2, "content": "<image>"}, "show 1 image.s. and the row has 2"),
        ({"images": [], "content": "<image>"}, "show 1 image.s. and the row has 0"),
        ({"content": [SHOWN, words("x")]}, "shows an image in its messages but has no `images`"),
        ({"images": ["pics/0.png"], "content": [{"type": "audio"}]}, "parts of type text and image, got .*audio"),
        ({"images": ["pics/0.png"], "role": "system"}, "no message of the user"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_row(row: dict[str, Any], message: str, folder: Path):
    messages = [{"role": row.pop("role", "user"), "content": row.pop("content", "hi")}]
    path = write(folder / "q.jsonl", {"id": 0, "messages": user("fine")}, {"id": 1, "messages": messages, **row})
    with pytest.raises(SamplingError, match=rf"q\.jsonl, line 2.*{message}"):
        read_prompts(path)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_images_inside_a_data_set_are_written_once_under_their_hash(kind: str, tmp_path: Path):
    red, jpeg = encoded(9), encoded(9, "JPEG")
    inside = [{"bytes": red, "path": "a.png"}, {"bytes": red, "path": None}, {"bytes": jpeg, "path": "a.png"}]
    table = pa.table({"id": ["a", "b", "c"], "q": ["x", "x", "x"], "image": inside})
    folder = tmp_path / "set"
    folder.mkdir()
    if kind == "parquet":
        pq.write_table(table, folder / "q.parquet")
    else:
        with pa.OSFile(str(folder / "data-0.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    columns = {"prompt": "q", "images": "image"}
    with pytest.raises(SamplingError, match=r"type bytes cannot travel .*--columns images=NAME"):
        read_prompts(folder, reading=Reading({"prompt": "q"}))
    with pytest.raises(SamplingError, match=r"row 1: `image` holds an image itself; here it must be the path"):
        read_prompts(folder, reading=Reading(columns))
    out = images_folder(tmp_path / "train.jsonl")
    prompts = read_prompts(folder, reading=Reading(columns, images=out))
    names = [f"{hashlib.sha256(data).hexdigest()}.{suffix}" for data, suffix in ((red, "png"), (jpeg, "jpg"))]
    assert out == tmp_path / "train_images"
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert [p.images[0].path.name for p in prompts] == [names[0], names[0], names[1]]
    assert (out / names[1]).read_bytes() == jpeg
    kept = read_prompts(folder, reading=Reading(columns, deduplicate=True, images=out))
    assert [p.id for p in kept] == ["a", "c"]


def test_a_prompt_is_its_text_and_what_its_images_show(folder: Path):
    (folder / "pics" / "copy.png").write_bytes(encoded(0))

    def prompts(*names: str) -> list[Prompt]:
        rows = [{"id": i, "messages": user("What?"), "images": [f"pics/{n}.png"]} for i, n in enumerate(names)]
        return read_prompts(write(folder / "q.jsonl", *rows), reading=Reading(deduplicate=True))

    assert [p.id for p in prompts("0", "copy", "1", "0")] == ["0", "2"]
    assert prompts_hash(prompts("0")) == prompts_hash(prompts("copy")) != prompts_hash(prompts("1"))


def test_rows_of_generate(prompts_file: Path, url: str, seeing_dir: Path, script: Scripted):
    out = prompts_file.parent / "out.jsonl"
    assert draw(prompts_file, out, url, seeing_dir).drawn == 9
    found = read(out)
    first, second, text = found[0], found[3], found[6]
    assert first["images"] == ["pics/0.png"]
    assert second["images"] == ["pics/1.png", "pics/2.png"]
    assert first["image_sha256"] == [hashlib.sha256(encoded(0)).hexdigest()]
    assert first["prompt_token_ids"] == [7, 9, 8] and second["prompt_token_ids"] == [7, 9, 9, 8]
    assert first["messages"] == user([words("What is "), SHOWN, words("?")])
    assert "images" not in text and text["messages"] == user("Just <image> words.")
    assert first["meta"] == {"kind": "test"}
    asked = {body["text"][0]: body for body in script.bodies if "text" in body}
    shown = asked["<start>user\n[picture][picture]Compare.<stop><start>assistant\n"]
    one, two = ("data:image/png;base64," + base64.b64encode(encoded(i)).decode() for i in (1, 2))
    assert shown["image_data"] == [[one, two]] * 3
    assert len(asked) == 2 and sum("input_ids" in body for body in script.bodies) == 1
    for row in found:
        assert json.loads(parse_row(row)["_lenvm_images"] or "[]") == row.get("images", [])


@pytest.mark.parametrize("dialect", ["sglang", "vllm", "openai"])
def test_rows_of_the_chat_route(dialect: str, prompts_file: Path, url: str, seeing_dir: Path, script: Scripted):
    script.dialect = dialect
    out = prompts_file.parent / "out.jsonl"
    assert draw(prompts_file, out, url, seeing_dir, api="openai").drawn == 9
    found = read(out)
    assert found[0]["images"] == ["pics/0.png"]
    assert found[0]["messages"] == user([words("What is "), SHOWN, words("?")])
    shown = {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64," + base64.b64encode(encoded(0)).decode()},
    }
    contents = [body["messages"][0]["content"] for body in script.bodies]
    assert contents.count([words("What is "), shown, words("?")]) == 3 + 1  # and the one that tries the server
    assert contents.count("Just <image> words.") == 3
    if dialect == "openai":  # one mark for each image, which the training makes as many as it needs
        text = AutoTokenizer.from_pretrained(seeing_dir).decode(found[3]["prompt_token_ids"])
        assert text.count("[picture]") == 2


def test_an_interrupted_run_goes_on_and_another_image_is_another_run(
    prompts_file: Path, url: str, seeing_dir: Path, script: Scripted, tmp_path: Path
):
    whole, out = prompts_file.parent / "whole.jsonl", prompts_file.parent / "out.jsonl"
    draw(prompts_file, whole, url, seeing_dir)
    out.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:4]) + b'{"torn')
    out.with_name("out.jsonl.meta.json").write_bytes(whole.with_name("whole.jsonl.meta.json").read_bytes())
    result = draw(prompts_file, out, url, seeing_dir)
    assert (result.kept, result.drawn) == (4, 5)
    assert out.read_bytes() == whole.read_bytes()
    (prompts_file.parent / "pics" / "0.png").write_bytes(encoded(77))
    with pytest.raises(SamplingError, match=r"begun with other parameters \(prompts"):
        draw(prompts_file, out, url, seeing_dir)
    prompts = read_prompts(prompts_file)
    (prompts_file.parent / "pics" / "1.png").unlink()
    result = draw(prompts, tmp_path / "gone.jsonl", url, seeing_dir)
    assert result.drawn == 6 and list(result.failed) == ["b"]
    assert "an image cannot be read any more" in result.failed["b"]


def test_a_server_or_template_without_images_is_refused(
    prompts_file: Path, url: str, seeing_dir: Path, tokenizer_dir: Path, script: Scripted, tmp_path: Path
):
    with pytest.raises(SamplingError, match=r"the chat template in .* shows no images"):
        draw(prompts_file, tmp_path / "o.jsonl", url, tokenizer_dir)
    joins = AutoTokenizer.from_pretrained(tokenizer_dir)
    joins.chat_template = "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    joins.save_pretrained(tmp_path / "joins")
    with pytest.raises(SamplingError, match=r"the chat template in .* shows no images"):
        draw(prompts_file, tmp_path / "o.jsonl", url, tmp_path / "joins")
    script.sees_images = False
    with pytest.raises(SamplingError, match=r"tiny at .* reads no images; serve a vision-language model"):
        draw(prompts_file, tmp_path / "o.jsonl", url, seeing_dir)
    assert not (tmp_path / "o.jsonl").exists() and not script.asked


def samples(folder: Path) -> Path:
    """Rows of twenty prompts that differ in their image alone."""
    rows = []
    for i in range(20):
        (folder / "pics" / f"s{i}.png").write_bytes(encoded(100 + i))
        one = {"images": [f"pics/s{i}.png"], "image_sha256": [f"{i}"]}
        rows += [{"prompt_token_ids": [1, 2], "completion_token_ids": [k], **one} for k in range(2)]
    return write(folder / "samples.jsonl", *rows, {"prompt_token_ids": [9], "completion_token_ids": [1]})


def test_split_tells_images_apart_and_keeps_their_paths_right(folder: Path):
    source = samples(folder)
    parts = split_samples(source, folder / "data", validation=0.3)
    assert parts["train"].prompts + parts["validation"].prompts == 21
    rows = read(parts["train"].path) + read(parts["validation"].path)
    assert {row["images"][0] for row in rows if "images" in row} == {str(folder / f"pics/s{i}.png") for i in range(20)}
    before = {row["image_sha256"][0] for row in read(parts["validation"].path) if "images" in row}
    beside = split_samples(source, folder, validation=0.3)
    rows = read(beside["validation"].path)
    assert {row["image_sha256"][0] for row in rows if "images" in row} == before
    assert all(row["images"][0].startswith("pics/s") for row in rows if "images" in row)
    assert set(source.read_bytes().splitlines()) == {
        line for part in beside.values() for line in part.path.read_bytes().splitlines()
    }


def test_merged_shards_are_the_file_of_one_machine_and_its_images(tmp_path: Path, url: str, seeing_dir: Path):
    inside = [{"bytes": encoded(i), "path": None} for i in range(5)]
    pq.write_table(pa.table({"q": ["What?"] * 5, "image": inside}), tmp_path / "q.parquet")
    command = ["sample", str(tmp_path / "q.parquet"), "--columns", "prompt=q,images=image", "--server", url,
               "--tokenizer", str(seeing_dir), "--n", "2", "--max-tokens", "20", "--out"]  # fmt: skip
    whole, joined = tmp_path / "whole" / "train.jsonl", tmp_path / "joined" / "train.jsonl"
    joined.parent.mkdir()
    assert CliRunner().invoke(main, [*command, str(whole)]).exit_code == 0
    parts = [tmp_path / "parts" / f"part{i}.jsonl" for i in (1, 2)]
    for i, part in enumerate(parts, start=1):
        done = CliRunner().invoke(main, [*command, str(part), "--shard", f"{i}/2"])
        assert done.exit_code == 0, done.output
        assert read(part)[0]["images"][0].startswith(f"part{i}_images/")
    done = CliRunner().invoke(main, ["merge", *map(str, parts), "--out", str(joined)])
    assert done.exit_code == 0, done.output
    assert joined.read_bytes() == whole.read_bytes()
    assert {p.name: p.read_bytes() for p in images_folder(joined).iterdir()} == {
        p.name: p.read_bytes() for p in images_folder(whole).iterdir()
    }


def test_images_may_be_written_out_as_base64(tmp_path: Path):
    import base64

    from lenvm.sampling.images import read_images

    picture = tmp_path / "a.png"
    Image.new("RGB", (6, 6), "blue").save(picture)
    text = base64.b64encode(picture.read_bytes()).decode()
    folder = tmp_path / "out_images"
    for value in (text, f"data:image/png;base64,{text}"):
        (image,) = read_images(value, "row 1", "image", tmp_path, folder)
        assert image.path.parent == folder
        assert image.path.read_bytes() == picture.read_bytes()
    (image,) = read_images("a.png", "row 1", "image", tmp_path, folder)  # a path goes first
    assert image.path == picture
    with pytest.raises(SamplingError, match=r"row 1: the image 'abcd' cannot be read"):  # letters that are base64 too
        read_images("abcd", "row 1", "image", tmp_path, folder)
    with pytest.raises(SamplingError, match="an image in `image` cannot be opened"):
        read_images("data:image/png;base64,AAAA", "row 1", "image", tmp_path, folder)
