"""The tables of docs/results.md: every command of docs/evidence.md on the demo's pair.

    python benchmarks/evidence.py --run runs/demo --data DIR --out runs/results [--write docs/results.md]

Starts one server with the pair that `make demo` trained, asks it at a small size, and joins the tables. DIR holds
LIFEBench's file (lifebench_no_summary.jsonl). Interrupted, it goes on where it was.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from lenvm.pipeline.recipe import Server
from lenvm.pipeline.server import SglangServer

HEAD = """# Results

Made by `make results DATA=DIR` (`benchmarks/evidence.py`) with the commands of [evidence.md](evidence.md).

**The model is the demo's**: a Qwen2-architecture base of {base:.1f} million parameters that knows nothing but the small
synthetic language of `examples/demo`, and a LenVM trained on its samples; one training run, on a CPU. The figures show
that the commands measure what they should, and how the controllers compare on this pair. They say nothing about other
models. LIFEBench's questions in particular are in no language that this base ever saw: what it answers there is fluent
nonsense of its own world, and only its lengths, and the base's own opinion of its text, mean anything.

"""


def lenvm(*words: str) -> None:
    """One command of the package."""
    subprocess.run([sys.executable, "-m", "lenvm", *words], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="the demo's folder")
    parser.add_argument("--data", type=Path, required=True, help="folder with lifebench_no_summary.jsonl")
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--small", action="store_true", help="a fifth of the answers")
    parser.add_argument("--write", type=Path, help="the document to write")
    given = parser.parse_args()
    run, out = given.run, given.out
    base, value, test = run / "base", run / "lenvm", run / "samples" / "test.jsonl"
    prompts = run / "prepare" / "prompts_test.jsonl"
    out.mkdir(parents=True, exist_ok=True)
    problems, biases, budgets = (
        ("24", "-16,-4,0", "35,60") if given.small else ("60", "-16,-8,-4,-2,0", "25,35,45,60,90")
    )
    items, targets = ("20", "32,64") if given.small else ("40", "32,64,128")
    lenvm("eval", "length", "--prompts", str(prompts), "--samples", str(test), "--lenvm", str(value),
          "--out", str(out / "length"))  # fmt: skip
    lenvm("eval", "tokens", "--samples", str(test), "--lenvm", str(value), "--out", str(out / "tokens"), "--top", "12")
    asked = str(run / "evaluation" / "requests.jsonl")
    lenvm("view", str(test), "--lenvm", str(value), "--requests", asked, "--out", str(out / "view.html"))
    with SglangServer(str(base), Server(), out / "server.log", lenvm=value) as server:
        lenvm("eval", "tradeoff", "--server", server.url, "--data", str(prompts), "--base", str(base), "--limit",
              problems,
              "--samples", "4", f"--biases={biases}", "--budgets", budgets, "--passes", "1,4",
              "--max-tokens", "384", "--concurrency", "64", "--out", str(out / "tradeoff"))  # fmt: skip
        lenvm("eval", "lifebench", "--server", server.url, "--data", str(given.data / "lifebench_no_summary.jsonl"),
              "--base", str(base), "--targets", targets, "--limit", items, "--max-prompt-tokens", "400",
              "--concurrency", "64", "--out", str(out / "lifebench"))  # fmt: skip
    names = ("lifebench", "length", "tokens", "tradeoff")
    for name in names:
        lenvm("report", str(out / name), "--out", str(out / f"{name}.html"))
    if given.write:
        from safetensors import safe_open

        with safe_open(base / "model.safetensors", "pt") as file:
            parameters = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
        tables = "\n".join((out / name / "tables.md").read_text(encoding="utf-8") for name in names)
        given.write.write_text(HEAD.format(base=parameters / 1e6) + tables.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
