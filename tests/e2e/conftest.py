"""A small run of the demo pipeline, whole and real: LlamaFactory trains, SGLang samples and serves, the client asks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from openai import OpenAI

from lenvm.pipeline.recipe import Server
from lenvm.pipeline.server import SglangServer
from tests.hosts import few_models

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN_PYTHON = Path(os.environ.get("LENVM_TRAIN_PYTHON", Path(sys.prefix).parent / "train" / "bin" / "python"))

# Small enough for a test, large enough that the base model ends its answers and the LenVM has something to learn.
SMALL = (
    "prepare.args=[--documents, '10000']",
    "base.train.overrides={max_steps: 130, max_samples: 2200}",  # as many as 130 steps read
    "sampling.max_tokens=128",
    "sampling.train={n: 4, limit: 80}",
    "sampling.val={n: 4, limit: 16}",
    "sampling.test={n: 8, limit: 8}",
    "lenvm.overrides={num_train_epochs: 1.0}",
    "evaluation.max_prompts=8",
    "evaluation.concurrency=48",
    "evaluation.targets=1",
    "evaluation.bound_targets=1",
    "evaluation.median_samples=1",
    "evaluation.share_samples=1",
    "evaluation.curve_samples=1",
    "evaluation.biases=[-5.0]",
    "evaluation.budgets=[0.6]",
)


@dataclass(frozen=True)
class Run:
    """A finished pipeline run: its folder and what the command printed."""

    folder: Path
    printed: str

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def lenvm(self) -> Path:
        return self.folder / "lenvm"


def pipeline(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`lenvm pipeline run` of the demo's recipe, as `make demo` calls it, but small."""
    command = [sys.executable, "-m", "lenvm", "pipeline", "run", str(REPOSITORY / "examples/demo/recipe.yaml")]
    command += ["--out", str(folder), "--train-python", str(TRAIN_PYTHON)]
    for setting in SMALL:
        command += ["--set", setting]
    return subprocess.run([*command, *words], capture_output=True, text=True, timeout=1100, check=False)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The small demo, run once."""
    folder = tmp_path_factory.mktemp("demo")
    done = pipeline(folder)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return Run(folder, done.stdout)


@pytest.fixture(scope="session", autouse=True)
def _few_models() -> Iterator[None]:
    """Of every server that these tests start."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in few_models().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def server(demo: Run) -> Iterator[SglangServer]:
    """The demo pair, served as `make serve-demo` does."""
    log = demo.folder / "logs" / "server_test.log"
    with SglangServer(str(demo.base), Server(), log, lenvm=demo.lenvm) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: SglangServer) -> OpenAI:
    """The official client."""
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
