"""A SGLang server of our own: started, waited for, ended."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import httpx

from lenvm.pipeline.errors import PipelineError
from lenvm.pipeline.processes import end_group, start, tail
from lenvm.pipeline.recipe import Server as ServerSettings

CPU_ARGS = ("--device", "cpu", "--attention-backend", "torch_native", "--dtype", "float32", "--sleep-on-idle")
# without a bound SGLang reserves most of the machine's memory for the KV cache of even the smallest model
CPU_POOL = ("--max-total-tokens", "131072")
# passive: threads that spin while they wait starve the other processes; malloc: glibc otherwise gives large tensors
# back to the system after every step and takes page faults for them in the next (30-40 % of a small training)
CPU_ENV = {
    "OMP_WAIT_POLICY": "passive",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "10000000000",
    "MALLOC_TOP_PAD_": "500000000",
}
CPU_SERVER_ENV = {
    "SGLANG_USE_CPU_ENGINE": "1",
    # one thread a process: tiny matrices do not gain from more, and several processes share the cores
    "OMP_NUM_THREADS": "1",
    # nothing is compiled on this route, and importing the compiler takes some two seconds of each of three processes
    "TORCHDYNAMO_DISABLE": "1",
    **CPU_ENV,
}


def has_gpu() -> bool:
    """Whether an NVIDIA GPU is there; asks nvidia-smi, because importing torch takes seconds."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    try:
        listed = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def cpu_environment(wanted: Mapping[str, str]) -> dict[str, str]:
    """`wanted` as far as our own environment says nothing else; nothing at all where there is a GPU."""
    return {} if has_gpu() else {k: os.environ.get(k, v) for k, v in wanted.items()}


# A server listens on its port only some twenty seconds after it was chosen. In the meantime the system gives none of
# these away: ephemeral ports begin above them, and SGLang takes the ports between its parts from below them.
_PORTS = range(30_000, 32_768)


def free_port() -> int:
    """A port that nobody listens on now, and that hardly anybody will before long.

    Raises:
        PipelineError: if none is free.
    """
    for port in random.sample(_PORTS, 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise PipelineError(f"no free port among {_PORTS.start} to {_PORTS.stop - 1}; end what holds them.")


class SglangServer:
    """A server as a context manager.

    Args:
        model: base model, a directory or a name in the Hugging Face cache.
        settings: arguments, environment and how long the start may take.
        log: output file, begun anew.
        lenvm: directory of a length value model, or None for the base alone.
        port: fixed port; a free one by default.
        host: address to listen on.
        watch: called every half second while it starts.

    Raises:
        PipelineError: on entering, if it ends or does not get ready in time; with the log's last lines.
    """

    def __init__(
        self,
        model: str,
        settings: ServerSettings,
        log: Path,
        lenvm: Path | None = None,
        port: int | None = None,
        host: str = "127.0.0.1",
        watch: Callable[[], None] | None = None,
    ) -> None:
        self.port = port or free_port()
        self.host = host
        self.log = log
        self._settings = settings
        self._command = self._words(model, settings, lenvm)
        self._watch = watch
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def _words(self, model: str, settings: ServerSettings, lenvm: Path | None) -> list[str]:
        words = [sys.executable, "-m", "sglang.launch_server", "--model-path", model]
        words += ["--host", self.host, "--port", str(self.port)]
        extra: Sequence[str] = settings.args
        if lenvm is not None:
            extra = (*extra, "--lenvm-model", str(lenvm), *settings.lenvm_args)
        if not has_gpu():
            words += CPU_ARGS
            if "--max-total-tokens" not in extra:
                words += CPU_POOL
        return [*words, *extra]

    def __enter__(self) -> SglangServer:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        env = cpu_environment(CPU_SERVER_ENV)
        with self.log.open("wb") as output:
            self._process = start(self._command, output.fileno(), {**env, **self._settings.env})
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End it with everything it started."""
        if self._process is not None:
            end_group(self._process)
            self._process = None

    def alive(self) -> bool:
        """Whether the process is still there."""
        return self._process is not None and self._process.poll() is None

    def _wait(self) -> None:
        deadline = time.monotonic() + self._settings.start_seconds
        while True:
            if not self.alive():
                raise PipelineError(f"the server ended while it started. The end of {self.log}:\n{tail(self.log)}")
            try:
                if httpx.get(f"{self.url}/health", timeout=10.0).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            if time.monotonic() > deadline:
                raise PipelineError(
                    f"the server was not ready after {self._settings.start_seconds:.0f} s (server.start_seconds). "
                    f"The end of {self.log}:\n{tail(self.log)}"
                )
            if self._watch is not None:
                self._watch()
            time.sleep(0.5)
