#!/usr/bin/env python3
"""Does every way of launching a training do the same steps? One table of losses and gradient norms.

A tiny Qwen2 under `stage: lenvm`, the same data, order and learning rate, launched as: one process that accumulates
two micro-batches; two ranks of DDP, FSDP2, ZeRO-2, ZeRO-3, two workers of Ray (gloo, no GPU needed). Each is a real
`llamafactory-cli train`. Printed: every step of every launch, the largest relative difference to one process, and that
of the final weights. ZeRO needs `deepspeed` in the environment, Ray `ray`.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from safetensors.torch import load_file

from tests.lf.conftest import World, base_env, make_site

KEYS = ("loss", "value_loss", "length_nll", "grad_norm")
RANKS = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "DS_ACCELERATOR": "cpu", "DS_SKIP_CUDA_CHECK": "1"}


def zero(stage: int, offload: bool = False) -> dict[str, Any]:
    """DeepSpeed settings of one stage; with `offload` weights and optimizer live in the host's memory."""
    settings = json.loads((ROOT / "examples" / "train" / "ds_z3.json").read_text())
    settings["zero_optimization"]["stage"] = stage
    if stage < 3:
        settings["zero_optimization"] = {"stage": stage, "overlap_comm": False, "contiguous_gradients": True}
    if offload:
        settings["zero_optimization"] |= {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
        settings["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's own Adam would be compiled first
    return settings


LAUNCHES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "1 process, accumulation 2": ({"gradient_accumulation_steps": 2}, {}),
    "DDP, 2 ranks": ({"ddp_backend": "gloo"}, RANKS),
    "FSDP2, 2 ranks": (
        {
            "ddp_backend": "gloo",
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {
                "version": 2,
                "transformer_layer_cls_to_wrap": "Qwen2DecoderLayer",
                "state_dict_type": "FULL_STATE_DICT",
            },
        },
        RANKS | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    ),
    "ZeRO-2, 2 ranks": ({"ddp_backend": "gloo", "deepspeed": zero(2)}, RANKS),
    "ZeRO-3, 2 ranks": ({"ddp_backend": "gloo", "deepspeed": zero(3), "use_cpu": False}, RANKS),
    "ZeRO-3-offload, 2 ranks": (
        {"ddp_backend": "gloo", "deepspeed": zero(3, offload=True), "use_cpu": False},
        RANKS,
    ),
    "Ray, 2 workers": (
        {
            "ddp_backend": "gloo",
            "ray_num_workers": 2,
            "ray_init_kwargs": {"num_cpus": 20, "include_dashboard": False, "_node_ip_address": "127.0.0.1"},
            "master_addr": "127.0.0.1",
        },
        {"USE_RAY": "1"},
    ),
}
NEEDS = {
    "ZeRO-2, 2 ranks": "deepspeed",
    "ZeRO-3, 2 ranks": "deepspeed",
    "ZeRO-3-offload, 2 ranks": "deepspeed",
    "Ray, 2 workers": "ray",
}
# A worker reserves ten CPUs, and without accelerators LlamaFactory reserves one worker for every CPU of the cluster,
# which no cluster has: it would wait for ever. Two workers are reserved here instead; all else is its own.
RAY_ON_CPUS = """
import sys
from llamafactory.train import tuner
from ray.util.placement_group import placement_group
tuner.get_placement_group = lambda devices: (placement_group([{"CPU": 10}] * 2), {"CPU": 10})
sys.argv = ["llamafactory-cli", sys.argv[1]]
tuner.run_exp()
"""


def launch(world: World, name: str, steps: int) -> Path:
    """Train; returns the output folder.

    Raises:
        RuntimeError: with the end of its output, if it failed.
    """
    changes, env = LAUNCHES[name]
    output = world.root / name.partition(",")[0].replace(" ", "_")
    settings = world.settings(output, per_device_train_batch_size=6, max_steps=steps, learning_rate=1e-3, **changes)
    env = env | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if "USE_RAY" in env:
        file = world.root / "ray.yaml"
        file.write_text(yaml.safe_dump(settings), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-c", RAY_ON_CPUS, str(file)],
            env={**base_env(), "PYTHONPATH": os.pathsep.join([str(ROOT), str(world.sites["pth"])]), **env},
            cwd=world.root,
            capture_output=True,
            text=True,
            timeout=600,
        )
    else:
        done = world.run(settings, env=env)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-6000:]}")
    return output


def difference(found: Path, wanted: Path) -> float:
    """Largest difference of a weight, over the largest weight."""
    a, b = (load_file(run / "model.safetensors") for run in (found, wanted))
    if a.keys() != b.keys():
        raise RuntimeError(f"{found.name} saved other weights: {sorted(a.keys() ^ b.keys())}")
    return max(float((a[k].float() - b[k].float()).abs().max() / b[k].float().abs().max().clamp(min=1e-6)) for k in a)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", nargs="+", choices=[name.split()[0].strip(",") for name in LAUNCHES][1:])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/equivalence.csv"))
    options = parser.parse_args()
    for key, value in base_env().items():
        os.environ[key] = value
    names = [n for i, n in enumerate(LAUNCHES) if not i or not options.only or n.split()[0].strip(",") in options.only]
    runs: dict[str, Path] = {}
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        sites = {"pth": make_site(Path(folder) / "site_pth", ""), "none": Path(folder)}
        world = World(Path(folder) / "world", sites)
        for name in names:
            if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
                print(f"{name}: left out, {NEEDS[name]} is not installed", flush=True)
                continue
            began = time.monotonic()
            try:
                runs[name] = launch(world, name, options.steps)
            except RuntimeError as error:  # the others still say something
                failed.append(name)
                print(error, file=sys.stderr, flush=True)
                continue
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        if names[0] not in runs:
            raise SystemExit(f"{names[0]} failed: nothing to compare with")
        first = runs[names[0]]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("launch", "step", *KEYS))
            for name, run in runs.items():
                columns = [World.steps(run, key) for key in KEYS]
                for step, values in enumerate(zip(*columns, strict=True), start=1):
                    writer.writerow((name, step, *values))
                    print(f"{name:<26} {step:>3}  " + "  ".join(f"{value:.7f}" for value in values))
        print(f"\n{'largest relative difference':<28}" + "".join(f"{key:>13}" for key in (*KEYS, "weights")))
        for name, run in runs.items():
            cells = []
            for key in KEYS:
                pairs = zip(World.steps(run, key), World.steps(first, key), strict=True)
                cells.append(max(abs(a - b) / abs(b) for a, b in pairs))
            print(f"{name:<28}" + "".join(f"{value:13.1e}" for value in (*cells, difference(run, first))))
    print(options.out)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
