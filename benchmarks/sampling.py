"""Does `lenvm sample` draw 100,000 completions in bounded memory, killed twice on the way, without losing or doubling
a row?

    python benchmarks/sampling.py [--samples 100000] [--kills 2]

A stub server of its own process answers `/generate` at once with made-up completions; so the figures are of the client
alone: rows a second, peak memory of each run, and memory at a tenth of the size beside it. Prints one JSON object; exit
code 1 if a row is missing, doubled or out of place.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PER_PROMPT = 8
TOKENS = 200


def serve(port_file: Path) -> None:
    """The stub: every completion is a function of its seed."""
    from aiohttp import web

    async def info(_: web.Request) -> web.Response:
        return web.json_response(
            {"model_path": "/none", "served_model_name": "stub", "enable_deterministic_inference": True}
        )

    async def generate(request: web.Request) -> web.Response:
        body = await request.json()
        answers = []
        for params in body["sampling_params"]:
            rng = random.Random(params["sampling_seed"])
            ids = rng.choices(range(3, 250), k=rng.randint(1, TOKENS))
            meta = {"finish_reason": {"type": "stop"}, "completion_tokens": len(ids)}
            answers.append({"text": "x" * len(ids), "output_ids": ids, "meta_info": meta})
        return web.json_response(answers)

    app = web.Application(client_max_size=2**26)
    app.add_routes([web.get("/server_info", info), web.post("/generate", generate)])

    async def started(_: web.Application) -> None:
        port_file.write_text(str(runner_port))

    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        runner_port = probe.getsockname()[1]
    app.on_startup.append(started)
    web.run_app(app, host="127.0.0.1", port=runner_port, print=None)


def tokenizer(folder: Path) -> None:
    """A byte-level tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<pad>", "<stop>", *letters])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<stop>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)


def peak_bytes(pid: int) -> int:
    """Peak resident memory of a process so far; 0 once it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def draw(folder: Path, url: str, samples: int, kills: int) -> dict[str, Any]:
    """Sample, kill, go on; what happened."""
    prompts, out = folder / f"prompts{samples}.jsonl", folder / f"out{samples}.jsonl"
    count = samples // PER_PROMPT
    with prompts.open("w") as file:
        for i in range(count):
            message = {"role": "user", "content": f"question {i} " + "x" * (i % 60)}
            file.write(json.dumps({"id": f"p{i}", "messages": [message], "kind": "stub"}) + "\n")
    command = [sys.executable, "-m", "lenvm", "sample", str(prompts), "--out", str(out), "--server", url,
               "--tokenizer", str(folder / "tokenizer"), "--n", str(PER_PROMPT), "--concurrency", "256"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs: list[dict[str, Any]] = []
    whole = 0
    for k in range(kills + 1):
        began, peak = time.perf_counter(), 0
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        # where the file of a complete run would be, judged by its mean row so far
        target = (k + 1) / (kills + 1) * samples
        while process.poll() is None:
            peak = max(peak, peak_bytes(process.pid))
            if k < kills and size_of(out) >= target * (whole or 1500):
                process.send_signal(signal.SIGKILL)
                process.wait()
                break
            time.sleep(0.02)
        lines = sum(1 for _ in out.open("rb")) if out.exists() else 0
        whole = size_of(out) // max(1, lines)
        runs.append({"seconds": round(time.perf_counter() - began, 1), "rows_after": lines,
                     "killed": process.returncode == -signal.SIGKILL, "peak_mib": round(peak / 2**20)})  # fmt: skip
        if not runs[-1]["killed"] and process.returncode != 0:
            assert process.stderr is not None
            raise SystemExit(process.stderr.read().decode())
    order = []
    with out.open() as rows:
        for line in rows:
            row = json.loads(line)
            order.append((int(row["prompt_id"][1:]), row["sample"]))
    good = order == [(i, k) for i in range(count) for k in range(PER_PROMPT)]
    return {"samples": samples, "runs": runs, "every_row_once_in_order": good, "file_mib": round(size_of(out) / 2**20)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer(folder / "tokenizer")
        port_file = folder / "port"
        stub = subprocess.Popen([sys.executable, __file__, "--serve", str(port_file)])
        try:
            while not port_file.exists():
                if stub.poll() is not None:
                    raise SystemExit("the stub server did not start")
                time.sleep(0.05)
            time.sleep(0.5)
            url = f"http://127.0.0.1:{port_file.read_text()}"
            found = [draw(folder, url, given.samples // 10, 0), draw(folder, url, given.samples, given.kills)]
        finally:
            stub.terminate()
            stub.wait()
    print(json.dumps(found, indent=1))
    if not all(f["every_row_once_in_order"] for f in found):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
