"""What a built wheel, and an editable install, hold."""

import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

BUILD = "import sys; from hatchling.build import build_{kind} as build; print(build(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheels(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, zipfile.ZipFile]:
    """The wheel of the checkout and the wheel that `pip install -e` installs, built by the backend pip calls."""
    built = {}
    for kind in ("wheel", "editable"):
        folder = tmp_path_factory.mktemp(kind)
        command = [sys.executable, "-c", BUILD.format(kind=kind), str(folder)]
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        (path,) = folder.glob("lenvm-*.whl")
        built[kind] = zipfile.ZipFile(path)
    return built


def test_wheel_holds_the_packages_and_nothing_else(wheels: dict[str, zipfile.ZipFile], root: Path) -> None:
    names = wheels["wheel"].namelist()
    tops = {name.split("/")[0] for name in names}
    packages = {"lenvm", "lenvm_lf", "lenvm_sglang", "lenvm_kernels"}
    assert tops == packages | {"lenvm_lf.pth", "lenvm_lf.start", "lenvm-0.1.0.dist-info"}
    for package in packages:
        sources = {p.relative_to(root).as_posix() for p in (root / package).rglob("*.py")}
        assert sources <= set(names), f"missing: {sorted(sources - set(names))[:3]}"
    assert not [name for name in names if "__pycache__" in name or name.startswith(("tests/", "env/"))]
    assert "lenvm/py.typed" in names
    assert "lenvm-0.1.0.dist-info/licenses/LICENSE" in names


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_import_hook_is_at_the_root_of_site_packages(wheels: dict[str, zipfile.ZipFile], kind: str) -> None:
    names = wheels[kind].namelist()
    assert names.count("lenvm_lf.pth") == 1
    assert names.count("lenvm_lf.start") == 1
    assert not [name for name in names if name.startswith("lenvm_lf/lenvm_lf.")]
    lines = wheels[kind].read("lenvm_lf.pth").decode().splitlines()
    assert [line[:7] for line in lines if not line.startswith("#")] == ["import "], "site runs `import` lines only"


def test_editable_install_puts_the_checkout_on_the_path_before_the_hook_runs(
    wheels: dict[str, zipfile.ZipFile], root: Path
) -> None:
    paths = sorted(name for name in wheels["editable"].namelist() if name.endswith(".pth"))
    assert paths[-1] == "lenvm_lf.pth", "site reads .pth files in this order; the hook must find its package"
    assert wheels["editable"].read(paths[0]).decode().split() == [str(root)]


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_entry_points(wheels: dict[str, zipfile.ZipFile], kind: str) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(wheels[kind].read("lenvm-0.1.0.dist-info/entry_points.txt").decode())
    assert dict(parser["console_scripts"]) == {"lenvm": "lenvm.cli:main", "lenvm-train": "lenvm_lf.cli:main"}
    assert dict(parser["sglang.srt.plugins"]) == {"lenvm": "lenvm_sglang:register"}


def test_hook_line_is_harmless_where_the_package_is_not(root: Path, tmp_path: Path) -> None:
    """The .pth outlives an uninstall by hand, and runs in every interpreter of the environment."""
    line = (root / "lenvm_lf" / "lenvm_lf.pth").read_text()
    command = [sys.executable, "-S", "-I", "-c", f"{line}\nprint('alive')"]  # -S: no site-packages
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr, result.returncode) == ("alive\n", "", 0)
