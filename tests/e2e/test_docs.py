"""What the documents tell a reader to type is typed here: commands, and the Python of the README."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lenvm.cli import main
from lenvm.pipeline.server import SglangServer
from tests.e2e.conftest import REPOSITORY, Run
from tests.sampling import hub_server

pytestmark = pytest.mark.slow

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "examples" / "README.md"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """(page, command) of every bash block; a trailing comment is not part of a command."""
    found = []
    for page in PAGES:
        for block in blocks(page, "bash"):
            joined = block.replace("\\\n", " ")
            found += [
                (page.name, line.strip()) for line in joined.splitlines() if line.strip() and line.strip()[0] != "#"
            ]
    return found


def run(*words: str, folder: Path = REPOSITORY) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False, cwd=folder)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def lenvm(*words: str) -> str:
    """The command `lenvm`, in this process: the hosts' imports are a large part of a short command. (That it starts as
    a process is seen in the `demo` fixture.)"""
    done = CliRunner().invoke(main, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, f"lenvm {shlex.join(words)}\n{done.output[-4000:]}"
    return done.output


def local(words: list[str], demo: Run, server: SglangServer, folder: Path) -> list[str]:
    """The same command about files and addresses that exist here."""
    places = {
        "DeepMath-103K": str(folder / "deepmath.jsonl"),
        "prompts.jsonl": str(demo.folder / "prepare" / "prompts_test.jsonl"),
        "Qwen/Qwen2.5-7B-Instruct": str(demo.base),
        "runs/demo/lenvm": str(demo.lenvm),
        "NAME": "default",
        "runs/demo/base": str(demo.base),
        "runs/demo/prepare/prompts_test.jsonl": str(demo.folder / "prepare" / "prompts_test.jsonl"),
        "runs/demo/samples/test.jsonl": str(demo.folder / "samples" / "test.jsonl"),
        "runs/demo/samples/train.jsonl": str(demo.folder / "samples" / "train.jsonl"),
        "train.jsonl": str(demo.folder / "samples" / "train.jsonl"),
        "lenvm-1.5b": str(folder / "converted"),
        "PUBLISHED": str(folder / "published"),
        "BASE": str(demo.base),
        "LENVM": str(demo.lenvm),
        "samples.jsonl": str(demo.folder / "samples" / "test.jsonl"),
        "lifebench.jsonl": str(folder / "lifebench.jsonl"),
        "gsm8k_test.jsonl": str(folder / "gsm8k_test.jsonl"),
    }
    if words[0] == "lm_eval":
        asked = words.index("--model_args") + 1
        words[asked] = words[asked].replace("http://127.0.0.1:8000", server.url)
        places["$(lenvm harness)"] = lenvm("harness").strip()
        places['{"gsm8k": "gsm8k_test.jsonl"}'] = json.dumps({"gsm8k": places["gsm8k_test.jsonl"]})
    if words[1:2] == ["eval"] or words[0] == "lm_eval":
        item = {"category": "qa", "lang": "en", "task": "Say. It must be {word_count_type} {word_count} words long."}
        (folder / "lifebench.jsonl").write_text("".join(json.dumps({"id": i, **item}) + "\n" for i in range(2)))
        problem = {"question": "1 + 1?", "answer": "#### 2"}
        (folder / "gsm8k_test.jsonl").write_text(f"{json.dumps(problem)}\n" * 3)
    if words[1:3] in (["eval", "ablations"], ["eval", "scaling"]):
        places |= trainings([word for word in words if word.startswith("saves/")], words[2], demo, folder)
    if "--preset" in words:
        (folder / "deepmath.jsonl").write_text('{"question": "1 + 1?"}\n')
    out = [places.get(word, word) for word in words]
    for i, word in enumerate(out):
        if word == "--server":
            out[i + 1] = server.url + ("/v1" if out[i + 1].endswith("/v1") else "")
        if word == "--out":
            out[i + 1] = str(folder / Path(out[i + 1]).name)
        small = {
            "--n": "1", "--max-tokens": "40", "--validation": "0.4", "--test": "0.3", "--targets": "8",
            "--passes": "1,2", "--budgets": "10,20",
        }  # fmt: skip
        if word == "--samples" and out[i + 1].isdigit():
            out[i + 1] = "2"
        if word in small:
            out[i + 1] = small[word]
    if words[1:3] == ["convert", "PUBLISHED"]:  # nobody's weights are here: make a checkpoint in that layout
        lenvm("convert", str(demo.lenvm), places["PUBLISHED"], "--to", "published")
    if out[1] == "sample" and "--tokenizer" not in out:
        out += ["--tokenizer", str(demo.base)]
    if out[1] == "distill":
        out += ["--epochs", "0.1", "--rank", "16", "--states", "4", "--passes", "1"]
    return [*out, "--limit", "3"] if out[1] == "sample" else out


def trainings(named: list[str], command: str, demo: Run, folder: Path) -> dict[str, str]:
    """What the demo's training wrote, once for each folder named: as if each had been given half the prompts of the one
    before (`scaling`), or another gamma."""
    for i, name in enumerate(named):
        run = folder / name
        run.mkdir(parents=True)
        for file in ("eval_results.json", "trainer_state.json", "training.json"):
            shutil.copy(demo.lenvm / file, run)
        record = json.loads((run / "training.json").read_text())
        if command == "scaling":
            record["train"] |= {key: record["train"][key] // 2**i for key in ("prompts", "completions")}
        else:
            record["settings"]["lenvm_gamma"] = ["auto", "0.98", "0.99"][i]
        (run / "training.json").write_text(json.dumps(record))
    return {name: str(folder / name) for name in named}


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value[:60])
def test_command(page: str, command: str, demo: Run, server: SglangServer, tmp_path: Path) -> None:
    words = shlex.split(command, comments=True)
    match words:
        case ["make", *arguments]:
            given = [a.replace("DIR", str(tmp_path)) for a in arguments]
            run("make", "-n", *given)
        case ["pip", "install", requirement]:
            extra = re.fullmatch(r"lenvm\[(\w+)\]", requirement)
            assert extra, f"{page}: {command}"
            assert extra.group(1) in (metadata.metadata("lenvm").get_all("Provides-Extra") or [])
        case ["llamafactory-cli" | "FORCE_TORCHRUN=1", *rest]:
            # parsed with LlamaFactory's own parser in tests/lf/test_examples.py, where LlamaFactory is installed
            config = next(word for word in rest if word.endswith(".yaml"))
            assert (REPOSITORY / config).is_file()
        case ["sglang", "serve", *flags]:
            # starting with these flags is what the `server` fixture and tests/sglang do, through both launchers
            given = {flag for flag in flags if flag.startswith("--")}
            assert given <= {"--model-path", "--lenvm-model", "--lenvm-max-candidates"}, f"{page}: {command}"
        case ["curl", *rest]:
            reply = run("curl", *(word.replace("http://127.0.0.1:8000", server.url) for word in rest))
            assert '"error"' not in reply, reply
            assert any(mark in reply for mark in ('"lenvm"', '"lenvm.prediction"', '"lenvm.values"', '"gamma"')), reply
        case ["lm_eval", *_]:
            small = ("--limit", "2", "--gen_kwargs", "max_gen_toks=40")
            table = run(sys.executable, "-m", *local(words, demo, server, tmp_path), *small)
            for target in (32, 1024):
                assert re.search(rf"at_most_{target}\s*\|.*\|right\s*\|", table), table
        case ["lenvm", "pipeline", verb, recipe, *_]:
            assert verb in ("run", "serve")  # both run in this folder, on a small scale: fixtures `demo` and `served`
            assert (REPOSITORY / recipe).is_file()
        case ["lenvm", "push" | "pull" as verb, *rest]:
            with hub_server.serving() as hub:
                hub.repositories = {"zwhe99/DeepMath-103K": {"x": b"x"}, "me/lengths": {"x": b"x"}}
                split = str(demo.folder / "samples")
                here = {"data": split, **{n: str(tmp_path / n) for n in ("dataset", "copy", "DeepMath-103K")}}
                environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_x"}
                command_line = [sys.executable, "-m", "lenvm", verb, *(here.get(word, word) for word in rest)]
                # a process of its own: the client of the Hub reads its address when it is imported
                done = subprocess.run(command_line, env=environment, capture_output=True, text=True, timeout=300)
                assert done.returncode == 0, done.stderr
                assert bool(hub.asked) == ("--prepare" not in rest)
        case ["lenvm", *_]:
            lenvm(*local(words, demo, server, tmp_path)[1:])
        case _:
            pytest.fail(f"{page}: no test runs `{command}`")


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    missing = [p.name for p in (REPOSITORY / "docs").glob("*.md") if f"docs/{p.name}" not in readme]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_python_of_the_readme(demo: Run, server: SglangServer, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = blocks(REPOSITORY / "README.md", "python")
    exec(compile(snippet.replace("http://127.0.0.1:8000", server.url), "README.md", "exec"), {})
    assert re.match(r"\d+ ", capsys.readouterr().out)


@pytest.mark.parametrize("number", range(3))
def test_python_of_the_api_page(number: int, server: SglangServer, capsys: pytest.CaptureFixture[str]) -> None:
    snippets = blocks(REPOSITORY / "docs" / "api.md", "python")
    assert len(snippets) == 3
    exec(compile(snippets[number].replace("http://127.0.0.1:8000", server.url), f"api.md {number}", "exec"), {})
    assert capsys.readouterr().out


def test_python_of_the_checkpoint_page(demo: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = blocks(REPOSITORY / "docs" / "checkpoint.md", "python")
    exec(compile(snippet.replace("runs/demo/lenvm", str(demo.lenvm)), "checkpoint.md", "exec"), {})
    assert "tensor(" in capsys.readouterr().out
