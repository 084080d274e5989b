"""`lenvm-train x.yaml`: `llamafactory-cli train x.yaml` without the `.pth` file, hooking the host in-process.

Any other command of `llamafactory-cli` may stand first (`lenvm-train export x.yaml`).
"""

from __future__ import annotations

import os
import sys

from lenvm_lf import _hook

COMMANDS = ("train", "export", "env", "version", "help")


def main() -> None:
    """Entry point of the `lenvm-train` script."""
    if os.environ.get(_hook.DISABLE):
        raise SystemExit(f"lenvm-train: {_hook.DISABLE} is set, which switches the plug-in off; unset it.")
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.argv.insert(1, "train")
    _hook.install()
    from llamafactory import launcher

    # torchrun starts its ranks with `launcher.__file__`, a fresh interpreter without our hook: start this file instead
    launcher.__file__ = __file__
    launcher.launch()


if __name__ == "__main__":  # a torchrun rank
    _hook.install()
    from llamafactory.train.tuner import run_exp

    run_exp()
