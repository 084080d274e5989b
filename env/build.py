#!/usr/bin/env python3
"""Build the environments of LenVM: `python3 env/build.py train`, `serve`, and for tests `serve-floor`.

Standard library only. They land in `.envs/train` and so on in the checkout, or under the folder that the environment
variable LENVM_ENVS names. An environment is built once and kept while what defines it stays the same: the pins, the
stand-ins, this file and the Python version. With a GPU the plain extras of pyproject.toml are installed; without one
the complete pins of `env/pins` and the stand-ins of `env/stand_ins`. `serve-floor` has the oldest supported SGLang;
without a GPU it is a layer over `serve`. `env/README.md` says why.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "env" / "pins"
STAND_INS = ROOT / "env" / "stand_ins"
NAMES = ("train", "serve", "serve-floor")
EXTRAS = {"train": "train,dev", "serve": "serve,eval,dev", "serve-floor": "serve,eval,dev"}
BELOW = {"serve-floor": "serve"}  # its CPU pins are only what it has otherwise; the rest is the environment below it
STAMP = "lenvm-env.json"
OLDEST_PYTHON = {"cpu": (3, 11), "gpu": (3, 10)}  # the CPU pins hold numpy 2.4, which needs 3.11
# What a fresh environment must be able to import. It also leaves the bytecode of just these modules behind, which is
# why pip is told not to compile everything it installs.
SERVER = (
    "import torch, transformers.models.qwen2.modeling_qwen2, torchvision, lenvm\n"
    "import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler, sglang.srt.models.registry\n"
    "import sglang.srt.managers.detokenizer_manager"
)
CHECKS = {
    "train": "import torch, transformers.models.qwen2.modeling_qwen2, torchaudio, torchvision, lenvm\n"
    "import llamafactory.train.tuner",
    "serve": f"{SERVER}, openai, matplotlib.pyplot, hypothesis, schemathesis",
    "serve-floor": SERVER,
}


class BuildError(Exception):
    """A step failed; the message says what to do about it."""


# ---------------------------------------------------------------------------------------------- what is to be built


def has_gpu() -> bool:
    """Whether there is an NVIDIA GPU: `nvidia-smi -L` lists one, or the torch of this interpreter sees one."""
    smi = shutil.which("nvidia-smi")
    if smi and "GPU" in subprocess.run([smi, "-L"], capture_output=True, text=True, check=False).stdout:
        return True
    probe = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False).returncode == 0


def find_python(device: str, wanted: str | None) -> str:
    """Path of the interpreter to build with: the one asked for, else python3.11 (the one tested), else this one."""
    path = shutil.which(wanted) if wanted else shutil.which("python3.11") or sys.executable
    if path is None:
        raise BuildError(f"no interpreter called {wanted!r} was found; give --python the path of one")
    try:
        version = python_version(path)
    except (OSError, subprocess.CalledProcessError):
        path, version = sys.executable, sys.version_info[:3]
    oldest = OLDEST_PYTHON[device]
    if version[:2] < oldest:
        raise BuildError(
            f"{path} is Python {'.'.join(map(str, version))}; the {device} environments need "
            f"{oldest[0]}.{oldest[1]} or newer: install python3.11, or give --python the path of one"
        )
    return path


def python_version(path: str) -> tuple[int, ...]:
    code = "import sys; print(*sys.version_info[:3])"
    out = subprocess.run([path, "-c", code], capture_output=True, text=True, check=True).stdout
    return tuple(int(part) for part in out.split())


def dependency_tables(pyproject: str) -> str:
    """The part of pyproject.toml that decides what a GPU environment holds: dependencies and extras."""
    start = pyproject.index("\ndependencies = [")
    return pyproject[start : pyproject.index("\n[project.scripts]", start)]


def environment_key(name: str, device: str, version: tuple[int, ...]) -> str:
    """Hash of everything that an environment is made of, other than the checkout itself."""
    digest = hashlib.sha256(f"{name} {device} {version}".encode())
    if device == "cpu":
        if name in BELOW:
            digest.update(environment_key(BELOW[name], device, version).encode())
        files = [PINS / f"{name}-cpu.txt", *sorted(p for p in STAND_INS.rglob("*") if p.suffix in (".py", ".pth"))]
        for path in [Path(__file__), *files]:
            digest.update(path.name.encode() + path.read_bytes())
    else:
        pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        digest.update(Path(__file__).read_bytes() + dependency_tables(pyproject).encode())
        if name in BELOW:
            digest.update((PINS / f"{name}-cpu.txt").read_bytes())
    return digest.hexdigest()[:16]


def checkout_key() -> str:
    """Hash of what an editable install copies out of the checkout: its path, the metadata, the import hook's files."""
    digest = hashlib.sha256(str(ROOT).encode())
    for path in ("pyproject.toml", "lenvm_lf/lenvm_lf.pth", "lenvm_lf/lenvm_lf.start"):
        digest.update((ROOT / path).read_bytes())
    return digest.hexdigest()[:16]


def pin(package: str, pins: Path) -> str:
    """The line `package==version` of a pin file."""
    return next(line for line in pins.read_text(encoding="utf-8").splitlines() if line.startswith(f"{package}=="))


# ------------------------------------------------------------------------------------------------------- the builder


class Builder:
    """One environment on its way: runs the steps, logs what they print, prints a line for each."""

    def __init__(self, name: str, device: str, home: Path, python: str) -> None:
        self.name, self.device, self.base_python = name, device, python
        self.home = home / name
        self.below = home / BELOW[name] if device == "cpu" and name in BELOW else None
        self.log = home / f"{name}.log"
        self.python = self.home / "bin" / "python"
        self.version = python_version(python)
        self.done = 0
        self.steps = 6 if device == "cpu" and self.below is None else 4

    def stamp(self) -> dict[str, str]:
        """What the finished environment says it was built from; empty if there is none, or a build was cut short."""
        try:
            return dict(json.loads((self.home / STAMP).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def write_stamp(self, **keys: str) -> None:
        partial = self.home / (STAMP + ".new")
        partial.write_text(json.dumps(keys, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.home / STAMP)

    def build(self) -> None:
        """Bring the environment up to date: nothing, the checkout's metadata only, or everything."""
        key = environment_key(self.name, self.device, self.version)
        checkout = "" if self.below else checkout_key()  # a layer has it from the environment below
        stamp = self.stamp()
        if stamp.get("environment") == key and self.python.exists():
            if stamp.get("checkout") == checkout:
                return
            self.done, self.steps = 0, 1
            self.install_checkout()
        else:
            began = time.monotonic()
            self.log.write_text("", encoding="utf-8")
            self.build_all()
            seconds = time.monotonic() - began
            print(f"[{self.name}] ready: {self.home} ({self.device}, {seconds:.0f} s in all)", flush=True)
        self.write_stamp(environment=key, checkout=checkout, device=self.device)

    def build_all(self) -> None:
        pins = PINS / f"{self.name}-cpu.txt"
        with self.step("virtual environment"):
            shutil.rmtree(self.home, ignore_errors=True)
            self.run([self.base_python, "-m", "venv", *(["--without-pip"] if self.below else []), str(self.home)])
        if self.below:
            self.build_layer(pins, self.below)
            return
        if self.device == "gpu":
            with self.step(f"packages of lenvm[{EXTRAS[self.name]}]"):
                oldest = [pin("sglang", pins)] if self.name in BELOW else []
                self.pip("--editable", f"{ROOT}[{EXTRAS[self.name]}]", *oldest)
        else:
            torch = pin("torch", pins)
            with self.step(f"{torch}, CPU build"):
                self.pip("--no-deps", "--no-compile", torch)
                self.refuse_cuda_torch(torch)
            with self.step(f"packages of {pins.relative_to(ROOT)}"):
                self.pip("--no-deps", "--no-compile", "--requirement", str(pins))
            with self.step("CPU stand-ins"):
                self.copy_stand_ins()
        self.install_checkout()
        with self.step("check that it imports"):
            self.run([str(self.python), "-c", CHECKS[self.name]])

    def build_layer(self, pins: Path, below: Path) -> None:
        """The packages of `pins` ahead of those of the environment below, which come with all that their .pth do."""
        with self.step(f"packages of {pins.relative_to(ROOT)}"):
            self.pip("--no-deps", "--no-compile", "--requirement", str(pins))
        with self.step(f"the rest from {below}"):
            rest = f"import site; site.addsitedir({str(self.site_packages(below))!r})\n"
            (self.site_packages() / "lenvm_below.pth").write_text(rest, encoding="utf-8")
        with self.step("check that it imports"):
            host = pin("sglang", pins).partition("==")[2]
            right = f"import sglang; assert sglang.__version__ == {host!r}, sglang.__version__"
            self.run([str(self.python), "-c", f"{right}\n{CHECKS[self.name]}"])

    def install_checkout(self) -> None:
        with self.step("this checkout, editable"):
            if self.device == "gpu":  # hatchling is in the dev extra, so the build needs no isolation here either
                self.pip("hatchling")
            self.pip("--no-deps", "--no-build-isolation", "--editable", str(ROOT))

    def refuse_cuda_torch(self, pin: str) -> None:
        """Refuse a CUDA torch, under which the CPU recipe is wrong, before its gigabytes of friends arrive."""
        version_file = self.site_packages() / "torch" / "version.py"
        cuda = re.search(r"^cuda\b[^=]*=\s*(.+)$", version_file.read_text(encoding="utf-8"), re.MULTILINE)
        if cuda is None or cuda.group(1).strip() != "None":
            raise BuildError(
                f"this machine has no GPU, and the index that pip uses gave a CUDA build for {pin}. "
                "Set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index (its install page shows it for "
                "'Compute Platform: CPU') and run this again; if there is a GPU that was not found, "
                f"run `python3 env/build.py {self.name} --device gpu`"
            )

    def copy_stand_ins(self) -> None:
        site = self.site_packages()
        for source in (STAND_INS / "both", STAND_INS / self.name):
            if source.is_dir():
                shutil.copytree(source, site, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        if self.name == "train":
            self.run([str(self.python), str(STAND_INS / "torchaudio_pure.py")])

    def site_packages(self, home: Path | None = None) -> Path:
        return (home or self.home) / "lib" / f"python{self.version[0]}.{self.version[1]}" / "site-packages"

    # ---- running things

    def pip(self, *arguments: str) -> None:
        quiet = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
        if self.below:  # whose pip it is: a layer has none of its own
            pip = [str(self.below / "bin" / "python"), "-m", "pip", "--python", str(self.python)]
        else:
            pip = [str(self.python), "-m", "pip"]
        self.run([*pip, "install", *quiet, *arguments])

    def run(self, command: list[str]) -> None:
        """Run a command, its output going to the log. Raises BuildError with one sentence if it fails."""
        dropped = ("PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")
        environment = {k: v for k, v in os.environ.items() if k not in dropped}
        environment["SGLANG_USE_CPU_ENGINE"] = "1" if self.device == "cpu" else "0"
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(command)}\n".encode())
            log.flush()
            start = log.tell()
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, check=False)
        if code.returncode != 0:
            with self.log.open("rb") as log:
                log.seek(start)
                output = log.read().decode(errors="replace")
            raise BuildError(explain(output, self.name))

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        self.done += 1
        head = f"[{self.name} {self.done}/{self.steps}] {title}"
        print(f"{head} ...", end="", flush=True)
        began = time.monotonic()
        try:
            yield
        except BaseException as error:
            reason = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            print(f" {reason} after {time.monotonic() - began:.0f} s", flush=True)
            if isinstance(error, BuildError):
                raise BuildError(f"step '{title}': {error} (whole output: {self.log})") from None
            raise
        print(f" {time.monotonic() - began:.0f} s", flush=True)


def explain(output: str, name: str) -> str:
    """One sentence on why pip (or an import) failed, after the last lines of what it printed."""
    lines = [line for line in output.splitlines() if line.strip()]
    tail = "\n".join(f"    {line}" for line in lines[-12:])
    again = f"then run `make env-{name}` again"
    missing = re.search(r"No matching distribution found for (\S+)", output)
    conflict = re.search(r"Cannot install (.+?) because these package versions have conflicting", output)
    unbuilt = re.search(r"Failed building wheel for (\S+)|Failed to build (\S+)", output)
    module = re.search(r"(?:ModuleNotFoundError|ImportError): (.+)", output)
    if missing:
        what = (
            f"pip found no distribution for {missing.group(1)}: see that the index in use has it for this Python and "
            f"platform (`pip config list`, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL), {again}"
        )
    elif re.search(r"No space left on device", output):
        what = f"the disk is full: an environment takes about 3 GB; make room or set LENVM_ENVS, {again}"
    elif re.search(r"ConnectionError|NewConnectionError|Read timed out|Max retries exceeded|Temporary failure", output):
        what = f"the package index could not be reached: check the network or PIP_INDEX_URL, {again}"
    elif conflict:
        what = f"these requirements contradict one another: {conflict.group(1)}; fix the bounds in pyproject.toml"
    elif unbuilt:
        package = unbuilt.group(1) or unbuilt.group(2)
        what = f"{package} has no wheel for this platform and did not build: use Python 3.11 on Linux x86-64, {again}"
    elif module:
        what = f"what was installed does not import: {module.group(1)}"
    else:
        what = "the command failed; its last lines are below"
    return f"{what}\n{tail}"


@contextlib.contextmanager
def only_build(home: Path, name: str) -> Iterator[None]:
    """Hold the lock of one environment, so that a second build waits for the first and then finds it done."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / f".{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"[{name}] another build of this environment is under way; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def environments_home() -> Path:
    return Path(os.environ.get("LENVM_ENVS") or ROOT / ".envs").expanduser().resolve()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="+", choices=NAMES, metavar="train|serve|serve-floor", help="which to build")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto", help="auto: gpu if there is one")
    parser.add_argument("--python", help="interpreter to build with (default: python3.11, else the one running this)")
    options = parser.parse_args(arguments)
    device = options.device if options.device != "auto" else "gpu" if has_gpu() else "cpu"
    try:
        python = find_python(device, options.python)
        needed = [BELOW[name] for name in options.names if device == "cpu" and name in BELOW]
        for name in dict.fromkeys([*needed, *options.names]):
            with only_build(environments_home(), name):
                Builder(name, device, environments_home(), python).build()
    except BuildError as error:
        print(f"\nenv/build.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nenv/build.py: interrupted; the next run builds the unfinished environment afresh", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
