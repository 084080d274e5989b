"""The environment builder, with pip replaced: what is built when, and what it says when it cannot."""

import fcntl
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


class Recorder:
    """Stands for `Builder.run`: makes the folders a venv would, notes the commands, fails where it is told to."""

    def __init__(self, build: ModuleType, torch_cuda: str = "None", fail_at: str | None = None) -> None:
        self.build, self.torch_cuda, self.fail_at = build, torch_cuda, fail_at
        self.commands: list[str] = []

    def __call__(self, builder: Any, command: list[str]) -> None:
        line = " ".join(command)
        self.commands.append(line)
        if self.fail_at and self.fail_at in line:
            raise self.build.BuildError("what pip said")
        if "-m venv" in line:
            (builder.home / "bin").mkdir(parents=True)
            (builder.home / "bin" / "python").write_text("")
            torch = builder.site_packages() / "torch"
            torch.mkdir(parents=True)
            (torch / "version.py").write_text(f"__version__ = '2.13.0'\ncuda: Optional[str] = {self.torch_cuda}\n")


@pytest.fixture
def record(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(**options: Any) -> Recorder:
        recorder = Recorder(build, **options)
        monkeypatch.setattr(build.Builder, "run", lambda builder, command: recorder(builder, command))
        return recorder

    return make


def builder(build: ModuleType, home: Path, name: str = "train", device: str = "cpu") -> Any:
    home.mkdir(exist_ok=True)
    return build.Builder(name, device, home, sys.executable)


def test_a_cpu_build_takes_its_steps_in_order(
    build: ModuleType, record: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder = record()
    builder(build, tmp_path).build()
    marks = ["-m venv", "torch==2.13.0", "train-cpu.txt", "torchaudio_pure.py", "--editable", "import llamafactory"]
    assert [mark in command for mark, command in zip(marks, recorder.commands, strict=True)] == [True] * 6
    assert all("--no-deps" in c for c in recorder.commands if "pip install" in c)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("]")[0] for line in lines] == [*(f"[train {i}/6" for i in range(1, 7)), "[train"]
    assert all(line.endswith(" s") for line in lines[:6])


def test_a_finished_environment_is_left_alone(build: ModuleType, record: Any, tmp_path: Path) -> None:
    record()
    builder(build, tmp_path).build()
    again = record()
    builder(build, tmp_path).build()
    assert again.commands == []


def test_other_pins_or_another_python_are_another_environment(
    build: ModuleType, record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build.environment_key("train", "cpu", (3, 11, 7)) != build.environment_key("train", "cpu", (3, 11, 8))
    record()
    builder(build, tmp_path / "envs").build()
    (tmp_path / "train-cpu.txt").write_text("torch==2.13.0\nnumpy==2.4.7\n")
    monkeypatch.setattr(build, "PINS", tmp_path)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "checkout_key", lambda: "as before")
    again = record()
    builder(build, tmp_path / "envs").build()
    assert len(again.commands) == 6


def test_a_change_of_metadata_only_reinstalls_the_checkout(
    build: ModuleType, record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record()
    builder(build, tmp_path).build()
    again = record()
    monkeypatch.setattr(build, "checkout_key", lambda: "another entry point")
    builder(build, tmp_path).build()
    assert len(again.commands) == 1
    assert "--editable" in again.commands[0]


@pytest.mark.parametrize("step", ["torch==2.13.0", "train-cpu.txt", "--editable"])
def test_an_interrupted_build_is_done_afresh(build: ModuleType, record: Any, tmp_path: Path, step: str) -> None:
    record(fail_at=step)
    with pytest.raises(build.BuildError, match="what pip said"):
        builder(build, tmp_path).build()
    (tmp_path / "train" / "half-installed").write_text("")
    record()
    builder(build, tmp_path).build()
    assert not (tmp_path / "train" / "half-installed").exists()


def test_a_cuda_torch_is_refused_with_the_way_out(build: ModuleType, record: Any, tmp_path: Path) -> None:
    recorder = record(torch_cuda="'13.0'")
    with pytest.raises(build.BuildError, match=r"no GPU.*CUDA build for torch==2\.13\.0.*PIP_EXTRA_INDEX_URL"):
        builder(build, tmp_path).build()
    assert len(recorder.commands) == 2, "nothing is downloaded after it"


def test_a_gpu_gets_the_plain_extras_and_no_stand_in(build: ModuleType, record: Any, tmp_path: Path) -> None:
    recorder = record()
    builder(build, tmp_path, "serve", "gpu").build()
    assert any("[serve,eval,dev]" in command for command in recorder.commands)
    assert not any("cpu.txt" in command or "stand_ins" in command for command in recorder.commands)
    assert not list((tmp_path / "serve").rglob("sgl_kernel")), "the stand-in stays out"


def test_the_serving_environment_gets_the_stand_ins(build: ModuleType, record: Any, tmp_path: Path) -> None:
    record()
    serve = builder(build, tmp_path, "serve")
    serve.build()
    names = {path.name for path in serve.site_packages().iterdir()}
    assert names >= {"sgl_kernel", "lenvm_torchvision_schemas.py", "lenvm_torchvision_schemas.pth"}


def test_the_oldest_host_is_a_layer_over_the_serving_environment(
    build: ModuleType, record: Any, tmp_path: Path
) -> None:
    recorder = record()
    floor = builder(build, tmp_path, "serve-floor")
    floor.build()
    marks = ["-m venv --without-pip", "serve-floor-cpu.txt", "import sglang; assert sglang.__version__ =="]
    assert [mark in command for mark, command in zip(marks, recorder.commands, strict=True)] == [True] * 3
    assert recorder.commands[1].startswith(f"{tmp_path / 'serve' / 'bin' / 'python'} -m pip --python {floor.python}")
    (line,) = (floor.site_packages() / "lenvm_below.pth").read_text().splitlines()
    assert str(floor.site_packages(tmp_path / "serve")) in line
    again = record()
    builder(build, tmp_path, "serve-floor").build()
    assert again.commands == []


def test_what_lies_below_a_layer_is_part_of_it(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build.environment_key("serve-floor", "cpu", (3, 11, 7))
    for file in build.PINS.iterdir():
        (tmp_path / file.name).write_text(file.read_text() + ("# changed\n" if file.name == "serve-cpu.txt" else ""))
    monkeypatch.setattr(build, "PINS", tmp_path)
    assert build.environment_key("serve-floor", "cpu", (3, 11, 7)) != before


def test_a_gpu_gets_the_oldest_host_in_an_environment_of_its_own(
    build: ModuleType, record: Any, tmp_path: Path
) -> None:
    recorder = record()
    builder(build, tmp_path, "serve-floor", "gpu").build()
    oldest = build.pin("sglang", build.PINS / "serve-floor-cpu.txt")
    assert any(command.endswith(f"[serve,eval,dev] {oldest}") for command in recorder.commands)


def test_the_pinned_hosts_are_the_ends_of_the_supported_range(build: ModuleType) -> None:
    from lenvm_sglang.versions import SUPPORTED

    pinned = [build.pin("sglang", build.PINS / f"{name}-cpu.txt") for name in ("serve-floor", "serve")]
    assert pinned == [f"sglang=={version}" for version in (min(SUPPORTED), max(SUPPORTED))]


def test_a_second_build_waits_for_the_first(
    build: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []
    with (tmp_path / ".train.lock").open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)

        def second() -> None:
            with build.only_build(tmp_path, "train"):
                order.append("second")

        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        order.append("first")
        fcntl.flock(first, fcntl.LOCK_UN)
        thread.join(timeout=10)
    assert order == ["first", "second"]
    assert "waiting for it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (
            "ERROR: Could not find a version that satisfies the requirement foo==1.2\n"
            "ERROR: No matching distribution found for foo==1.2",
            r"pip found no distribution for foo==1\.2: .*PIP_INDEX_URL.*make env-train",
        ),
        ("OSError: [Errno 28] No space left on device", r"the disk is full: .*LENVM_ENVS"),
        ("urllib3 NewConnectionError: refused", r"the package index could not be reached"),
        (
            "ERROR: Cannot install a==1 because these package versions have conflicting dependencies.",
            "contradict.* a==1",
        ),
        ("ERROR: Failed building wheel for av", r"av has no wheel for this platform"),
        ("ModuleNotFoundError: No module named 'dill'", "No module named 'dill'"),
        ("Segmentation fault", "the command failed"),
    ],
)
def test_a_failure_is_explained_in_a_sentence(build: ModuleType, output: str, sentence: str) -> None:
    explained = build.explain(output, "train")
    assert re.search(sentence, explained.splitlines()[0])
    assert output.splitlines()[-1] in explained, "the last lines of the output are shown"


def test_the_log_and_the_command_are_named(build: ModuleType, tmp_path: Path) -> None:
    broken = builder(build, tmp_path)
    broken.log.write_text("")
    with pytest.raises(build.BuildError, match=r"(?s)step 'try': .*no-such-package.*train\.log"), broken.step("try"):
        broken.run(
            [sys.executable, "-c", "print('ERROR: No matching distribution found for no-such-package'); exit(1)"]
        )
    assert "no-such-package" in broken.log.read_text()


def test_pythons(build: ModuleType) -> None:
    with pytest.raises(build.BuildError, match=r"no interpreter called 'python2\.0'"):
        build.find_python("cpu", "python2.0")
    build.OLDEST_PYTHON["cpu"] = (99, 0)
    with pytest.raises(build.BuildError, match=r"is Python .*; the cpu environments need 99\.0 or newer"):
        build.find_python("cpu", sys.executable)


def test_dependency_tables_are_the_bounds_and_not_the_tools(build: ModuleType, root: Path) -> None:
    tables = build.dependency_tables((root / "pyproject.toml").read_text())
    assert "sglang>=0.5.21,<=0.5.23" in tables
    assert '"torch>=' in tables
    assert "[tool." not in tables


def test_pins_are_complete_and_keep_the_bounds(root: Path) -> None:
    """Every line is one exact version, each package once, and pyproject's bounds hold for those it names."""
    quoted = re.findall(r'^    "([a-z].*?)",', (root / "pyproject.toml").read_text(), re.MULTILINE)
    bounds = [Requirement(text) for text in quoted if re.search("[<>=]", text)]
    assert {"torch", "transformers", "llamafactory", "sglang", "openai"} <= {bound.name for bound in bounds}
    for name, host in (("train", "llamafactory"), ("serve", "sglang"), ("serve-floor", "sglang")):
        lines = (root / "env" / "pins" / f"{name}-cpu.txt").read_text().splitlines()
        pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
        names = [canonicalize_name(pin.name) for pin in pins]
        assert len(set(names)) == len(names)
        assert all(re.fullmatch(r"==[^*,]+", str(pin.specifier)) for pin in pins)
        assert host in names
        versions = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
        for bound in bounds:
            version = versions.get(canonicalize_name(bound.name))
            assert version is None or bound.specifier.contains(version), f"{name}: {bound} against {version}"


def test_the_stamp_is_the_last_thing_written(build: ModuleType, record: Any, tmp_path: Path) -> None:
    record()
    train = builder(build, tmp_path)
    train.build()
    stamp = json.loads((tmp_path / "train" / build.STAMP).read_text())
    assert stamp["device"] == "cpu"
    (tmp_path / "train" / build.STAMP).write_text("{ cut short")
    assert train.stamp() == {}


# --------------------------------------------------------------------------------------------------- the test runner


def test_every_test_folder_belongs_to_an_environment(runner: ModuleType, root: Path, tmp_path: Path) -> None:
    assert runner.unassigned_folders(root / "tests") == []
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "test_x.py").write_text("")
    assert runner.unassigned_folders(tmp_path) == ["new"]


def test_every_suite_names_what_exists(runner: ModuleType, root: Path) -> None:
    for suite in runner.SUITES.values():
        assert suite.environment in ("train", "serve", "serve-floor")
        assert all((root / path).exists() for path in suite.paths)


@pytest.mark.parametrize(
    ("status", "report", "passed", "detail"),
    [
        (
            0,
            "3 0 0",
            True,
            "3 passed, 0 failed, 0 skipped",
        ),
        (
            1,
            "3 1 1",
            False,
            "1 passed, 2 failed, 0 skipped",
        ),
        (
            5,
            "0 0 0",
            False,
            "no test ran",
        ),
        (4, None, False, "no test ran"),
    ],
)
def test_a_suite_without_tests_has_failed(
    runner: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: int,
    report: str | None,
    passed: bool,
    detail: str,
) -> None:
    def run(python: Path, arguments: list[str], output: IO[bytes], nice: int) -> tuple[int, float]:
        output.write(b"what pytest printed")
        (junit,) = [a.partition("=")[2] for a in arguments if a.startswith("--junitxml")]
        if report is not None:
            tests, failures, errors = report.split()
            numbers = f'tests="{tests}" failures="{failures}" errors="{errors}" skipped="0"'
            Path(junit).write_text(f"<testsuites><testsuite {numbers}/></testsuites>")
        return status, 1.0

    monkeypatch.setattr(runner, "run", run)
    result = runner.run_suite("serve", fast=False)
    assert (result.passed, result.detail) == (passed, detail)
    assert ("all passed" in runner.summary([result], 1.0)) is passed
    assert "what pytest printed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "fast", "wanted"),
    [
        ("sglang", False, None),
        ("sglang", True, "not slow"),
        ("floor", False, "floor"),
        ("floor", True, "floor and not slow"),
    ],
)
def test_a_suite_runs_what_is_marked_for_it(
    runner: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, fast: bool, wanted: str | None
) -> None:
    seen: list[list[str]] = []

    def run(python: Path, arguments: list[str], output: IO[bytes], nice: int) -> tuple[int, float]:
        seen.append([str(python), *arguments])
        return 0, 1.0

    monkeypatch.setattr(runner, "run", run)
    runner.run_suite(name, fast)
    (command,) = seen
    assert ("serve-floor/bin/python" in command[0]) is (name == "floor")
    assert command[command.index("-m", 3) + 1 :] == [wanted] if wanted else command.count("-m") == 1


def test_make_help_lists_the_targets(root: Path) -> None:
    result = subprocess.run(["make", "help"], cwd=root, capture_output=True, text=True, check=True)
    for target in ("envs", "demo", "run-gsm8k", "serve-demo", "env-serve-floor", "test", "test-fast", "lint", "clean"):
        assert f"make {target} " in result.stdout


def test_run_gsm8k_without_data_says_what_to_give(root: Path) -> None:
    result = subprocess.run(["make", "-o", "envs", "run-gsm8k"], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "make run-gsm8k DATA=DIR" in result.stderr
