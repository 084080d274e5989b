"""Child processes: in a group of their own, output in a log, ended by their group, memory of the whole tree watched."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import psutil

from lenvm.pipeline.errors import PipelineError

TAIL_LINES = 25


def tail(path: Path, lines: int = TAIL_LINES) -> str:
    """The last lines of a log."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])


def end_group(process: subprocess.Popen[bytes], grace: float = 10.0) -> None:
    """End a process started with `start_new_session` and all its descendants.

    The process itself is asked first: servers and launchers end their children in good order. Whatever is left of its
    group when it has ended, or after `grace` seconds, is killed.
    """
    children = _descendants(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for child in children:  # a child that left the group
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.wait()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def run_logged(
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str] | None = None,
    watch: Callable[[], None] | None = None,
    interval: float = 0.5,
) -> None:
    """Run a command to its end with its output in `log`; end it and its children if we are interrupted.

    Args:
        command: words.
        log: appended to.
        env: variables added to our own.
        watch: called about every `interval` seconds while it runs.
        interval: seconds.

    Raises:
        PipelineError: if it cannot be started or fails; with the log's last lines.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = start(command, output.fileno(), env)
        try:
            while True:
                try:
                    code = process.wait(interval)
                    break
                except subprocess.TimeoutExpired:
                    if watch is not None:
                        watch()
        except BaseException:
            end_group(process)
            raise
    if code != 0:
        how = f"was ended by signal {-code}" if code < 0 else f"failed with exit code {code}"
        raise PipelineError(f"{' '.join(command[:4])} ... {how}. The end of {log}:\n{tail(log)}")


def start(command: Sequence[str], output: int, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own, stdout and stderr into a file descriptor.

    Raises:
        PipelineError: if there is no such program.
    """
    try:
        return subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(env or {})},
            start_new_session=True,
        )
    except OSError as error:
        raise PipelineError(f"{command[0]} cannot be started: {error.strerror}.") from None


class MemoryMeter:
    """Peak resident memory of this process and everything below it, while the context lasts.

    The sum of resident sets counts pages that processes share more than once: an upper bound.

    Attributes:
        peak: bytes.
    """

    def __init__(self, interval: float = 1.0) -> None:
        self.peak = 0
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-meter", daemon=True)

    def __enter__(self) -> MemoryMeter:
        self._measure()
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval):
            self._measure()

    def _measure(self) -> None:
        total = 0
        for process in [psutil.Process(), *_descendants(os.getpid())]:
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
        self.peak = max(self.peak, total)
