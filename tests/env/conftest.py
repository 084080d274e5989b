"""Modules of `env/` by path: the folder is no package, and the copies in site-packages are not what is to be tested."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(path: str, name: str) -> ModuleType:
    """Import one file of the checkout under a name that nothing else uses; `sys.meta_path` is left as it was."""
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    finders = list(sys.meta_path)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop(name)
        sys.meta_path[:] = finders
    return module


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def kernels() -> ModuleType:
    return load("env/stand_ins/serve/sgl_kernel/__init__.py", "sgl_kernel_under_test")


@pytest.fixture(scope="session")
def schemas() -> ModuleType:
    return load("env/stand_ins/both/lenvm_torchvision_schemas.py", "torchvision_schemas_under_test")


@pytest.fixture(scope="session")
def torchaudio_pure() -> ModuleType:
    return load("env/stand_ins/torchaudio_pure.py", "torchaudio_pure_under_test")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("env/build.py", "build_under_test")
    monkeypatch.setitem(sys.modules, "build_under_test", module)
    return module


@pytest.fixture
def runner() -> ModuleType:
    return load("env/test.py", "runner_under_test")
