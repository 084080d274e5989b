#!/usr/bin/env python3
"""One layer's attention of K candidates behind a prefix, in the ways there are, at growing contexts.

On a GPU: `ours` (`attend_prefix`), `gathered` (torch's attention on gathered keys and values, under a mask), `decode
rows` (SGLang's decode kernel, to which K candidates are K sequences), `tree` (SGLang's extend kernel under a tree mask)
and `cascade` (FlashInfer's two-level cascade), the last three where SGLang and FlashInfer are installed; floors are
each key and value read once (`floor`), and read once for every candidate (`floor of decode rows`). `--cpu`: `ours`,
which is `gathered` there, and `decode rows` (SGLang's loop). Every way must say what the first says. `--dry` runs all
but the cascade on a CPU in tiny sizes, the kernels in Triton's interpreter: its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

# not this folder: its kernels.py would stand for the package of that name, which transformers looks for
sys.path[0] = str(Path(__file__).resolve().parent.parent)

# before Triton: under --dry it switches the interpreter on
from benchmarks.kernels import CPU, DEVICE, DRY, graphed, machine_speed, times  # isort: skip

import torch
from torch import Tensor

from benchmarks.common import Table
from lenvm_kernels import PrefixMasks, SharedRows, attend_prefix, share_prefix

Ways = dict[str, Callable[[], Tensor]]
TOLERANCE = 2e-2 if DEVICE == "cuda" else 1e-4


class Case:
    """R rows of K candidates behind prefixes of `context` tokens, in slots as a busy server scatters them."""

    def __init__(self, rows: int, slots: int, context: int, heads: int, kv_heads: int, width: int) -> None:
        g = torch.Generator().manual_seed(0)
        dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
        pool = rows * (context + slots) + 1
        every = torch.randperm(pool - 1, generator=g) + 1
        table = every[: rows * context].view(rows, context)
        self.rows, self.slots, self.context, self.kv_heads = rows, slots, context, kv_heads
        self.table = torch.nn.functional.pad(table, (0, 1)).int().to(DEVICE)
        self.own = every[rows * context :].view(rows, slots).to(DEVICE)
        self.query = torch.randn(rows * slots, heads, width, generator=g).to(DEVICE, dtype)
        self.k, self.v = (torch.randn(pool, kv_heads, width, generator=g).to(DEVICE, dtype) for _ in range(2))
        self.lengths = torch.full((rows,), context, device=DEVICE)
        self.pool_rows, self.scaling = torch.arange(rows, device=DEVICE), width**-0.5

    @property
    def prefixes(self) -> Tensor:
        """[R * context] int64 slots."""
        return self.table[:, :-1].reshape(-1).long()

    def starts(self, count: int, each: int) -> Tensor:
        """[count + 1] int32: where each of `count` rows of `each` begins."""
        return torch.arange(0, count * each + 1, each, dtype=torch.int32, device=DEVICE)

    def ways(self) -> Ways:
        """By name; `ours` is what the others must agree with."""
        if CPU:
            return {"ours": self.gathered(), "decode rows": self.loop()}
        found = {"ours": self.shared(), "gathered": self.gathered()}
        if importlib.util.find_spec("sglang") is not None:
            found |= {"decode rows": self.decode_rows(), "tree": self.tree()}
        if DEVICE == "cuda" and importlib.util.find_spec("flashinfer") is not None:
            found["cascade"] = self.cascade()
        return found

    def shared(self) -> Callable[[], Tensor]:
        rows = SharedRows(self.pool_rows, self.lengths, self.own, self.table)
        return lambda: attend_prefix(self.query, rows, self.k, self.v, self.scaling)

    def decode_rows(self) -> Callable[[], Tensor]:
        from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

        count, heads, width = self.query.shape
        prefixes = self.prefixes.view(self.rows, 1, -1).expand(-1, self.slots, -1)
        indices = torch.cat([prefixes, self.own[..., None]], dim=-1).flatten()
        starts, out, splits = self.starts(count, self.context + 1), torch.empty_like(self.query), 8
        logits = torch.empty(count, heads, splits, width, device=DEVICE)
        lse, used = torch.empty(count, heads, splits, device=DEVICE), torch.full((count,), splits, device=DEVICE).int()

        def call() -> Tensor:
            decode_attention_fwd(
                self.query, self.k, self.v, out, starts, indices, logits, lse, used, splits, self.scaling, 1.0, 1.0
            )
            return out

        return call

    def tree(self) -> Callable[[], Tensor]:
        from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

        sees = torch.ones(self.slots, self.context + self.slots, dtype=torch.uint8)
        sees[:, self.context :] = torch.eye(self.slots, dtype=torch.uint8)
        mask = sees.flatten().repeat(self.rows).to(DEVICE)
        at, out = self.starts(self.rows, sees.numel()).long(), torch.empty_like(self.query)
        new = self.k[self.own.flatten()].contiguous(), self.v[self.own.flatten()].contiguous()
        starts, prefixes = (self.starts(self.rows, self.slots), self.starts(self.rows, self.context)), self.prefixes

        def call() -> Tensor:
            extend_attention_fwd(
                self.query, *new, out, self.k, self.v, *starts, prefixes, mask, True, at, self.slots,
                1.0, 1.0, sm_scale=self.scaling,
            )  # fmt: skip
            return out

        return call

    def cascade(self) -> Callable[[], Tensor]:
        from flashinfer import MultiLevelCascadeAttentionWrapper

        count, heads, width = self.query.shape
        workspace = torch.empty(256 * 2**20, dtype=torch.uint8, device=DEVICE)
        wrapper = MultiLevelCascadeAttentionWrapper(2, workspace, "NHD")
        ends = [torch.ones(n, dtype=torch.int32, device=DEVICE) for n in (self.rows, count)]
        wrapper.plan(
            [self.starts(self.rows, self.slots), self.starts(count, 1)],
            [self.starts(self.rows, self.context), self.starts(count, 1)],
            [self.prefixes.int(), self.own.flatten().int()],
            ends, heads, self.kv_heads, width, 1,
            sm_scale=self.scaling, q_data_type=self.query.dtype, kv_data_type=self.k.dtype,
        )  # fmt: skip
        pages = self.k[:, None], self.v[:, None]
        return lambda: wrapper.run(self.query, pages)

    def gathered(self) -> Callable[[], Tensor]:
        from lenvm_sglang.attention import attend

        masks = PrefixMasks(self.query.dtype, DEVICE)
        layout = share_prefix(self.lengths, self.pool_rows, self.own, self.table, self.context, masks)
        return lambda: attend(self.query, layout, self.k, self.v, self.scaling)

    def loop(self) -> Callable[[], Tensor]:
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

        one = TorchNativeAttnBackend._run_sdpa_forward_decode
        one = getattr(one, "__wrapped__", one)
        table = self.table.repeat_interleave(self.slots, dim=0)
        table[:, self.context] = self.own.flatten().int()
        out, lengths = torch.empty_like(self.query), (self.lengths + 1).repeat_interleave(self.slots)
        index, grouped = torch.arange(len(table)), self.query.shape[1] != self.kv_heads

        def call() -> Tensor:
            one(object(), self.query, out, self.k, self.v, table, index, lengths, None, self.scaling, grouped)
            return out

        return call

    def floors(self, copy: float) -> dict[str, list[float]]:
        """Microseconds at `copy` bytes a microsecond."""
        slot = 2 * self.kv_heads * self.query.shape[2] * self.query.element_size()
        once = self.rows * (self.context + self.slots) * slot
        each = self.rows * self.slots * (self.context + 1) * slot
        return {"floor": [once / copy], "floor of decode rows": [each / copy]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dry", action="store_true", help="tiny sizes in Triton's interpreter; times mean nothing")
    parser.add_argument("--cpu", action="store_true", help="what runs on a CPU")
    parser.add_argument("--context", type=int, nargs="+", help="tokens of the prefixes")
    parser.add_argument("--batch", type=int, nargs="+", help="rows")
    parser.add_argument("--candidates", type=int, default=3 if DRY else 16, help="K")
    parser.add_argument("--repeats", type=int, default=2 if DRY else 20 if CPU else 100, help="timed calls of each way")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/attention.csv"), help="CSV file to write")
    options = parser.parse_args()
    if not (DRY or CPU or torch.cuda.is_available()):
        parser.error("there is no CUDA device; --cpu times what runs on a CPU, --dry runs everything on one")
    contexts, batches, shape = [128, 1024, 8192, 32_768], [1, 8, 32], (12, 2, 128)  # of a 1.5B value model
    if DRY:
        contexts, batches, shape = [5, 70], [2], (4, 2, 16)
    elif CPU:
        contexts, batches, shape = [128, 1024, 4096], [1, 8], (8, 4, 32)
        torch.set_num_threads(1)
    copy = machine_speed()[0]
    with Table(options.out, "dry run: times mean nothing" * DRY) as table, torch.no_grad():
        for context in options.context or contexts:
            for rows in options.batch or batches:
                case = Case(rows, options.candidates, context, *shape)
                sizes = f"R={rows} K={options.candidates} L={context} Hq={shape[0]} Hkv={shape[1]} D={shape[2]}"
                ways = case.ways()
                said = {name: way().clone() for name, way in ways.items()}
                for name, one in said.items():
                    if not torch.allclose(one, said["ours"], rtol=TOLERANCE, atol=TOLERANCE):
                        worst = float((one - said["ours"]).abs().max())
                        raise SystemExit(f"attention: {name!r} and 'ours' differ by {worst:.3g} at {sizes}.")
                found: dict[str, list[float]] = {name: [] for name in ways}
                for _ in range(2):  # in turn, because a machine's speed changes
                    for name, way in ways.items():
                        found[name] += times(graphed(way), options.repeats // 2)
                for name, values in (found | case.floors(copy)).items():
                    table.add("attention us", name, sizes, values)
                middle = {name: float(torch.tensor(values).median()) for name, values in found.items()}
                others = ", ".join(f"{n}/ours {t / middle['ours']:.2f}" for n, t in middle.items() if n != "ours")
                print(f"{sizes}: ours {middle['ours']:.0f} us; {others}", flush=True)
    print(f"in {options.out}")


if __name__ == "__main__":
    main()
