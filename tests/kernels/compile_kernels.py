"""Compile every kernel for GPU generations, without a GPU: `python -m tests.kernels.compile_kernels 80 90 100`.

Prints one JSON object a kernel: registers and bytes of stack and local memory (both 0 unless registers spill), from the
assembler that comes with Triton. A process of its own, because the interpreter and the compiler exclude each other.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lenvm_kernels.fused import attend, candidates, lookahead, place, tilt, value_head

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

TILT = {
    **dict.fromkeys(["LOG_P", "SHARPNESS", "TOLERANCE", "BIAS", "OUT", "STATS", "MEAN"], "*fp32"),
    **dict.fromkeys(["TOKEN", "MODE", "CONTROL", "TARGET", "EMITTED", "SEED", "SLOT", "CHOSEN"], "*i64"),
    **dict.fromkeys(["STOP", "GREEDY"], "*u8"),
    **{"Z": "*fp32", "LOG_Q": "*fp32", "CENTRE": "*fp64", "DECAY": "*fp64", "STATUS": "*i32"},
    **{"LOGITS": "*fp32", **dict.fromkeys(["INDEX", "KEPT_SLOT", "POOL_ROW", "SCRATCH"], "*i64")},
}
EAGER = {"WRITE": True, "INDEXED": True, "REMEMBER": True, "RULED": False}
GRAPH = {"WRITE": False, "INDEXED": False, "REMEMBER": True, "RULED": True}
"""Of `tilt_sample` launched by itself, and in a CUDA graph."""
CUT = {
    **dict.fromkeys(["TOP_ID", "STOPS", "TOP_K", "MODE", "CONTROL", "TARGET", "EMITTED", "TOKEN"], "*i64"),
    **dict.fromkeys(["MASS", "TEMPERATURE", "TOP_P", "MIN_P", "LOG_P"], "*fp32"),
    **{"LOGITS": "*bf16", "TOP": "*bf16", "STRICT": "*u8", "IS_STOP": "*u8"},
}
CUT_SIZES = {"BLOCK_N": 32, "BLOCK_PARTS": 32, "BOUNDS": True, "FILTERED": True, "TIES": True, "MASSES": True}
MASS = {"LOGITS": "*bf16", "TEMPERATURE": "*fp32", "STOPS": "*i64", "MASS": "*fp32"}

MERGE = {**dict.fromkeys(["PARTIAL", "WEIGHT"], "*fp32"), "OUT": "*bf16"}
MERGE_SIZES = {"PIECES": 64, "BLOCK_G": attend.HEADS_AT_ONCE, "BLOCK_V": 128}
PLACE = {
    **dict.fromkeys(["LENGTHS", "START", "POOL_ROWS", "SCRATCH", "POSITIONS", "SEQUENCES", "EMITTED"], "*i64"),
    **dict.fromkeys(["ADDRESSES", "CHOSEN", "TARGET", "OWN", "PREFIX", "PLACED_ROWS"], "*i64"),
    **dict.fromkeys(["REQUESTS", "VIRTUAL"], "*i32"),
}
PLACE_SIZES = {"BLOCK_K": 16, "BLOCK": place.BLOCK, "TABLES": False, "KEEP": True}


def head(weights: str) -> dict[str, str]:
    return {"HIDDEN": "*bf16", "PARTIAL": "*fp32", **dict.fromkeys(("W1", "B1", "W2", "B2"), weights)}


def ahead(weights: str) -> dict[str, str]:
    return {"STATES": "*bf16", "SLOT": "*i64", "OUT": "*fp32", **dict.fromkeys(("W1", "B1"), weights)}


AHEAD = {"BLOCK_M": lookahead.BLOCK_M, "BLOCK_N": lookahead.BLOCK_N, "BLOCK_H": lookahead.BLOCK_H}
AFTER = {"TOKEN": "*i64", **dict.fromkeys(("STATE", "TABLE", "W2", "B2", "DISCOUNT", "LOG_Q", "Z"), "*fp32")}
AFTER_SIZES = {"BLOCK_K": lookahead.BLOCK_K, "BLOCK_R": lookahead.BLOCK_R, "BLOCK_B": 32, "VALUE": True}
TILES = {"BLOCK_M": value_head.BLOCK_M, "BLOCK_N": value_head.BLOCK_N, "BLOCK_H": value_head.BLOCK_H}


def tilt_case(slots: int, bins: bool, graph: bool = False) -> tuple[str, Any, dict[str, str], dict[str, Any], int, int]:
    constants = {"BLOCK_K": slots, "BLOCK_B": tilt.BLOCK_B, "HAS_Q": bins, "LENGTH_FROM_Q": bins}
    name = f"tilt_sample K={slots}{' with bins' if bins else ''}{' in a graph' if graph else ''}"
    pointers = {**TILT, "RULED_BY": "*i64", "GREEDY": "*i64" if graph else "*u8"}
    constants |= GRAPH if graph else EAGER
    return name, tilt.tilt_sample_kernel, pointers, constants, tilt.warps(slots, bins), 1


def attend_case(pairs: int, cut: int) -> tuple[str, Any, dict[str, str], dict[str, Any], int, int]:
    pointers = {
        **dict.fromkeys(["QUERY", "KEYS", "VALUES", "OUT"], "*bf16"),
        **dict.fromkeys(["POOL_ROWS", "OWN"], "*i64"),
        **{"LENGTHS": "*i64", "REQUESTS": "*i32", "PARTIAL": "*fp32", "WEIGHT": "*fp32", "scale": "fp32"},
        # a launch sees that they are multiples of 16, as of every head of 16, 64 or 128 features
        **dict.fromkeys(["query_row", "query_head", "key_slot", "key_head", "value_slot", "value_head"], "i32"),
        **dict.fromkeys(["own_row", "D", "DV"], "i32"),
    }
    block = attend.block_m(pairs)
    sizes = {"BLOCK_M": block, "BLOCK_N": attend.block_n(cut), "BLOCK_D": 128, "BLOCK_V": 128}
    constants = {**sizes, "PIECES": cut, "UPCAST": False}
    name = f"attend_prefix, {pairs} pairs, {cut} pieces"
    return name, attend.prefix_kernel, pointers, constants, attend.warps(block), attend.STAGES


CASES: list[tuple[str, Any, dict[str, str], dict[str, Any], int, int]] = [
    tilt_case(16, True),
    tilt_case(16, True, graph=True),
    tilt_case(64, True),
    tilt_case(16, False),
    *(attend_case(pairs, cut) for pairs in (6, 24, 64, 96) for cut in (1, 4)),
    ("attend_prefix: merge", attend.merge_kernel, MERGE, MERGE_SIZES, 4, 1),
    ("place_candidates", place.place_kernel, PLACE, PLACE_SIZES, 4, 1),
    ("place_candidates, with tables", place.place_kernel, PLACE, {**PLACE_SIZES, "TABLES": True}, 4, 1),
    ("build_candidates: mass", candidates.mass_kernel, MASS, {"CHUNK": candidates.CHUNK, "BLOCK": 1024}, 4, 1),
    ("build_candidates: cut", candidates.cut_kernel, CUT, CUT_SIZES, 4, 1),
    *(
        (
            f"value_head {weights[1:]} weights",
            value_head.value_head_kernel,
            head(weights),
            {**TILES, "UPCAST": weights == "*fp32"},
            value_head.WARPS,
            value_head.STAGES,
        )
        for weights in ("*fp32", "*bf16")
    ),
    *(
        (
            f"lookahead: state {weights[1:]} weights",
            lookahead.state_kernel,
            ahead(weights),
            {**AHEAD, "UPCAST": weights == "*fp32"},
            lookahead.WARPS,
            lookahead.STAGES,
        )
        for weights in ("*fp32", "*bf16")
    ),
    ("lookahead: scores", lookahead.scores_kernel, AFTER, AFTER_SIZES, lookahead.WARPS, lookahead.STAGES),
]

SHORT = [*CASES[:2], *CASES[4:]]
"""For the other generations: the shapes that serve."""


def compile_case(
    capability: int,
    name: str,
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    stages: int,
) -> dict[str, Any]:
    """Compile one kernel as a launch of 16-byte aligned tensors would."""
    types = {
        p.name: "constexpr" if p.name in constants else pointers.get(p.name, "i32") for p in kernel.params
    }  # what is no pointer is a size or a stride
    even = {name for name, kind in pointers.items() if kind != "fp32"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, p in enumerate(kernel.params) if p.name in even}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    target = re.search(r"\.target (\S+)", compiled.asm["ptx"])
    assert target
    return {"kernel": name, "target": target[1], "warps": warps, "shared": compiled.metadata.shared, **found}


def main() -> None:
    for capability in map(int, sys.argv[1:]):
        for case in CASES if capability == 90 else SHORT:
            print(json.dumps(compile_case(capability, *case)), flush=True)


if __name__ == "__main__":
    main()
