"""The CPU stand-in for decode attention against the host's own loop."""

from __future__ import annotations

from typing import Any

import lenvm_cpu_attention
import pytest
import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend


def case(sequences: int, query_heads: int, kv_heads: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sequences)
    lengths = torch.randint(1, 90, (sequences,), generator=generator)
    return {
        "query": torch.randn(sequences, query_heads, 8, generator=generator),
        "k_cache": torch.randn(5000, kv_heads, 8, generator=generator),
        "v_cache": torch.randn(5000, kv_heads, 8, generator=generator),
        "req_to_token": torch.randint(1, 5000, (sequences + 3, 128), generator=generator).int(),
        "req_pool_indices": torch.randperm(sequences + 3, generator=generator)[:sequences],
        "seq_lens": lengths,
        "encoder_lens": None,
        "scaling": 0.3,
        "enable_gqa": query_heads != kv_heads,
    }


# the plug-in may be active in this process: the host's own loop lies below it
LOOP = getattr(
    TorchNativeAttnBackend._run_sdpa_forward_decode, "__wrapped__", TorchNativeAttnBackend._run_sdpa_forward_decode
)


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 4), (4, 2)])
@pytest.mark.parametrize("sequences", [1, 31, 32, 33, 80])
def test_equals_the_loop(sequences: int, query_heads: int, kv_heads: int) -> None:
    given = case(sequences, query_heads, kv_heads)
    expected = LOOP(object(), output=torch.empty_like(given["query"]), **given)

    def never(*_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("plain attention must not take the loop")

    got = lenvm_cpu_attention.decode(never, object(), output=torch.empty_like(given["query"]), **given)
    assert torch.allclose(got, expected, atol=1e-6)


def test_everything_else_takes_the_loop() -> None:
    given = case(3, 4, 4)
    for change in ({"sliding_window_size": 4}, {"causal": True}, {"encoder_lens": torch.ones(3)}):
        called: list[dict[str, Any]] = []

        def loop(*_: Any, _called: list[dict[str, Any]] = called, **keywords: Any) -> torch.Tensor:
            _called.append(keywords)
            return torch.zeros(())

        lenvm_cpu_attention.decode(loop, object(), output=torch.empty_like(given["query"]), **(given | change))
        assert len(called) == 1


def test_is_nothing_under_a_cuda_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry

    registered: list[str] = []
    monkeypatch.setattr(HookRegistry, "register", lambda target, *_: registered.append(target))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    lenvm_cpu_attention.register()
    assert not registered
    monkeypatch.setattr(torch.version, "cuda", None)
    lenvm_cpu_attention.register()
    assert registered == [lenvm_cpu_attention.TARGET]
