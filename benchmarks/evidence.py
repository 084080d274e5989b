"""docs/results.md: the commands of docs/evidence.md on the two worlds of the examples.

    python benchmarks/evidence.py --demo runs/demo --gsm8k runs/gsm8k --data DIR --out runs/results --write docs

Each world is served in turn with the pair that its recipe trained (`make demo`, `make run-gsm8k`) and asked, and the
tables and figures are joined. DIR holds gsm8k_test.jsonl, math500.jsonl and lifebench_no_summary.jsonl. Interrupted, it
goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from lenvm.pipeline.recipe import Server
from lenvm.pipeline.server import SglangServer

HEAD = """# Results

Made by `make results DATA=DIR` (`benchmarks/evidence.py`) with the commands of [evidence.md](evidence.md).

**The models are tiny ones, trained here from nothing on a CPU**, one run each: Qwen2-architecture base models of
{demo:.1f} and {gsm8k:.1f} million parameters and a LenVM for each. The *demo's* knows nothing but the small synthetic
language of `examples/demo`, and that well. *GSM8K's* has read GSM8K's training questions and no other text: it writes
sums that look right and answers hardly any question rightly. MATH-500 and LIFEBench are asked of the same model, which
follows no instruction and knows neither, so there only lengths, and the base's own opinion of its text, mean anything.
The figures show what the commands measure and how controllers compare on one pair. They say nothing about other models.
"""


class Part(NamedTuple):
    """One evaluation: its folder, its heading, and the words of the command behind `lenvm eval`."""

    name: str
    heading: str
    words: tuple[str, ...]
    asks: bool = True


def of_demo(run: Path, options: argparse.Namespace) -> Iterator[Part]:
    """What the demo's pair is measured by."""
    base, test, prompts = (str(run / p) for p in ("base", "samples/test.jsonl", "prepare/prompts_test.jsonl"))
    lenvm = str(run / "lenvm")
    problems, biases, budgets = (
        ("12", "-16,0", "35") if options.small else ("60", "-40,-16,-8,-4,-2,0", "25,35,45,60,90")
    )
    words = ("length", "--prompts", prompts, "--samples", test, "--lenvm", lenvm)
    yield Part("demo_length", "Length prediction", words, asks=False)
    words = ("tokens", "--samples", test, "--lenvm", lenvm, "--top", "12")
    yield Part("demo_tokens", "Tokens that lengthen and shorten", words, asks=False)
    words = ("tradeoff", "--data", prompts, "--base", base, "--limit", problems, "--samples", "4")
    words += (f"--biases={biases}", "--budgets", budgets, "--passes", "1,4", "--max-tokens", "384")
    yield Part("demo_tradeoff", "Accuracy against length", words)


def of_gsm8k(run: Path, options: argparse.Namespace) -> Iterator[Part]:
    """What GSM8K's pair is measured by."""
    base, test, prompts = (str(run / p) for p in ("base", "samples/test.jsonl", "prepare/prompts_test.jsonl"))
    lenvm, data = str(run / "lenvm"), options.data
    problems, items, targets = ("6", "4", "32") if options.small else ("150", "247", "64")
    words = ("length", "--prompts", prompts, "--samples", test, "--lenvm", lenvm)
    yield Part("gsm8k_length", "Length prediction", words, asks=False)
    words = ("tokens", "--samples", test, "--lenvm", lenvm, "--top", "12")
    yield Part("gsm8k_tokens", "Tokens that lengthen and shorten", words, asks=False)
    curves = ("--base", base, "--samples", "2", "--biases=-16,-4,0", "--budgets", "60,120", "--max-tokens", "384")
    # the questions alone, as the base learnt them
    curves += ("--instruction", "", "--limit", problems, "--max-prompt-tokens", "600")
    words = ("tradeoff", "--data", str(data / "gsm8k_test.jsonl"), *curves)
    yield Part("gsm8k_tradeoff", "GSM8K: accuracy against length", words)
    words = ("tradeoff", "--data", str(data / "math500.jsonl"), *curves)
    yield Part("math500_tradeoff", "MATH-500: accuracy against length", words)
    asked = ("lifebench", "--data", str(data / "lifebench_no_summary.jsonl"), "--base", base)
    asked += ("--max-prompt-tokens", "800")
    words = (*asked, "--targets", targets, "--limit", items, "--sharpness", "1,2,4")
    yield Part("lifebench", "LIFEBench", words)
    words = (*asked, "--targets", "16" if options.small else "32,128,256", "--limit", "4" if options.small else "60")
    yield Part("lifebench_targets", "LIFEBench: other targets, some of the items", (*words, "--sharpness", "2"))


def lenvm(*words: str) -> None:
    """One command of the package."""
    subprocess.run([sys.executable, "-m", "lenvm", *words], check=True)


def measure(run: Path, parts: list[Part], out: Path) -> None:
    """Run what has no results yet; one server for all that ask one."""
    waiting = [part for part in parts if not (out / part.name / "results.json").is_file()]
    for part in waiting:
        if not part.asks:
            lenvm("eval", *part.words, "--out", str(out / part.name))
    asking = [part for part in waiting if part.asks]
    if asking:
        with SglangServer(str(run / "base"), Server(), out / f"{run.name}.log", lenvm=run / "lenvm") as server:
            for part in asking:
                there = ("--server", server.url, "--concurrency", "96", "--out", str(out / part.name))
                lenvm("eval", *part.words, *there)
    for part in waiting:
        lenvm("report", str(out / part.name), "--out", str(out / f"{part.name}.html"))


def parameters(base: Path) -> int:
    """Of a checkpoint of one file."""
    from safetensors import safe_open

    with safe_open(base / "model.safetensors", "pt") as file:
        return sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118


def section(part: Part, out: Path, docs: Path) -> str:
    """Tables and figures of one evaluation; the figures are copied beside the document."""
    tables = (out / part.name / "tables.md").read_text(encoding="utf-8")
    text = f"### {part.heading}\n" + tables.partition("\n")[2]
    figures = out / part.name / "figures.png"
    if figures.is_file():
        gallery = docs / "gallery" / "results"
        gallery.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(figures, gallery / f"{part.name}.png")
        text = f"{text.rstrip()}\n\n![{part.heading}](gallery/results/{part.name}.png)\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="the demo's folder")
    parser.add_argument("--gsm8k", type=Path, default=Path("runs/gsm8k"), help="the folder of `make run-gsm8k`")
    parser.add_argument("--data", type=Path, required=True, help="folder with GSM8K, MATH-500 and LIFEBench")
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--small", action="store_true", help="a few answers: to see that it runs")
    parser.add_argument("--write", type=Path, help="the folder whose results.md is written")
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    worlds = {
        "The demo world": (options.demo, list(of_demo(options.demo, options))),
        "GSM8K, MATH-500 and LIFEBench": (options.gsm8k, list(of_gsm8k(options.gsm8k, options))),
    }
    for run, parts in worlds.values():
        measure(run, parts, out)
    if options.write:
        sizes = {"demo": options.demo, "gsm8k": options.gsm8k}
        text = HEAD.format(**{name: parameters(run / "base") / 1e6 for name, run in sizes.items()})
        for title, (_, parts) in worlds.items():
            text += f"\n## {title}\n\n" + "\n".join(section(part, out, options.write) for part in parts)
        (options.write / "results.md").write_text(text.rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
