"""Effects of tokens against hand computations, and values of states against the model itself."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lenvm.cli import main
from lenvm.definitions import td_residual
from lenvm.evaluation.bootstrap import group_intervals, mean_interval
from lenvm.evaluation.data import read_natural
from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.outcome import read_outcome
from lenvm.evaluation.pieces import token_pieces
from lenvm.evaluation.samples import read_samples
from lenvm.evaluation.tokens import Answered, token_effects, token_name
from lenvm.evaluation.values import StateValues, Text, local_values, values_of
from lenvm.modeling import LengthValueModel
from lenvm.report.plots import drawn
from tests.sglang.models import make_vision_pair
from tests.sglang.reference import VisionReference

GAMMA = 0.9


def exact(remaining: list[float]) -> StateValues:
    """Values of a model that expects so many tokens at each state."""
    n = np.asarray(remaining, dtype=np.float64)
    return StateValues(value=-(1.0 - GAMMA**n), remaining=n)


def test_residual_and_change_by_hand():
    values = exact([3, 2, 5, 0])  # the second token adds four tokens to what was expected, the third removes four
    assert values.changes().tolist() == [0.0, 4.0, -4.0]
    by_hand = [0.0, GAMMA**6 - GAMMA**2, GAMMA - GAMMA**5]
    assert values.td_residuals(GAMMA) == pytest.approx(by_hand)
    assert values.td_residuals(GAMMA) == pytest.approx(td_residual(torch.tensor(values.value[:-1]), GAMMA).numpy())


def test_effects_of_known_answers():
    # "wait" adds four tokens wherever it stands, "so" removes two, "x" does nothing
    answers = [
        Answered(f"p{i}", ["x", " Wait", "x", " so", "x", "<stop>"], exact([6, 5, 8, 7, 4, 3, 0])) for i in range(6)
    ]
    found = {t.token: t for t in token_effects(answers, GAMMA, min_count=6, min_prompts=5, contexts=2)}
    assert next(iter(found)) == "wait"
    assert (found["wait"].change.value, found["wait"].change.low) == pytest.approx((4.0, 4.0))
    assert found["wait"].effect.value == pytest.approx(GAMMA**5 - GAMMA**9)
    assert found["so"].change.value == pytest.approx(-2.0)
    assert found["so"].effect.value == pytest.approx(GAMMA**7 - GAMMA**5)
    assert (found["wait"].lengthening, found["wait"].shortening) == pytest.approx((1.0, 0.0))
    assert (found["x"].effect.n, found["x"].effect.prompts) == (18, 6)
    assert found["x"].effect.value == pytest.approx(0.0, abs=1e-12)
    assert len(found["wait"].contexts) == 2
    assert found["wait"].contexts[0].startswith("x⟦ Wait⟧x sox")
    assert token_effects(answers, GAMMA, min_count=6, min_prompts=7) == []


def test_names_of_tokens():
    assert [token_name(t) for t in (" Wait", "wait", "\n\n", "  ", "")] == ["wait", "wait", "\\n\\n", "␣␣", "(nothing)"]


def test_group_intervals_are_those_of_each_group_alone_where_every_prompt_has_it():
    rng = np.random.default_rng(1)
    prompts = [f"p{i % 10}" for i in range(200)]
    groups = ["a" if (i // 10) % 2 else "b" for i in range(200)]
    values = rng.normal(size=200)
    found = group_intervals(values, prompts, groups)
    for name in ("a", "b"):
        here = [g == name for g in groups]
        alone = mean_interval(values[here], [p for p, h in zip(prompts, here, strict=True) if h])
        assert alone is not None
        assert found[name].value == pytest.approx(alone.value)
        assert (found[name].low, found[name].high) == pytest.approx((alone.low, alone.high))
        assert (found[name].n, found[name].prompts) == (100, 10)


def test_values_are_those_of_the_model_state_by_state(world):
    rows = read_samples(world.samples, 1, 4)
    texts = [Text(r.prompt_token_ids, r.token_ids, r.finish_reason == "stop") for r in rows]
    values, gamma = local_values(world.lenvm, texts, lambda *_: None)
    model = LengthValueModel.from_pretrained(world.lenvm, dtype=torch.float32).eval()
    assert gamma == model.lenvm.gamma
    for row, found in zip(rows, values, strict=True):
        for t in (0, len(row.token_ids) // 2, len(row.token_ids) - 1):
            with torch.inference_mode():
                out = model(input_ids=torch.tensor([[*row.prompt_token_ids, *row.token_ids[:t]]]))
                assert found.remaining[t] == pytest.approx(float(model.predicted_length(out)[0, -1]), rel=1e-4)
                assert found.value[t] == pytest.approx(float(-torch.sigmoid(out.z[0, -1])), rel=1e-4)
        assert found.remaining[-1] == found.value[-1] == 0.0
        assert len(found.value) == len(row.token_ids) + 1
        assert found.p10 is not None and found.p90 is not None
        assert (found.p10 <= found.p90).all()
    cut = local_values(world.lenvm, [texts[0]._replace(stopped=False)], lambda *_: None)[0][0]
    assert cut.value[-1] < 0


def test_pieces_join_to_the_text_and_keep_whole_characters(world, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<stop>", *letters])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<stop>")
    fast.save_pretrained(tmp_path)
    text = "Ça 等于 🎉!"
    ids = [*fast(text)["input_ids"], 0]
    (pieces,) = token_pieces(tmp_path, [ids])
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text + "<stop>"
    assert "🎉" in pieces
    with pytest.raises(EvaluationError, match="token id 9999"):
        token_pieces(tmp_path, [[9999]])


def test_the_command(world, tmp_path):
    out = tmp_path / "tokens"
    words = ["eval", "tokens", "--samples", str(world.samples), "--out", str(out)]
    done = CliRunner().invoke(main, [*words, "--lenvm", str(world.lenvm), "--per-prompt", "8", "--min-count", "5"])
    assert done.exit_code == 0, done.output
    outcome = read_outcome(out / "results.json")
    assert outcome.parameters["gamma"] == 0.98
    assert outcome.sheet("TD residuals").rows[0][-1] == sum(
        len(json.loads(line)["completion_token_ids"])
        for i, line in enumerate(world.samples.read_text().splitlines())
        if i % 16 < 8
    )
    for plot in outcome.plots[1:]:
        (cloud,) = plot.series
        (table,) = [s for s in outcome.sheets if s.title == f"Tokens that {cloud.label}"]
        beyond = {row[0]: row[3 + (cloud.label == "shorten")] * row[5] / 100.0 for row in table.rows}
        assert dict(zip(cloud.names, cloud.y, strict=True)) == pytest.approx({w: n for w, n in beyond.items() if n})
        assert re.search(r"<image [^>]*base64", drawn(plot))
    assert len(outcome.plots) > 1
    neither = CliRunner().invoke(main, words)
    assert neither.exit_code == 1
    assert "give --tokenizer DIR" in " ".join(neither.output.split())
    both = CliRunner().invoke(main, [*words, "--lenvm", str(world.lenvm), "--server", "http://127.0.0.1:9"])
    assert "give either the directory" in " ".join(both.output.split())
    gone = CliRunner().invoke(main, [*words, "--server", "http://127.0.0.1:9", "--tokenizer", str(world.base)])
    assert "does not answer" in " ".join(gone.output.split())
    rare = CliRunner().invoke(main, [*words, "--lenvm", str(world.lenvm), "--min-count", "9999"])
    assert "lower --min-count" in " ".join(rare.output.split())


def test_values_of_a_server(world, fake_server):
    rows = read_samples(world.samples, 1)
    texts = [Text(r.prompt_token_ids, r.token_ids, True) for r in rows]
    values, gamma = values_of(texts, None, fake_server.url)
    assert gamma == 0.98
    assert [v.remaining[0] for v in values] == [len(t.completion) for t in texts]
    assert all(np.abs(v.td_residuals(gamma)).max() < 1e-9 for v in values)


def test_values_of_prompts_with_images(tmp_path):
    """Equal to the model's own forward, whether a prompt has all tokens of an image or one for each."""
    pair = make_vision_pair(tmp_path, "Qwen2_5_VL")
    reference = VisionReference(pair)
    image = tmp_path / "noise.png"
    Image.effect_noise((70, 50), 90).convert("RGB").save(image)
    mark = reference.base.config.image_token_id
    with Image.open(image) as opened:
        ids = reference.read(f"hello {reference.processor.image_token} fox", [opened])
    short = [t for t, before in zip(ids, [None, *ids], strict=False) if not t == before == mark]
    assert ids.count(mark) > short.count(mark) == 1
    completion = [ids[0]] * 3
    texts = [Text(ids, completion, False, [image]), Text(ids[:1], completion, False),
             Text(short, completion, True, [image])]  # fmt: skip
    (whole, plain, marked), gamma = values_of(texts, pair / "lenvm", None)
    assert gamma == 0.97
    expected = [reference.expected_length([*ids, *completion[:i]]) for i in range(4)]
    assert whole.remaining == pytest.approx(expected, rel=1e-4)
    assert marked.remaining == pytest.approx([*expected[:3], 0.0], rel=1e-4)
    assert whole.remaining[1] != pytest.approx(plain.remaining[1], rel=1e-3)
    for prompt, images, message in (
        ([*ids, mark], [image], "tokens of images, and its 1 images make"),
        (ids, [tmp_path / "gone.png"], "gone.png cannot be opened"),
    ):
        with pytest.raises(EvaluationError, match=message):
            values_of([Text(prompt, completion, False, images)], pair / "lenvm", None)
    with pytest.raises(EvaluationError, match="reads no images"):
        values_of(texts, None, "http://127.0.0.1:1")


def test_a_text_model_reads_no_images(world):
    with pytest.raises(EvaluationError, match="the samples have images and the LenVM"):
        values_of([Text([1], [2], True, ["a.png"])], world.lenvm, None)


def test_prompts_with_images_are_not_asked_by_control(world, tmp_path):
    copy = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in world.prompts.read_text().splitlines()]
    copy.write_text("".join(json.dumps({**row, "images": ["a.png"]}) + "\n" for row in rows))
    with pytest.raises(EvaluationError, match="line 1 has images"):
        read_natural(copy, world.samples)
