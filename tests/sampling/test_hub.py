"""`lenvm push` and `lenvm pull` with the real client of the Hub, against a small hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.sampling.hub_server import Hub, serving

pytestmark = pytest.mark.slow
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


@pytest.fixture
def lenvm(hub: Hub, tmp_path: Path) -> Run:
    """The command in a process of its own: the client reads its address when it is imported."""

    def run(*words: str, url: str | None = None) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "HF_ENDPOINT": url or hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_x",
               "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "COLUMNS": "200"}  # fmt: skip
        return subprocess.run(
            [sys.executable, "-m", "lenvm", *words], env=env, capture_output=True, text=True, timeout=120
        )

    return run


def completion(prompt: str, sample: int, **more: object) -> dict[str, object]:
    """A row as `lenvm sample` writes it."""
    return {"prompt_id": prompt, "sample": sample, "messages": [{"role": "user", "content": prompt}],
            "prompt_token_ids": [1, 2], "completion": "ä b", "completion_token_ids": [3, 4, 5 + sample],
            "finish_reason": "stop", "model": "tiny", "sampling": {"temperature": 1.0}, "seed": 1, "meta": {},
            **more}  # fmt: skip


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def test_a_split_goes_there_and_comes_back_byte_for_byte(hub: Hub, lenvm: Run, tmp_path: Path):
    parts = {
        "train": write(tmp_path / "data" / "train.jsonl", [completion(p, k) for p in "abc" for k in range(2)]),
        "validation": write(tmp_path / "data" / "validation.jsonl", [completion("d", 0)]),
    }
    pushed = lenvm("push", str(tmp_path / "data"), "me/lengths")
    assert pushed.returncode == 0, pushed.stderr
    assert "train: 6 completions of 3 prompts" in pushed.stderr
    assert f"{hub.url}/datasets/me/lengths/commit/" in pushed.stderr
    card = hub.repositories["me/lengths"]["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["configs"][0]["data_files"] == [{"split": n, "path": f"{n}.jsonl"} for n in parts]
    assert "| train | 6 | 3 | 18 | 3/3/3/3 | 0.0% |" in card

    pulled = lenvm("pull", "me/lengths", "--out", str(tmp_path / "copy"))
    assert pulled.returncode == 0, pulled.stderr
    assert "3 files" in pulled.stderr
    for name, path in parts.items():
        assert (tmp_path / "copy" / f"{name}.jsonl").read_bytes() == path.read_bytes()
    again = lenvm("pull", "me/lengths", "--out", str(tmp_path / "copy"))  # an interrupted one goes on
    assert again.returncode == 0, again.stderr

    hub.repositories["me/lengths"]["README.md"] = b"mine"
    assert lenvm("push", str(parts["train"]), "me/lengths").returncode == 0
    assert hub.repositories["me/lengths"]["README.md"] == b"mine"  # a card written by hand stays


def test_images_travel_with_their_rows(hub: Hub, lenvm: Run, tmp_path: Path):
    picture = tmp_path / "elsewhere" / "p.png"
    picture.parent.mkdir()
    Image.new("RGB", (4, 4), "green").save(picture)
    source = write(tmp_path / "train.jsonl", [completion("a", 0, images=[str(picture)]), completion("b", 0)])
    assert lenvm("push", str(source), "me/pictures").returncode == 0
    assert lenvm("pull", "me/pictures", "--out", str(tmp_path / "copy")).returncode == 0
    rows = [json.loads(line) for line in (tmp_path / "copy" / "train.jsonl").read_text().splitlines()]
    assert (tmp_path / "copy" / rows[0]["images"][0]).read_bytes() == picture.read_bytes()
    assert rows[1]["images"] == []


def test_prepare_needs_no_hub(lenvm: Run, hub: Hub, tmp_path: Path):
    source = write(tmp_path / "train.jsonl", [completion("a", 0)])
    done = lenvm("push", str(source), "me/x", "--prepare", str(tmp_path / "out"), url="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "train.jsonl"]
    assert hub.asked == []
    full = lenvm("push", str(source), "me/x", "--prepare", str(tmp_path / "out"))
    assert (full.returncode, "is not empty; choose another --prepare" in full.stderr) == (1, True)


def test_a_preset_names_a_data_set_to_pull(hub: Hub, lenvm: Run, tmp_path: Path):
    hub.repositories["openai/gsm8k"] = {"main/train.jsonl": b"{}\n", "socratic/train.jsonl": b"{}\n"}
    done = lenvm("pull", "gsm8k", "--include", "main/*", "--out", str(tmp_path / "g"))
    assert done.returncode == 0, done.stderr
    assert [p.parent.name for p in (tmp_path / "g").rglob("*.jsonl")] == ["main"]
    none = lenvm("pull", "gsm8k", "--include", "x/*", "--out", str(tmp_path / "h"))
    assert (none.returncode, "has no file that x/* names" in none.stderr) == (1, True)


def test_what_is_wrong_is_one_sentence(lenvm: Run, tmp_path: Path):
    source = write(tmp_path / "train.jsonl", [completion("a", 0)])
    bad = write(tmp_path / "bad.jsonl", [completion("a", 0), {"prompt_id": "b"}])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    for words, url, said in (
        (("push", str(bad), "me/x"), None, "bad.jsonl, line 2 lacks prompt_token_ids, completion_token_ids"),
        (("push", str(tmp_path / "full"), "me/x"), None, "neither a file of completions nor a folder with train.jsonl"),
        (("push", str(source), "me/x y"), None, "me/x y was not pushed:"),
        (("push", str(source), "me/x"), "http://127.0.0.1:9", "the Hub cannot be reached"),
        (("pull", "me/nothing", "--out", str(tmp_path / "o")), None, "the Hub has no such data set"),
        (("pull", "me/x", "--out", str(tmp_path / "o")), "http://127.0.0.1:9", "was not pulled: the Hub cannot"),
        (("pull", "me/x", "--out", str(tmp_path / "full")), None, "holds files that no pull has put there"),
    ):
        done = lenvm(*words, url=url)
        assert done.returncode == 1, words
        assert said in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
