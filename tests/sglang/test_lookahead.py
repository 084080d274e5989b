"""Lookahead heads in a real server, attached to the base and on a LenVM, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch

from lenvm_sglang.settings import (
    Settings,
    StartError,
    check_attached,
    is_attached,
    keep_states,
    local_directory,
    refuse_adapters,
)
from tests.sglang.conftest import Server, start
from tests.sglang.models import (
    FAMILIES,
    THINK,
    THINK_END,
    make_attached,
    make_lookahead,
    make_pair,
    prompts,
    tokenizer,
)
from tests.sglang.reference import LookaheadReference
from tests.sglang.test_contracts import SCOPES
from tests.sglang.test_serving import FIELDS, LIMIT, together

KINDS = ("attached", "lookahead")


@pytest.fixture(scope="module")
def heads(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """The pair and the checkpoint of each kind: attached to a Qwen2, on a Qwen3 LenVM beside a Llama."""
    folder = tmp_path_factory.mktemp("heads")
    mixed = make_pair(folder / "mixed", FAMILIES["llama"], FAMILIES["qwen3"])
    return {
        "attached": (pair, make_attached(folder / "attached", pair / "base")),
        "lookahead": (mixed, make_lookahead(folder / "lookahead", mixed / "lenvm")),
    }


@pytest.fixture(scope="module")
def servers(
    heads: dict[str, tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Server]]:
    logs = tmp_path_factory.mktemp("logs")
    started = {
        kind: start(logs / kind, pair / "base", "--lenvm-model", str(head), "--chunked-prefill-size", "16",
                    "--reasoning-parser", "qwen3", plugins=("forked",), SGLANG_TEST_RETRACT="1")
        for kind, (pair, head) in heads.items()
    }  # fmt: skip
    try:
        yield started
    finally:
        for server in started.values():
            server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_guided_greedy_equals_transformers(kind: str, servers: dict[str, Server], heads: Any) -> None:
    """One batch of every rule and of rows without length fields, chunks of 16 tokens, retractions all the time."""
    server, reference = servers[kind].wait(), LookaheadReference(*heads[kind])
    asked = list(zip(prompts(len(FIELDS), seed=1, shared=40), FIELDS, strict=True))
    answers = together(server, asked)
    steered = 0
    for (prompt, fields), answer in zip(asked, answers, strict=True):
        expected = reference.greedy(prompt, LIMIT, fields)
        assert answer["output_ids"] == expected, f"{fields}"
        steered += expected != reference.greedy(prompt, LIMIT, None)
    assert steered >= 8, "guidance hardly changed anything, so the comparison proves little"
    assert sum(a["meta_info"]["num_retractions"] for a in answers) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_target_may_count_the_thinking_or_the_answer(kind: str, servers: dict[str, Server], heads: Any) -> None:
    """Token by token: where the target of a running request begins to count, its parameters change."""
    server, reference = servers[kind].wait(), LookaheadReference(*heads[kind])

    def favour(logits: torch.Tensor, out: list[int]) -> None:
        logits[THINK_END] += 4.0

    asked = [([*p, THINK], f) for p, f in zip(prompts(len(SCOPES), seed=57), SCOPES, strict=True)]
    answers = together(server, asked, logit_bias={str(THINK_END): 4.0})
    ended = 0
    for (prompt, fields), answer in zip(asked, answers, strict=True):
        assert answer["output_ids"] == reference.greedy(prompt, LIMIT, fields, favour), f"{fields}"
        ended += THINK_END in answer["output_ids"][:-4]
    assert ended >= 4, "hardly any thinking ended, so the comparison proves little"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_those_of_transformers(kind: str, servers: dict[str, Server], heads: Any) -> None:
    server, reference = servers[kind].wait(), LookaheadReference(*heads[kind])
    (prompt,) = prompts(1, seed=7)
    for fields in ({"return_length_values": True}, {"return_length_values": True, "length_target": 5}):
        report = server.generate(prompt, 6, fields)["lenvm"]
        tokens = reference.greedy(prompt, 6, fields)
        assert report["predicted_length"] == pytest.approx(reference.predicted(prompt), rel=1e-4)
        expected = [
            0.0 if t == reference.stop else reference.expected_length(prompt + tokens[: i + 1])
            for i, t in enumerate(tokens)
        ]
        assert report["values"] == pytest.approx(expected, rel=1e-4)
    predicted = server.post("/lenvm/predict", {"prompt": prompt}).json()["data"][0]
    assert predicted["predicted_length"] == pytest.approx(reference.predicted(prompt), rel=1e-4)
    assert predicted["quantiles"]["p10"] <= predicted["quantiles"]["p50"] <= predicted["quantiles"]["p90"]


@pytest.mark.slow
def test_an_attached_head_has_no_second_cache(servers: dict[str, Server], heads: Any) -> None:
    """Prefixes of requests with and without length fields are the same, and so are their tokens' memory."""
    server, reference = servers["attached"].wait(), LookaheadReference(*heads["attached"])
    (prompt,) = prompts(1, seed=8)
    fields = {"length_target": 14}
    server.generate(prompt, LIMIT)
    answer = server.generate(prompt, LIMIT, fields)
    assert answer["meta_info"]["cached_tokens"] == len(prompt) - 1
    assert answer["output_ids"] == reference.greedy(prompt, LIMIT, fields)
    assert "no KV cache" in server.log.read_text(errors="replace")
    info = httpx.get(server.url + "/lenvm/info").json()
    assert info["heads"] == ["lookahead"]
    refused = server.post("/lenvm/values", {"prompt": prompt, "completion": [5]})
    assert refused.status_code == 400 and "attached to the base model" in refused.text


@pytest.mark.slow
def test_a_lenvm_with_a_lookahead_head_answers_values(servers: dict[str, Server]) -> None:
    (prompt,) = prompts(1, seed=9)
    data = servers["lookahead"].wait().post("/lenvm/values", {"prompt": prompt, "completion": [5, 6]}).json()["data"]
    assert len(data[0]["remaining"]) == 3


# ----- starts -------------------------------------------------------------------------------------------------------


def test_attached_starts_are_checked(heads: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    pair, head = heads["attached"]
    base, other = str(pair / "base"), str(heads["lookahead"][0] / "base")
    settings = Settings(str(head))
    assert is_attached(settings) and not is_attached(Settings(str(heads["lookahead"][1])))
    assert not is_attached(Settings(str(tmp_path)))
    check_attached(settings, base, base)
    with pytest.raises(StartError, match="another base model"):
        check_attached(settings, base, other)
    tokenizer("entirely different words here").save_pretrained(tmp_path)
    with pytest.raises(StartError, match="another tokenizer"):
        check_attached(settings, str(tmp_path), base)
    with pytest.raises(StartError, match="not on this machine yet"):
        local_directory("nobody/no-such-model")


def test_adapters_change_what_an_attached_head_reads() -> None:
    refuse_adapters(SimpleNamespace(enable_lora=None))
    with pytest.raises(StartError, match="which LoRA adapters change; merge the adapter"):
        refuse_adapters(SimpleNamespace(enable_lora=True))


def test_the_host_is_asked_for_states() -> None:
    for mode, full, expected in ((None, False, "last"), (None, True, None), ("full", False, "full")):
        server_args = SimpleNamespace(return_hidden_states_mode=mode, enable_return_hidden_states=full)
        keep_states(server_args)
        assert server_args.return_hidden_states_mode == expected


def test_states_of_whole_prefills(heads: dict[str, tuple[Path, Path]]) -> None:
    """Where the operator asked the host for every state, the last of each row is taken."""
    from lenvm_sglang.lookahead import AttachedWorker
    from lenvm_sglang.rows import LengthRows
    from tests.sglang.test_parts import state

    pair, head = heads["attached"]
    scheduler = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=SimpleNamespace(
        model_config=SimpleNamespace(model_path=str(pair / "base"), vocab_size=320), dtype=torch.float32,
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(5, 8)))))  # fmt: skip
    worker = AttachedWorker(scheduler, Settings(str(head)))
    worker.allocate()
    hidden = torch.randn(7, 64)
    for full, source in ((True, [2, 6]), (False, [0, 2])):
        mode = SimpleNamespace(is_full=lambda full=full: full)
        batch = SimpleNamespace(
            seq_lens=torch.tensor([3, 2, 2]), req_pool_indices=torch.tensor([4, 1, 2]), capture_hidden_mode=mode,
            forward_mode=SimpleNamespace(is_decode=lambda: False), extend_seq_lens_cpu=[3, 2, 2],
            extend_prefix_lens_cpu=[0, 0, 0],
        )  # fmt: skip
        rows = LengthRows([0, 2], [state(), state()], [True, True], [True, True])
        worker.follow(batch, rows, SimpleNamespace(hidden_states=hidden))
        assert torch.equal(worker.ahead.states[[4, 2]], hidden[source])
    with pytest.raises(RuntimeError, match="kept no hidden states"):
        worker.follow(batch, rows, SimpleNamespace(hidden_states=None))
