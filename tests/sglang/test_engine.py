"""`sglang.Engine(lenvm_model=...)`, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sglang.conftest import environment
from tests.sglang.models import CONTEXT, prompts
from tests.sglang.reference import Reference

SCRIPT = """
import json, sys
import sglang

if __name__ == "__main__":
    pair, prompt = sys.argv[1], json.loads(sys.argv[2])
    engine = sglang.Engine(
        model_path=f"{pair}/base", lenvm_model=f"{pair}/lenvm", device="cpu", attention_backend="torch_native",
        dtype="float32", context_length=int(sys.argv[3]), max_total_tokens=4096, max_running_requests=8,
    )
    params = {"max_new_tokens": 12, "temperature": 0, "length_target": 8}
    answer = engine.generate(input_ids=prompt, sampling_params=params)
    refused = []
    for bad in ({"length_target": 0}, {"length_goal": 1}, {"custom_params": {"length_target": "x"}}):
        try:
            engine.generate(input_ids=prompt, sampling_params=bad)
        except ValueError as error:
            refused.append(str(error))
    plain = {"max_new_tokens": 12, "temperature": 0}
    again = engine.generate(input_ids=[prompt, prompt], sampling_params=[params, plain])
    print("RESULT", json.dumps([answer, refused, again]))
    engine.shutdown()
"""


@pytest.mark.slow
def test_engine(pair: Path, reference: Reference, tmp_path: Path) -> None:
    script = tmp_path / "use_engine.py"
    script.write_text(SCRIPT)
    (prompt,) = prompts(1, seed=30)
    command = [sys.executable, str(script), str(pair), json.dumps(prompt), str(CONTEXT)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500, check=False)
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    answer, refused, again = json.loads(lines[0].removeprefix("RESULT "))
    expected = reference.greedy(prompt, 12, {"length_target": 8})
    assert answer["output_ids"] == expected
    assert answer["lenvm"]["target"] == 8
    assert [m.split()[0] for m in refused] == ["length_target", "unknown", "length_target"]
    assert again[0]["output_ids"] == expected
    assert again[1]["output_ids"] == reference.greedy(prompt, 12, None)
    assert "lenvm" not in again[1]
