"""Parts of the plug-in without a server: attention of candidates, row parameters, batches, middleware."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lenvm.guidance import Control, Mode
from lenvm.request import LengthFieldError, LengthRequest
from lenvm_kernels import PrefixMasks, share_prefix
from lenvm_sglang.admission import admit, draw_seed, number_samples, state_of
from lenvm_sglang.attention import AttentionError, SharedPrefixBackend, attend
from lenvm_sglang.batches import select_rows
from lenvm_sglang.middleware import CHAT, COMPLETIONS, GENERATE, LengthFieldsMiddleware, annotate, lift_fields
from lenvm_sglang.outputs import HostLengthOutput
from lenvm_sglang.responses import Collected, Progress, annotate_metadata, collected, publish
from lenvm_sglang.rows import LengthRows, Seen
from lenvm_sglang.settings import Settings
from lenvm_sglang.state import RequestState, RowTable
from lenvm_sglang.worker import value_config


def state(**changes: Any) -> RequestState:
    values: dict[str, Any] = {
        "request": LengthRequest.parse({"length_target": 9, "length_mode": "at_most"}),
        "prompt_tokens": 4,
        "seed": 1,
        "stop_token_ids": (2,),
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 0.9,
        "min_p": 0.0,
        "greedy": False,
    }
    return RequestState(**{**values, **changes})


def test_candidate_attention_is_that_of_separate_sequences() -> None:
    """Each candidate alone behind its prefix, softmax written out, against one call with a shared prefix."""
    torch.manual_seed(0)
    lengths, width, q_heads, kv_heads, dim = [5, 1, 8], 3, 4, 2, 8
    k_cache, v_cache = torch.randn(2, 40, kv_heads, dim)
    table = torch.full((6, 16), 39, dtype=torch.int32)
    pool_rows = torch.tensor([4, 0, 2])
    slots = iter(torch.randperm(39).tolist())
    for row, n in zip(pool_rows.tolist(), lengths, strict=True):
        table[row, :n] = torch.tensor([next(slots) for _ in range(n)])
    q = torch.randn(3 * width, q_heads, dim)
    k, v = torch.randn(2, 3 * width, kv_heads, dim)
    own = torch.arange(40, 40 + 3 * width).view(3, width)
    k_cache, v_cache = torch.cat([k_cache, k]), torch.cat([v_cache, v])
    masks = PrefixMasks(q.dtype)
    share_prefix(torch.tensor([2, 9, 1]), pool_rows, own, table, 9, masks)  # what another batch left behind
    layout = share_prefix(torch.tensor(lengths), pool_rows, own, table, max(lengths), masks)
    out = attend(q, layout, k_cache, v_cache, 0.3)
    for i in range(3 * width):
        row = i // width
        prefix = table[pool_rows[row], : lengths[row]].long()
        for head in range(q_heads):
            kv = head * kv_heads // q_heads
            keys = torch.cat([k_cache[prefix, kv], k[i : i + 1, kv]])
            values = torch.cat([v_cache[prefix, kv], v[i : i + 1, kv]])
            expected = torch.softmax(keys @ q[i, head] * 0.3, 0) @ values
            torch.testing.assert_close(out[i, head], expected, rtol=1e-5, atol=1e-6)


def test_feeding_some_candidates_gives_them_what_feeding_all_does() -> None:
    torch.manual_seed(1)
    rows, width, heads, dim = 3, 4, 2, 8
    cache = torch.randn(2, 60, heads, dim)
    written: list[Any] = []

    def write(layer: Any, where: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        written.append((where.loc, key, value))
        cache[0, where.loc], cache[1, where.loc] = key, value

    pool = SimpleNamespace(get_key_buffer=lambda _: cache[0], get_value_buffer=lambda _: cache[1], set_kv_buffer=write)
    table = torch.randperm(40).int().view(4, 10)
    backend = SharedPrefixBackend(pool, SimpleNamespace(req_to_token=table), torch.float32)
    layer = SimpleNamespace(
        tp_q_head_num=heads, tp_k_head_num=heads, tp_v_head_num=heads, qk_head_dim=dim, v_head_dim=dim, layer_id=0,
        scaling=0.5,
    )  # fmt: skip
    q, k, v = torch.randn(3, rows * width, heads * dim)
    slots = torch.arange(rows * width) + 45
    where, own = (torch.tensor([3, 0, 2]), torch.tensor([6, 10, 1]), 10), slots.view(rows, width)
    backend.prepare(*where, own)
    everything = backend.forward(q, k, v, layer, SimpleNamespace(out_cache_loc=slots))
    fed = torch.tensor([0, 2, 3, 4, 8, 11])
    absent = torch.ones(rows * width, dtype=torch.bool)
    absent[fed] = False
    backend.prepare(*where, own.masked_fill(absent.view(rows, width), 0), fed)
    some = backend.forward(q[fed], k[fed], v[fed], layer, SimpleNamespace(out_cache_loc=slots[fed]))
    torch.testing.assert_close(some, everything[fed], rtol=1e-5, atol=1e-6)
    with pytest.raises(AttentionError, match="asks for sinks too"):
        backend.forward(q, k, v, layer, SimpleNamespace(out_cache_loc=slots), sinks=torch.zeros(heads), k_rope=None)
    assert len(written) == 2
    assert written[1][0].tolist() == slots[fed].tolist()
    assert torch.equal(written[1][1].flatten(1), k[fed])


def test_row_table_gives_back_what_was_written_and_counts_from_the_sequence() -> None:
    table = RowTable(rows=8, device="cpu")
    strict = LengthRequest.parse({"length_target": 30, "length_strict": True, "length_control": "hard"})
    biased = LengthRequest.parse({"length_bias": -1.5})
    many = tuple(range(10, 17))
    states = [state(), state(request=strict, prompt_tokens=7, stop_token_ids=many), state(request=biased, greedy=True)]
    table.write(torch.tensor([5, 1, 3]), states)
    found = table.parameters(torch.tensor([3, 5, 1]), 7)
    rows = found._replace(guidance=found.after(torch.tensor([10, 4, 9]) - found.start))
    assert rows.guidance.control.tolist() == [Control.BIAS, Control.POSTERIOR, Control.HARD]
    assert rows.guidance.mode.tolist() == [Mode.EQUAL_TO, Mode.AT_MOST, Mode.EQUAL_TO]
    assert rows.guidance.emitted.tolist() == [6, 0, 2]
    assert rows.guidance.strict.tolist() == [False, False, True]
    assert rows.guidance.bias.tolist() == [-1.5, 0.0, 0.0]
    assert rows.greedy.tolist() == [True, False, False]
    assert rows.stop_token_ids[2].tolist() == list(many)
    assert rows.stop_token_ids[0].tolist() == [2] + [-1] * 6
    assert rows.sampling.top_p.tolist() == pytest.approx([0.9] * 3)
    table.write(torch.tensor([5]), [state(prompt_tokens=2)])
    again = table.parameters(torch.tensor([5]), 1)
    assert again.start.tolist() == [2]
    assert again.stop_token_ids.tolist() == [[2]]


@pytest.mark.parametrize("changes", [{"prompt_tokens": 0}, {"temperature": 0.0}, {"seed": 2**63}])
def test_request_state_asserts_its_invariants(changes: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        state(**changes)


def test_reports_come_in_pieces_and_only_for_committed_tokens() -> None:
    a, b = state(), state()
    prompt = HostLengthOutput([0, 1], [a, b], torch.tensor([[7.0, 1, 2, 3], [9.0, 4, 5, 6]]), at_prompt=True)
    prompt.consume(None, [None, None])
    HostLengthOutput([0, 1], [a, b], torch.tensor([6.0, 8.0]), at_prompt=False).consume(None, [object(), object()])
    assert a.take_report() == {"predicted_length": 7.0, "quantiles": [1, 2, 3], "values": [6.0]}
    HostLengthOutput([1, 0], [b, a], torch.tensor([5.0, 4.0]), at_prompt=False).consume(None, [None, object()])
    assert a.take_report()["values"] == []
    assert b.take_report()["values"] == [8.0, 5.0]
    prompt.consume(None, [None, None])  # read again after a retraction
    assert a.predicted_length == 7.0


def test_length_rows_split_into_steered_and_watched() -> None:
    watched = state(request=LengthRequest.parse({"return_length_values": True}))
    rows = LengthRows([1, 4, 6], [state(), watched, state()], [True, True, False], [True, False, True])
    steered = rows.steering
    assert steered is not None
    assert steered.index == [1]
    other = rows.watching
    assert other is not None
    assert other.index == [4]
    assert LengthRows([0], [state()], [False], [True]).steering is None


def test_select_rows_cuts_a_prefill_batch() -> None:
    lengths, prefixes = [3, 2, 4], [0, 5, 1]
    tokens = torch.arange(sum(lengths))
    seq = torch.tensor([n + p for n, p in zip(lengths, prefixes, strict=True)])
    batch = SimpleNamespace(
        batch_size=3, input_ids=tokens, positions=tokens + 100, out_cache_loc=tokens + 200, extend_num_tokens=9,
        req_pool_indices=torch.tensor([7, 8, 9]), seq_lens=seq, orig_seq_lens=None, seq_lens_cpu=seq, seq_lens_sum=15,
        extend_seq_lens=torch.tensor(lengths), extend_prefix_lens=torch.tensor(prefixes), extend_seq_lens_cpu=lengths,
        extend_prefix_lens_cpu=prefixes, rids=["a", "b", "c"], sampling_info=object(), return_logprob=True,
        mm_inputs=None, spec_info=None, lora_ids=None, next_token_logits_buffer=None, extend_start_loc=None,
        input_embeds=None, mrope_positions=tokens.expand(3, -1) + 300, lenvm_seen=None,
    )  # fmt: skip
    part = select_rows(batch, [0, 2], torch.tensor([0, 2]))
    assert part.input_ids.tolist() == [0, 1, 2, 5, 6, 7, 8]
    assert part.out_cache_loc.tolist() == [200, 201, 202, 205, 206, 207, 208]
    assert part.req_pool_indices.tolist() == [7, 9]
    assert part.seq_lens_sum == 8
    assert part.extend_start_loc.tolist() == [0, 3]
    assert (part.extend_num_tokens, part.batch_size, part.rids) == (7, 2, ["a", "c"])
    assert part.sampling_info is None
    assert batch.batch_size == 3
    assert part.mrope_positions[2].tolist() == [300, 301, 302, 305, 306, 307, 308]
    assert part.mm_inputs is None
    assert select_rows(batch, [0, 1, 2], torch.tensor([0, 1, 2])).input_ids is tokens
    # the base model's forward has overwritten the hashes of the first row's image since
    batch.lenvm_seen = Seen(torch.where(tokens < 2, 10**6, tokens), ["image", None, None])
    for rows, ids in (([0, 2], [10**6, 10**6, 2, 5, 6, 7, 8]), ([0, 1, 2], [10**6, 10**6, *range(2, 9)])):
        part = select_rows(batch, rows, torch.tensor(rows))
        assert part.input_ids.tolist() == ids
        assert part.mm_inputs == ["image", None, None][: len(rows)]
        part.input_ids.zero_()  # as its own forward may
    assert batch.lenvm_seen.input_ids[0] == 10**6


# ----- admission ----------------------------------------------------------------------------------------------------


def host_request(**params: Any) -> Any:
    values = {"custom_params": {"length_target": 5}, "top_k": 1 << 30, "temperature": 1.0, "top_p": 1.0, "min_p": 0.0,
              "ignore_eos": False, "stop_token_ids": None, "sampling_seed": None}  # fmt: skip
    aborted: list[str] = []
    return SimpleNamespace(sampling_params=SimpleNamespace(**{**values, **params}), origin_input_ids=[1, 2], rid="r",
                           extra_key=None, aborted=aborted, set_finish_with_abort=aborted.append)  # fmt: skip


def test_admission_makes_one_state_and_a_namespace() -> None:
    req = host_request(stop_token_ids={9}, top_k=1)
    admit(req, served=True, default_stop_token_ids=frozenset({2}))
    found = state_of(req)
    assert found is not None
    assert found.stop_token_ids == (2, 9)
    assert found.greedy
    assert found.top_k == 1 << 30, "a greedy request is cut at temperature 1 without a top-k"
    assert req.extra_key.startswith("lenvm-")
    other = host_request()
    other.extra_key = "mine"
    admit(other, served=True, default_stop_token_ids=frozenset())
    assert other.extra_key == f"{req.extra_key}/mine"


def test_admission_leaves_other_requests_alone_and_aborts_bad_ones() -> None:
    for custom in (None, {}, {"mine": 1}, {"length_target": None}):
        req = host_request(custom_params=custom)
        admit(req, served=True, default_stop_token_ids=frozenset())
        assert state_of(req) is None
        assert req.extra_key is None
    for served, custom in ((True, {"length_target": 0}), (False, {"length_target": 5})):
        req = host_request(custom_params=custom)
        admit(req, served=served, default_stop_token_ids=frozenset())
        assert len(req.aborted) == 1
        assert state_of(req) is None


def test_seeds_tell_samples_apart_and_repeat() -> None:
    assert draw_seed(5, 0, "a") == draw_seed(5, 0, "b")
    assert draw_seed(5, 0, "a") != draw_seed(5, 1, "a")
    assert draw_seed(None, 0, "a") != draw_seed(None, 0, "b")
    shared = {"length_target": 3}
    samples = []
    for limit in (0, 20, 20, 20):  # the host warms the prefix cache first
        params = SimpleNamespace(custom_params=shared, sampling_seed=1, max_new_tokens=limit)
        one = SimpleNamespace(sampling_params=params)
        number_samples(one)
        samples.append(one.sampling_params.custom_params.get("lenvm_sample"))
    assert samples[1:] == [0, 1, 2]


# ----- middleware ---------------------------------------------------------------------------------------------------


def test_fields_move_into_custom_params() -> None:
    body: dict[str, Any] = {"length_target": 40, "length_mode": "at_most", "custom_params": {"mine": 1}, "prompt": "x"}
    assert lift_fields(body, COMPLETIONS, served=True)
    assert body["custom_params"] == {"mine": 1, "length_target": 40, "length_mode": "at_most", "lenvm_room": True}
    assert "length_target" not in body
    assert body["max_tokens"] == 2 * 40 + 32

    body = {"length_target": 40, "max_tokens": 50}
    lift_fields(body, CHAT, served=True)
    assert body["max_tokens"] == 50

    body = {"length_target": 7, "sampling_params": [{"max_new_tokens": 9}, {"length_target": 7}]}
    assert lift_fields(body, GENERATE, served=True)
    assert [p["custom_params"] for p in body["sampling_params"]] == [
        {"length_target": 7},
        {"length_target": 7, "lenvm_room": True},
    ]
    assert [p["max_new_tokens"] for p in body["sampling_params"]] == [9, 128]


@pytest.mark.parametrize(
    "body", [{}, {"messages": []}, [], "text", None, {"length_target": None}, {"sampling_params": 3}]
)
def test_bodies_without_fields_carry_nothing(body: Any) -> None:
    for path in (CHAT, COMPLETIONS, GENERATE):
        assert not lift_fields(body, path, served=True)


def test_a_server_without_lenvm_names_the_field() -> None:
    with pytest.raises(LengthFieldError, match="--lenvm-model") as caught:
        lift_fields({"length_bias": 1.0}, CHAT, served=False)
    assert caught.value.param == "length_bias"


def test_annotate_adds_reports_to_finished_choices() -> None:
    body: dict[str, Any] = {"choices": [{"index": 0, "finish_reason": None}, {"index": 1, "finish_reason": "stop"}]}
    said = Collected(reports={0: {"achieved": 1}, 1: {"achieved": 2}})
    assert annotate(body, said)
    assert body["lenvm"] == body["choices"][1]["lenvm"] == {"achieved": 2}
    assert "lenvm" not in body["choices"][0]
    assert not annotate({"error": {}}, said)


def test_deltas_wait_for_a_chunk_with_text_or_the_end() -> None:
    said = Collected(deltas={0: {"predicted_length": 9.0, "values": [8.0]}})
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    assert not annotate(role, said)
    text: dict[str, Any] = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]}
    assert annotate(text, said)
    assert text["choices"][0]["lenvm_delta"]["values"] == [8.0]
    assert said.deltas == {}, "each value is sent once"


def test_deltas_are_taken_when_an_output_goes_out() -> None:
    """The host drops all but the last of several waiting outputs; their values must not be lost."""
    request = LengthRequest.parse({"return_length_values": True})
    assert request is not None
    progress = Progress(request, stream=True, predicted_length=5.0)
    outputs = []
    for value in (4.0, 3.0, 2.0):
        progress.values.append(value)
        meta: dict[str, Any] = {"completion_tokens": len(progress.values)}
        annotate_metadata(meta, progress, finished=value == 2.0)
        outputs.append({"meta_info": meta})
    for out in (outputs[0], outputs[2]):
        publish(out, 0)
    assert outputs[0]["lenvm_delta"] == {"predicted_length": 5.0, "values": [4.0]}
    assert outputs[2]["lenvm_delta"]["values"] == [3.0, 2.0]
    assert outputs[2]["lenvm"]["values"] == [4.0, 3.0, 2.0]
    assert "lenvm" not in outputs[0]
    assert set(outputs[2]["meta_info"]) == {"completion_tokens"}


def through_middleware(
    body: bytes, respond: Any, served: bool = True, path: str = CHAT
) -> tuple[list[Any], list[bytes]]:
    """Run one request through the middleware; returns what was sent, and the bodies the application saw."""
    seen: list[bytes] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        seen.append(message["body"])
        assert dict(scope["headers"])[b"content-length"] == str(len(message["body"])).encode()
        said = collected.get()
        if said is not None:
            said.reports[0] = {"achieved": 3}
        for part in respond:
            await send(part)

    async def run() -> None:
        halves = [body[: len(body) // 2], body[len(body) // 2 :]]
        parts = iter([{"type": "http.request", "body": b, "more_body": i == 0} for i, b in enumerate(halves)])

        async def receive() -> Any:
            return next(parts)

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
        await LengthFieldsMiddleware(app, served=served, context_length=1000)(scope, receive, send)

    asyncio.run(run())
    return sent, seen


def start(kind: bytes) -> dict[str, Any]:
    return {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"content-type", kind), (b"content-length", b"7")],
    }


def test_requests_without_fields_pass_byte_for_byte() -> None:
    for body in (b'{ "messages" : [{"content":"say \\"length_target\\" to me"}] }', b"{broken", b""):
        answer = [start(b"application/json"), {"type": "http.response.body", "body": b'{"choices":[]}'}]
        sent, seen = through_middleware(body, answer)
        assert seen == [body]
        assert sent == answer


def test_json_answers_get_the_report_and_the_right_length() -> None:
    reply = json.dumps({"choices": [{"index": 0, "finish_reason": "stop"}]}).encode()
    respond = [
        start(b"application/json"),
        {"type": "http.response.body", "body": reply[:10], "more_body": True},
        {"type": "http.response.body", "body": reply[10:]},
    ]
    sent, seen = through_middleware(b'{"length_target": 5, "messages": []}', respond)
    assert json.loads(seen[0])["custom_params"] == {"length_target": 5}
    assert json.loads(sent[1]["body"])["lenvm"] == {"achieved": 3}
    assert dict(sent[0]["headers"])[b"content-length"] == str(len(sent[1]["body"])).encode()


def test_event_streams_are_annotated_however_they_are_cut() -> None:
    events = [{"choices": [{"index": 0, "finish_reason": None}]}, {"choices": [{"index": 0, "finish_reason": "stop"}]}]
    raw = b"".join(b"data: " + json.dumps(e).encode() + b"\n\n" for e in events) + b"data: [DONE]\n\n"
    for size in (len(raw), 7, 30):
        pieces = [raw[i : i + size] for i in range(0, len(raw), size)]
        respond = [start(b"text/event-stream; charset=utf-8")]
        respond += [{"type": "http.response.body", "body": p, "more_body": True} for p in pieces]
        respond += [{"type": "http.response.body", "body": b"", "more_body": False}]
        sent, _ = through_middleware(b'{"length_target": 5}', respond)
        out = b"".join(m["body"] for m in sent[1:])
        datas = [e[6:] for e in out.split(b"\n\n") if e]
        assert datas[-1] == b"[DONE]"
        assert "lenvm" not in json.loads(datas[0])
        assert json.loads(datas[1])["lenvm"] == {"achieved": 3}


def test_bad_fields_never_reach_the_application() -> None:
    sent, seen = through_middleware(b'{"length_target": 0}', [])
    assert seen == []
    assert sent[0]["status"] == 400
    assert json.loads(sent[1]["body"])["error"]["param"] == "length_target"
    sent, seen = through_middleware(b'{"length_target": 4}', [], path="/v1/messages")
    assert seen == []
    assert sent[0]["status"] == 400


def test_nan_never_gets_in() -> None:
    sent, _ = through_middleware(b'{"length_bias": NaN}', [])
    assert sent[0]["status"] == 400
    assert math.isfinite(json.loads(sent[1]["body"])["error"]["code"])


def test_the_base_models_settings_are_not_the_value_models(pair: Path) -> None:
    """SGLang hands `--quantization` and config overrides on to draft models, which the value model is no more than by
    the way it is loaded."""
    from sglang.srt.server_args import ServerArgs

    server_args = ServerArgs(
        model_path=str(pair / "base"), quantization="fp8", json_model_override_args='{"hidden_size": 7}', device="cpu"
    )
    config = value_config(Settings(str(pair / "lenvm")), server_args, 256)
    assert config.quantization is None
    assert config.hidden_size == 64
    assert config.context_len == 256
