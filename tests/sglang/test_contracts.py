"""What a length target means beside everything else a request may say: grammars, stops, penalties, limits, thinking."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest
import torch

from tests.sglang.conftest import Server
from tests.sglang.models import FIRST_WORD, THINK, THINK_END, VOCABULARY, prompts, tokenizer
from tests.sglang.reference import Reference
from tests.sglang.test_serving import LIMIT, together

pytestmark = pytest.mark.slow
WORDS = range(FIRST_WORD, VOCABULARY - 1)


def strict(target: int, mode: str = "equal_to") -> dict[str, Any]:
    return {"length_target": target, "length_mode": mode, "length_strict": True}


def count(answer: dict[str, Any]) -> int:
    return int(answer["meta_info"]["completion_tokens"])


def finish(answer: dict[str, Any]) -> str:
    return str(answer["meta_info"]["finish_reason"]["type"])


# ----- grammars: they come first ------------------------------------------------------------------------------------


def test_strict_is_exact_where_the_grammar_lets_it(guided: Server) -> None:
    for target in (2, 9):
        answer = guided.generate(prompts(1, seed=50)[0], 40, strict(target), regex="[a-z]+", temperature=1.0)
        assert count(answer) == target
        assert re.fullmatch("[a-z]+", answer["text"])


def test_a_grammar_that_cannot_end_at_the_bound_wins(guided: Server) -> None:
    """The stop token comes as soon as the grammar allows it, and not before the bound where it leaves a choice."""
    (prompt,) = prompts(1, seed=51)
    long = guided.generate(prompt, 60, strict(3), regex="[a-c]{20}", temperature=1.0)
    assert re.fullmatch("[a-c]{20}", long["text"])
    assert long["lenvm"]["achieved"] == count(long) > 3
    assert finish(long) == "stop"
    short = guided.generate(prompt, 60, strict(30, "at_least"), regex="(yes|no)", temperature=1.0)
    assert short["text"] in ("yes", "no")
    assert count(short) < 30


def test_json_schema(guided: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}, "b": {"type": "boolean"}},
              "required": ["a", "b"], "additionalProperties": False}  # fmt: skip
    words = tokenizer()
    # a grammar allows any amount of white space, and random weights like it
    spaces = {str(t): -100 for t in range(VOCABULARY - 1) if any(c.isspace() for c in words.decode([t]))}
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 60, "length_target": 20,
            "logit_bias": spaces, "response_format": wanted}  # fmt: skip
    answer = guided.post("/v1/chat/completions", body).json()
    found = json.loads(answer["choices"][0]["message"]["content"])
    assert set(found) == {"a", "b"}
    assert answer["lenvm"]["achieved"] == answer["usage"]["completion_tokens"]


# ----- stops --------------------------------------------------------------------------------------------------------


def test_stop_token_ids_are_stop_tokens(guided: Server) -> None:
    stops = list(WORDS[::3])
    for mode, kept in (("equal_to", int.__eq__), ("at_most", int.__le__), ("at_least", int.__ge__)):
        answer = guided.generate(
            prompts(1, seed=52)[0], 60, {**strict(7, mode), "return_length_values": True}, temperature=1.0,
            stop_token_ids=stops,
        )  # fmt: skip
        assert kept(count(answer), 7), mode
        assert finish(answer) == "stop"
        *body, last = answer["output_ids"]
        assert not set(body) & set(stops)
        assert last in [*stops, 2]
        assert answer["lenvm"]["values"][-1] == 0.0


def test_stop_strings_end_an_answer_that_is_not_strict(guided: Server) -> None:
    (prompt,) = prompts(1, seed=53)
    whole = guided.generate(prompt, 30, {"length_target": 20})
    letters = [c for c in whole["text"] if c.isascii() and c.isalnum()]
    stop = letters[len(letters) // 2]
    cut = guided.generate(prompt, 30, {"length_target": 20}, stop=[stop])
    assert cut["meta_info"]["finish_reason"]["matched"] == stop
    assert cut["output_ids"] == whole["output_ids"][: count(cut)]
    assert cut["lenvm"]["achieved"] == count(cut) < count(whole)


# ----- limits -------------------------------------------------------------------------------------------------------


def test_min_tokens(guided: Server) -> None:
    """The host lets an answer stop behind `min_tokens` tokens, so it has one more of them."""
    (prompt,) = prompts(1, seed=54)
    wish = {"logit_bias": {"2": 100.0}}
    assert count(guided.generate(prompt, 40, None, min_new_tokens=5, **wish)) == 6
    for fields in (strict(6), strict(6, "at_most")):
        assert count(guided.generate(prompt, 40, fields, min_new_tokens=5, **wish)) == 6
        body = {"input_ids": prompt, "sampling_params": {"min_new_tokens": 6, "max_new_tokens": 40}, **fields}
        refused = guided.post("/generate", body)
        assert refused.status_code == 400
        assert "contradicts min_tokens 6" in refused.json()["error"]["message"]
    assert count(guided.generate(prompt, 40, strict(4, "at_least"), min_new_tokens=9, **wish)) == 10


def test_max_tokens_at_the_target_is_enough(guided: Server) -> None:
    (prompt,) = prompts(1, seed=55)
    exact = guided.generate(prompt, 9, strict(9), temperature=1.0)
    assert (count(exact), finish(exact)) == (9, "stop")
    cut = guided.generate(prompt, 4, strict(30, "at_most"), logit_bias={"2": -100.0})
    assert (count(cut), finish(cut)) == (4, "length")


def test_a_target_that_the_prompt_leaves_no_room_for(guided: Server) -> None:
    prompt = [9] * 480
    for stream in (False, True):
        body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 31}, "stream": stream}
        answer = guided.post("/generate", {**body, **strict(31)})
        assert "length_target 31 (equal_to) cannot be reached: the prompt has 480 tokens" in answer.text
        assert answer.status_code == (200 if stream else 400)  # the host answers streams before it has read the prompt
    assert count(guided.generate(prompt, 30, strict(30))) == 30
    chat = {"model": "m", "messages": [{"role": "user", "content": "x z" * 150}], **strict(100)}
    assert guided.post("/v1/chat/completions", chat).status_code == 400


def test_the_room_that_is_made_for_a_target_is_not_more_than_there_is(guided: Server) -> None:
    """2 * 60 + 32 tokens behind a prompt of 400 are more than the context of 512; the target itself fits."""
    body = {"input_ids": [9] * 400, "sampling_params": {"temperature": 0}, **strict(60)}
    assert guided.post("/generate", body).json()["lenvm"]["achieved"] == 60
    batch = {**body, "input_ids": [[9] * 400, [8] * 430]}
    assert [a["lenvm"]["achieved"] for a in guided.post("/generate", batch).json()] == [60, 60]


# ----- what acts on the logits --------------------------------------------------------------------------------------


def test_penalties_and_logit_bias_act_before_guidance(guided: Server, reference: Reference) -> None:
    (prompt,) = prompts(1, seed=56)
    banned = reference.greedy(prompt, LIMIT, {"length_target": 16})[0]

    def adjust(logits: torch.Tensor, out: list[int]) -> None:
        for token, times in Counter(out).items():
            logits[token] -= 0.9 * times + 0.5
        logits[banned] -= 100.0

    fields = {"length_target": 16}
    answer = guided.generate(
        prompt, LIMIT, fields, frequency_penalty=0.9, presence_penalty=0.5, logit_bias={str(banned): -100.0}
    )
    assert answer["output_ids"] == reference.greedy(prompt, LIMIT, fields, adjust)
    assert banned not in answer["output_ids"]


# ----- thinking -----------------------------------------------------------------------------------------------------

SCOPES: tuple[dict[str, Any], ...] = (
    {"length_target": 8, "length_scope": "thinking"},
    {"length_target": 5, "length_scope": "thinking", "length_mode": "at_most"},
    {"length_target": 12, "length_scope": "thinking", "length_mode": "at_least"},
    {"length_target": 6, "length_scope": "thinking", "length_control": "hard"},
    {"length_target": 9, "length_scope": "answer"},
    {"length_target": 7, "length_scope": "answer", "length_mode": "at_most"},
    {"length_target": 11, "length_scope": "answer", "length_strict": True},
    {"length_target": 14, "length_scope": "all"},
)


@pytest.mark.floor
def test_scopes(stressed: Server, mixed_reference: Reference) -> None:
    """Beside an independent implementation, under chunked prefill and retraction."""
    from concurrent.futures import ThreadPoolExecutor

    bias = {str(THINK_END): 4.0}

    def adjust(logits: torch.Tensor, out: list[int]) -> None:
        logits[THINK_END] += 4.0

    asked = [([*p, THINK], f) for p, f in zip(prompts(len(SCOPES), seed=57), SCOPES, strict=True)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda a: stressed.generate(a[0], 30, a[1], logit_bias=bias), asked))
    thought = 0
    for (prompt, fields), answer in zip(asked, answers, strict=True):
        tokens = answer["output_ids"]
        assert tokens == mixed_reference.greedy(prompt, 30, fields, adjust), f"{fields}"
        if THINK_END in tokens and fields["length_scope"] != "all":
            thought += 1
            split = tokens.index(THINK_END) + 1
            expected = split if fields["length_scope"] == "thinking" else len(tokens) - split
            assert answer["lenvm"]["achieved"] == expected
            if fields.get("length_strict"):
                assert expected == fields["length_target"]
    assert thought >= 4, "hardly any answer ended its thinking: the test tests little"


def test_a_prompt_without_thinking_is_all_answer(stressed: Server, mixed_reference: Reference) -> None:
    (prompt,) = prompts(1, seed=58)
    closed = [*prompt, THINK, THINK_END]
    fields = {"length_target": 9, "length_scope": "answer", "length_strict": True}
    answer = stressed.generate(closed, 30, fields)
    assert answer["output_ids"] == mixed_reference.greedy(closed, 30, {"length_target": 9, "length_strict": True})
    assert answer["lenvm"] == {**answer["lenvm"], "achieved": 9, "scope": "answer"}
    # neither opened nor closed: the first token shows that the model does not think
    answer = stressed.generate(prompt, 30, fields, logit_bias={str(THINK): -100.0})
    assert answer["lenvm"]["achieved"] == 9


def test_scope_needs_a_server_that_knows_the_tags(guided: Server, stressed: Server) -> None:
    body = {"text": "hello", "length_target": 5, "length_scope": "answer"}
    refused = guided.post("/generate", {**body, "stream": True})
    assert refused.status_code == 400
    assert "--reasoning-parser" in refused.json()["error"]["message"]
    for fields in ({"length_scope": "reply"}, {"length_scope": "thinking", "length_strict": True}):
        error = stressed.post("/generate", {**body, **fields}).json()["error"]
        assert error["param"] == "length_scope"


def test_unguided_requests_on_the_way(guided: Server) -> None:
    """A batch of everything above at once leaves plain requests what they are alone."""
    plain = prompts(4, seed=59)
    alone = [guided.generate(p, LIMIT)["output_ids"] for p in plain]
    crowd = [(p, None) for p in plain] + [(p, strict(9)) for p in prompts(6, seed=60)]
    assert [a["output_ids"] for a in together(guided, crowd)[:4]] == alone
