"""The stand-ins against loops over plain torch, and their refusal to act under a CUDA torch."""

import importlib.util
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.env.conftest import load

REQUESTS, POOL = 6, 12  # rows and columns of the slot table


@st.composite
def ranges(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of the slot table, each at most once, and a range [start, end) of columns for each, empty ones too."""
    rows = draw(st.lists(st.integers(0, REQUESTS - 1), unique=True, max_size=REQUESTS))
    cuts = [sorted(draw(st.tuples(st.integers(0, POOL), st.integers(0, POOL)))) for _ in rows]
    starts, ends = [c[0] for c in cuts], [c[1] for c in cuts]
    return tuple(torch.tensor(x, dtype=torch.int64) for x in (rows, starts, ends))  # type: ignore[return-value]


def slot_table() -> torch.Tensor:
    return torch.arange(REQUESTS * POOL, dtype=torch.int32).view(REQUESTS, POOL) + 1000


@settings(deadline=None)
@given(ranges())
def test_assign_req_to_token_pool_is_a_loop_over_requests(
    kernels: ModuleType, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    rows, starts, ends = batch
    slots = torch.arange(int((ends - starts).sum()), dtype=torch.int64) + 1
    expected, used = slot_table(), 0
    for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
        for column in range(start, end):
            expected[row, column] = slots[used]
            used += 1
    table = slot_table()
    assert kernels.assign_req_to_token_pool_cpu(rows, table, starts, ends, slots, POOL) is None
    assert torch.equal(table, expected)


@settings(deadline=None)
@given(ranges())
def test_assign_extend_cache_locs_reads_what_was_assigned(
    kernels: ModuleType, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
) -> None:
    rows, starts, ends = batch
    table = slot_table()
    expected = [
        int(table[row, column])
        for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True)
        for column in range(start, end)
    ]
    out = torch.full((len(expected) + 3,), -7, dtype=torch.int64)
    kernels.assign_extend_cache_locs_cpu(rows, table, starts, ends, out, POOL)
    assert out.tolist() == [*expected, -7, -7, -7]
    assert torch.equal(table, slot_table())


def test_operators_can_be_found_and_say_what_they_are(kernels: ModuleType) -> None:
    for name in kernels.OPERATORS:
        with pytest.raises(NotImplementedError, match=rf"sgl_kernel\.{name} is a CUDA kernel"):
            getattr(torch.ops.sgl_kernel, name)(torch.ones(1))


def test_slot_tables_take_the_mixed_integer_types_sglang_passes(kernels: ModuleType) -> None:
    table = torch.zeros(3, 5, dtype=torch.int32)
    rows, starts = torch.tensor([2, 0], dtype=torch.int64), torch.tensor([1, 0], dtype=torch.int32)
    ends, slots = torch.tensor([3, 1], dtype=torch.int32), torch.tensor([41, 42, 43], dtype=torch.int64)
    kernels.assign_req_to_token_pool_cpu(rows, table, starts, ends, slots, 5)
    assert table.tolist() == [[43, 0, 0, 0, 0], [0] * 5, [0, 41, 42, 0, 0]]


@pytest.mark.parametrize(("topk", "steps"), [(1, 1), (2, 3), (4, 1)])
def test_assign_draft_cache_locs_reads_the_slots_after_each_sequence(
    kernels: ModuleType, topk: int, steps: int
) -> None:
    table = slot_table()
    rows, lengths = torch.tensor([3, 0, 5]), torch.tensor([2, 0, 6])
    out = torch.zeros(3 * topk * steps, dtype=torch.int64)
    kernels.assign_draft_cache_locs_contiguous_cpu(rows, table, lengths, out, POOL, topk, steps)
    expected = [int(table[r, n + i]) for r, n in [(3, 2), (0, 0), (5, 6)] for i in range(topk * steps)]
    assert out.tolist() == expected


def test_fill_bonus_tokens_takes_the_last_accepted_token(kernels: ModuleType) -> None:
    tokens = torch.tensor([[10, 11, 12], [20, 21, 22], [30, 31, 32]], dtype=torch.int32)
    out = torch.full((4,), -1, dtype=torch.int64)
    kernels.fill_bonus_tokens_cpu(tokens, torch.tensor([1, 3, 2], dtype=torch.int32), out, 3)
    assert out.tolist() == [10, 22, 31, -1]


def test_fill_accept_out_cache_loc_packs_what_was_accepted(kernels: ModuleType) -> None:
    index = torch.tensor([[0, 2, -1], [-1, -1, -1], [5, -1, 1]], dtype=torch.int32)
    out = torch.full((6,), -1, dtype=torch.int64)
    kernels.fill_accept_out_cache_loc_cpu(index, torch.arange(100, 106), out)
    assert out.tolist() == [100, 102, 105, 101, -1, -1]


def buffers() -> list[torch.Tensor]:
    """KV buffers as a pool has them: other widths and types, 8 slots each."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(8, 2, 4, generator=generator)
    return [wide.clone(), wide.to(torch.bfloat16), torch.randn(8, 3, generator=generator, dtype=torch.float64)]


@pytest.mark.parametrize(
    ("target", "source"),
    [
        pytest.param([5, 6], [0, 1], id="apart"),
        pytest.param([1, 2, 3], [0, 1, 2], id="shifted up by one"),
        pytest.param([0, 1, 2], [1, 2, 3], id="shifted down by one"),
        pytest.param([0, 7], [7, 0], id="swapped"),
        pytest.param([1, 2, 3], [7, 7, 7], id="one source, several targets"),
        pytest.param([4], [4], id="onto itself"),
        pytest.param([], [], id="nothing"),
    ],
)
def test_copy_all_layer_kv_cache_reads_everything_before_it_writes(
    kernels: ModuleType, target: list[int], source: list[int]
) -> None:
    pool, before = buffers(), buffers()
    kernels.copy_all_layer_kv_cache_cpu(
        torch.tensor([b.data_ptr() for b in pool], dtype=torch.uint64),
        torch.tensor([b[0].numel() * b.element_size() for b in pool]),
        torch.tensor(target, dtype=torch.int64),
        torch.tensor(source, dtype=torch.int32),
    )
    for buffer, old in zip(pool, before, strict=True):
        expected = old.clone()
        for t, s in zip(target, source, strict=True):
            expected[t] = old[s]
        assert torch.equal(buffer, expected)


def test_copy_refuses_unpaired_slots(kernels: ModuleType) -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="tgt_loc has 2 slots and src_loc 1"):
        kernels.copy_all_layer_kv_cache_cpu(nothing, nothing, torch.tensor([1, 2]), torch.tensor([3]))


def test_any_other_kernel_imports_and_raises_when_called(kernels: ModuleType) -> None:
    kernel = kernels.top_k_top_p_sampling_from_probs
    with pytest.raises(NotImplementedError, match=r"sgl_kernel\.top_k_top_p_sampling_from_probs is a CUDA kernel"):
        kernel(torch.zeros(1, 4))
    assert not hasattr(kernels, "__path_of_no_module__")


# ------------------------------------------------------------------------------------ never active under a CUDA torch


def fake_package(folder: Path, name: str, version: str) -> ModuleSpec:
    package = folder / name
    (package / "lib").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not to be imported')\n")
    (package / "version.py").write_text(f"__version__ = '{version}'\n")
    (package / "lib" / "_ext.abi3.so").write_bytes(b"")
    spec = importlib.util.spec_from_file_location(name, package / "__init__.py")
    assert spec is not None
    return spec


def test_sgl_kernel_refuses_a_cuda_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ImportError, match=r"LenVM's CPU stand-in, and torch .* is built for CUDA 13\.0"):
        load("env/stand_ins/serve/sgl_kernel/__init__.py", "sgl_kernel_under_cuda")


def test_schemas_are_not_defined_under_a_cuda_torch(
    schemas: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defined: list[str] = []
    monkeypatch.setattr(torch.library, "Library", lambda *arguments: defined.append(arguments[0]))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert schemas.define_schemas(fake_package(tmp_path, "torchvision", "0.28.0+cu130")) is False
    assert defined == []


@pytest.mark.parametrize("version", ["0.28.0+cpu", "0.28.0"])
def test_schemas_are_not_defined_for_a_torchvision_that_loads(
    schemas: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert schemas.define_schemas(fake_package(tmp_path, "torchvision", version)) is False
    assert schemas.define_schemas(None) is False


def test_both_schemas_are_defined_under_a_cpu_torch(
    schemas: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defined: list[str] = []

    class Library:
        def __init__(self, namespace: str, kind: str) -> None:
            assert (namespace, kind) == ("torchvision", "DEF")

        def define(self, schema: str) -> None:
            defined.append(schema.partition("(")[0])

    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.library, "Library", Library)
    assert schemas.define_schemas(fake_package(tmp_path, "torchvision", "0.28.0+cu130")) is True
    assert defined == ["nms", "qnms"]


def test_torchaudio_is_stripped_under_a_cpu_torch_only(
    torchaudio_pure: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "torchaudio"
    fake_package(tmp_path, "torchaudio", "2.11.0+cu130")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(RuntimeError, match="extensions stay as they are"):
        torchaudio_pure.strip_extensions(package)
    assert (package / "lib" / "_ext.abi3.so").exists()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert [p.name for p in torchaudio_pure.strip_extensions(package)] == ["_ext.abi3.so"]
    (package / "version.py").write_text("__version__ = '2.11.0+cpu'\n")
    (package / "lib" / "_ext.abi3.so").write_bytes(b"")
    assert torchaudio_pure.strip_extensions(package) == []


@pytest.mark.slow
@pytest.mark.parametrize("package", ["torchvision", "torchaudio"])
def test_the_host_packages_import_here(package: str) -> None:
    """In a fresh interpreter of this environment, where the package is part of it."""
    if importlib.util.find_spec(package) is None:
        assert package == "torchaudio", "torchvision belongs to both environments"
        assert importlib.util.find_spec("llamafactory") is None, "LlamaFactory needs torchaudio"
        return
    code = f"import {package}; from {package} import transforms; transforms.Resize" if package == "torchvision" else ""
    code = code or "import torch, torchaudio; torchaudio.functional.amplitude_to_DB(torch.ones(1), 20.0, 1e-10, 0.0)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_garbage_is_looked_for_less_often_on_a_cpu_only() -> None:
    code = "import gc; print(gc.get_threshold()[0])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(found) == (50_000 if torch.version.cuda is None else 700)
