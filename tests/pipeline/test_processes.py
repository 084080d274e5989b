"""Children: logs and errors, memory, and that none outlives an interruption; a server that does not start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from lenvm.cli import main
from lenvm.pipeline import server as server_module
from lenvm.pipeline.errors import PipelineError
from lenvm.pipeline.processes import MemoryMeter, run_logged, tail
from lenvm.pipeline.recipe import Server
from lenvm.pipeline.server import SglangServer, free_port


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_output_environment_and_progress(tmp_path: Path):
    log, calls = tmp_path / "logs" / "x.log", []
    code = "import os, time; print(os.environ['COLOUR'], flush=True); time.sleep(0.3)"
    run_logged(python(code), log, {"COLOUR": "green"}, watch=lambda: calls.append(1), interval=0.05)
    assert log.read_text() == "green\n"
    assert len(calls) >= 2


def test_failure_shows_the_end_of_the_log(tmp_path: Path):
    code = "import sys; [print('line', i) for i in range(100)]; sys.exit(3)"
    with pytest.raises(PipelineError, match=r"failed with exit code 3. The end of .*x\.log:\nline 75\n(.*\n)*line 99"):
        run_logged(python(code), tmp_path / "x.log")
    with pytest.raises(PipelineError, match="was ended by signal 9"):
        run_logged(python("import os; os.kill(os.getpid(), 9)"), tmp_path / "y.log")
    with pytest.raises(PipelineError, match="/no/such/program cannot be started: No such file"):
        run_logged(["/no/such/program"], tmp_path / "z.log")
    assert tail(tmp_path / "none.log") == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_children_and_grandchildren(tmp_path: Path, number: signal.Signals):
    """A pipeline process is interrupted while a child, which ignores SIGTERM, and a grandchild are at work."""
    pids = tmp_path / "pids"
    grandchild = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    child = (
        "import os, subprocess, sys, time;"
        f"p = subprocess.Popen([sys.executable, '-c', {grandchild!r}]);"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{p.pid}}'); time.sleep(60)"
    )
    log = str(tmp_path / "c.log")
    parent = (
        "import sys; from pathlib import Path\n"
        "from lenvm.pipeline import processes\n"
        "from lenvm.pipeline.commands import _errors\n"
        "original = processes.end_group\n"
        "processes.end_group = lambda p: original(p, grace=0.5)\n"
        f"with _errors('again'): processes.run_logged([sys.executable, '-c', {child!r}], Path({log!r}))"
    )
    process = subprocess.Popen(python(parent), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not (pids.exists() and len(pids.read_text().split()) == 2):
        assert time.monotonic() < deadline, process.poll()
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=20)
    assert "interrupted; again" in errors
    time.sleep(0.2)
    for pid in map(int, pids.read_text().split()):
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_memory_of_the_whole_tree():
    with MemoryMeter(interval=0.05) as alone:
        time.sleep(0.15)
    code = "import time; block = bytearray(200 * 2**20); time.sleep(0.6)"
    with MemoryMeter(interval=0.05) as both:
        subprocess.run(python(code), check=True)
    assert both.peak - alone.peak > 190 * 2**20


def test_a_server_that_ends_while_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(SglangServer, "_words", lambda *_: python("raise SystemExit('unknown option --x')"))
    with (
        pytest.raises(PipelineError, match=r"the server ended while it started(.*\n)+.*unknown option --x"),
        SglangServer("m", Server(), tmp_path / "s.log"),
    ):
        pass


def test_a_server_that_never_gets_ready_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = "import os, time; print('loading', os.getpid(), flush=True); time.sleep(60)"
    monkeypatch.setattr(SglangServer, "_words", lambda *_: python(code))
    with (
        pytest.raises(PipelineError, match=r"not ready after 1 s \(server.start_seconds\)(.*\n)+loading"),
        SglangServer("m", Server(start_seconds=1.0), tmp_path / "s.log"),
    ):
        pass
    pid = int((tmp_path / "s.log").read_text().split()[1])
    assert not psutil.pid_exists(pid)


def test_server_command_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = Server(args=("--max-total-tokens", "99"), lenvm_args=("--lenvm-max-candidates", "8"))
    for gpu in (False, True):
        monkeypatch.setattr(server_module, "has_gpu", lambda gpu=gpu: gpu)
        words = SglangServer("base", settings, tmp_path / "log", lenvm=Path("value"), port=123)._command
        text = " ".join(words)
        assert "--model-path base --host 127.0.0.1 --port 123" in text
        assert ("--device cpu" in text) is not gpu
        assert words.count("--max-total-tokens") == 1
        assert text.endswith("--max-total-tokens 99 --lenvm-model value --lenvm-max-candidates 8")
    assert "--lenvm-model" not in SglangServer("base", settings, tmp_path / "log")._command
    assert 30_000 <= free_port() < 32_768, "below the ephemeral ports"


def test_command_line_errors(tmp_path: Path):
    missing = CliRunner().invoke(main, ["pipeline", "run", str(tmp_path / "none.yaml")])
    assert missing.exit_code == 1
    assert "there is no recipe" in missing.output
