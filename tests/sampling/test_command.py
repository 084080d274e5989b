"""`lenvm sample` and `lenvm inspect` as a person types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lenvm.cli import main
from lenvm.sampling.statistics import summarise
from tests.sampling.conftest import Scripted

runner = CliRunner()


def test_sample_prints_one_line_of_statistics(prompts_file: Path, tmp_path: Path, url: str, tokenizer_dir: Path):
    out = tmp_path / "out.jsonl"
    arguments = ["sample", str(prompts_file), "--out", str(out), "--server", url, "--tokenizer", str(tokenizer_dir)]
    result = runner.invoke(main, [*arguments, "--n", "3", "--max-tokens", "25"])
    assert result.exit_code == 0, result.output
    assert "36 completions of 12 prompts" in result.output
    assert "suggested gamma" in result.output
    again = runner.invoke(main, [*arguments, "--n", "3", "--max-tokens", "25"])
    assert "0 drawn" in again.output
    assert "36 were there" in again.output
    drawn = runner.invoke(main, [*arguments, "--n", "3", "--max-tokens", "25", "--picture", str(tmp_path / "a.svg")])
    assert drawn.exit_code == 0, drawn.output
    assert "36 completions of 12 prompts" in (tmp_path / "a.svg").read_text()
    wrong = runner.invoke(main, [*arguments, "--picture", str(tmp_path / "a.docx")])
    assert wrong.exit_code == 1
    assert "--picture must end in one of" in wrong.output
    other = runner.invoke(main, [*arguments, "--n", "4", "--max-tokens", "25"])
    assert other.exit_code == 1
    assert "n: 3 then, 4 now" in other.output


def test_failed_prompts_make_the_exit_code(
    prompts_file: Path, tmp_path: Path, url: str, tokenizer_dir: Path, script: Scripted
):
    script.refuse = {"question 5": 400}
    script.deterministic = False
    out = tmp_path / "out.jsonl"
    arguments = ["--out", str(out), "--server", url, "--api", "openai", "--n", "1", "--limit", "7"]
    result = runner.invoke(main, ["sample", str(prompts_file), *arguments])
    assert result.exit_code == 1
    assert "failed: prompt p5: HTTP 400: scripted 400" in result.output
    assert "ignores seeds of single requests" in result.output
    assert len(out.read_text().splitlines()) == 6


def test_bad_options(prompts_file: Path, tmp_path: Path):
    base = ["sample", str(prompts_file), "--out", str(tmp_path / "o.jsonl")]
    zero = runner.invoke(main, [*base, "--top-p", "0"])
    assert zero.exit_code == 2
    assert "--top-p" in zero.output
    assert "got 0.0" in zero.output
    template = runner.invoke(main, [*base, "--template", "[1]"])
    assert template.exit_code == 2
    assert "JSON object" in template.output


def test_statistics_of_known_rows():
    rows = [
        {"prompt_id": p, "prompt_token_ids": [0] * 5, "completion_token_ids": [0] * n, "finish_reason": why}
        for p, n, why in [("a", 2, "stop"), ("a", 6, "stop"), ("b", 10, "length"), ("b", 10, "length")]
    ]
    found = summarise(rows)
    assert (found.completions, found.prompts, found.tokens, found.cut) == (4, 2, 28, 0.5)
    assert found.percentiles == {5: 2, 50: 6, 95: 10, 99: 10}
    assert found.spread == pytest.approx(0.25)  # prompt a: 2 / 4, prompt b: 0
    assert found.gamma == pytest.approx(0.01 ** (1 / 10), abs=1e-3)
    assert found.cutoff == 16


def test_inspect(tmp_path: Path):
    block = {"format": 1, "heads": ["value"], "gamma": 0.99, "base_model": "tiny"}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForLengthValue"], "lenvm": block}))
    good = runner.invoke(main, ["inspect", str(tmp_path)])
    assert json.loads(good.output)["lenvm"]["gamma"] == 0.99
    bad = runner.invoke(main, ["inspect", str(tmp_path / "none")])
    assert bad.exit_code == 1
    assert "not a length value model" in bad.output


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = "import sys, lenvm.cli; print(sorted({'torch', 'transformers', 'httpx', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
