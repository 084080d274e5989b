#!/usr/bin/env python3
"""Which settings of the host work beside a LenVM: a server each, mixed greedy requests all at once, every answer
compared token by token with transformers.

    benchmarks/hosts.py                     all settings
    benchmarks/hosts.py tp2 page16          some
    benchmarks/hosts.py tp2 --head attached the same with a lookahead head, attached to the base or on the LenVM

One Markdown row a setting: whether it started, how many answers were equal, how many of them guidance had changed. Tiny
models on the CPU. Settings that are refused at start say so in their row.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

# not this folder: its kernels.py would stand for the package of that name, which transformers looks for
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tests.sglang.adapters import make_adapter
from tests.sglang.conftest import Server, start
from tests.sglang.models import FAMILIES, make_attached, make_lookahead, make_pair, prompts
from tests.sglang.reference import LookaheadReference, Reference
from tests.sglang.test_serving import FIELDS, LIMIT


class Setting(NamedTuple):
    """Flags and environment of a server, the LoRA adapter its requests name, and which LenVM it serves."""

    flags: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    adapter: bool = False
    heads: int = 2


CORES = (("SGLANG_CPU_OMP_THREADS_BIND", "0|1"),)
RETRACT = (("SGLANG_TEST_RETRACT", "1"),)
SETTINGS = {
    "plain": Setting(()),
    "value-only": Setting((), heads=1),
    "no-overlap": Setting(("--disable-overlap-schedule",)),
    "no-radix": Setting(("--disable-radix-cache",)),
    "chunk16": Setting(("--chunked-prefill-size", "16")),
    "retract": Setting((), RETRACT),
    "two-at-once": Setting(("--max-running-requests", "2")),
    "little-kv": Setting(("--max-total-tokens", "400")),
    "page16": Setting(("--page-size", "16")),
    "page16-chunk32-retract": Setting(("--page-size", "16", "--chunked-prefill-size", "32"), RETRACT),
    "tp2": Setting(("--tp-size", "2"), CORES),
    "dp2": Setting(("--dp-size", "2"), CORES),
    "lora": Setting(("--enable-lora", "--lora-backend", "torch_native", "--max-loras-per-batch", "2"), adapter=True),
}


def ask(server: Server, asked: list[Any], **body: Any) -> list[dict[str, Any]]:
    """All at once."""

    def one(case: Any) -> dict[str, Any]:
        params = {"max_new_tokens": LIMIT, "temperature": 0}
        fields = {"input_ids": case[0], "sampling_params": params, **(case[1] or {}), **body}
        return dict(server.post("/generate", fields).json())

    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(one, asked))


def row(name: str, setting: Setting, home: Path, pairs: Callable[[int], tuple[Path, Path, Reference]]) -> str:
    """Run one setting."""
    pair, lenvm, reference = pairs(setting.heads)
    flags, body = setting.flags, {}
    if setting.adapter:
        folder = make_adapter(pair / "base", home / name)
        flags, body = (*flags, "--lora-paths", f"ours={folder / 'adapter'}"), {"lora_path": "ours"}
        reference = Reference(pair, base=folder / "merged")
    began = time.perf_counter()
    server = start(home / f"{name}.log", pair / "base", "--lenvm-model", str(lenvm), *flags,
                   plugins=("unpinned",) if setting.adapter else (), **dict(setting.environment))  # fmt: skip
    try:
        server.wait()
    except AssertionError:
        lines = [x for x in server.tail().splitlines() if x.strip()]
        return f"| {name} | no | | | {lines[-1][:200] if lines else ''} |"
    try:
        started = time.perf_counter() - began
        asked = [case for seed in (1, 2) for case in zip(prompts(len(FIELDS), seed, shared=40), FIELDS, strict=True)]
        answers = ask(server, asked, **body)
        expected = [reference.greedy(p, LIMIT, f) for p, f in asked]
        steered = sum(e != reference.greedy(p, LIMIT, None) for e, (p, _) in zip(expected, asked, strict=True))
        equal = sum(a.get("output_ids") == e for a, e in zip(answers, expected, strict=True))
        retracted = sum(a.get("meta_info", {}).get("num_retractions", 0) for a in answers)
        note = f"{retracted} retractions" if retracted else ""
        return f"| {name} | {started:.0f} s | {equal} of {len(asked)} | {steered} | {note} |"
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", choices=[*SETTINGS, []], help="default: all")
    parser.add_argument("--head", choices=("attached", "lookahead"), help="default: a full LenVM")
    options = parser.parse_args()
    names = options.settings or [n for n, s in SETTINGS.items() if not options.head or (s.heads == 2 and not s.adapter)]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        made: dict[int, tuple[Path, Path, Reference]] = {}

        def pairs(heads: int) -> tuple[Path, Path, Reference]:
            if heads not in made:
                pair = make_pair(home / f"pair{heads}", FAMILIES["qwen2"], FAMILIES["qwen2"], heads=heads)
                lenvm = pair / "lenvm"
                if options.head == "attached":
                    lenvm = make_attached(home / "head", pair / "base")
                elif options.head == "lookahead":
                    lenvm = make_lookahead(home / "head", lenvm)
                made[heads] = pair, lenvm, LookaheadReference(pair, lenvm) if options.head else Reference(pair)
            return made[heads]

        print("| setting | started | equal | steered | |\n|---|---|---|---|---|", flush=True)
        for name in names:
            print(row(name, SETTINGS[name], home, pairs), flush=True)


if __name__ == "__main__":
    main()
