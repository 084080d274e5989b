"""The RL example: its advantages and its step against plain loops, and the whole comparison on a tiny pair."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import compare
import policy
import pytest
import tokenizer as demo_tokenizer
import torch
import world
from prepare import prompt_row, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from lenvm.evaluation.outcome import read_outcome
from lenvm.format import LenvmConfig
from lenvm.modeling import LengthValueModel
from lenvm.rl import length_advantages


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random base and LenVM where a demo run has its own, and its problems."""
    root = tmp_path_factory.mktemp("demo")
    texts = [text for prompt, answer in world.draw_corpus(0, 300) for text in (prompt.text, answer)]
    tokenizer = demo_tokenizer.train_tokenizer(texts)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(root / "base")
    block = LenvmConfig(gamma=0.95, heads=("value",))
    LengthValueModel.from_backbone(root / "base", block).save_pretrained(root / "lenvm")
    for part in ("base", "lenvm"):
        tokenizer.save_pretrained(root / part)
    for split in ("train", "test"):
        prompts = world.draw_prompts(0, 8, split, {"problem": 0.7, "list": 0.3})
        write_jsonl(
            root / "prepare" / f"prompts_{split}.jsonl", (prompt_row(p, f"{split}-{i}") for i, p in enumerate(prompts))
        )
    return root


@pytest.fixture(scope="module")
def drawn(demo: Path) -> policy.Answers:
    """Three answers to each of three problems, some of them cut."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(demo / "base").eval()
    tokenizer = AutoTokenizer.from_pretrained(demo / "base")
    return policy.draw(model, tokenizer, compare.problems(demo, "train")[:3], 3, 40)


def test_answers_end_with_their_stop_token(demo: Path, drawn: policy.Answers) -> None:
    stop = AutoTokenizer.from_pretrained(demo / "base").eos_token_id
    assert drawn.finished.any() and not drawn.finished.all(), "the seed shows both"
    for ids, mask, finished in zip(drawn.ids, drawn.mask, drawn.finished, strict=True):
        answer = ids[mask].tolist()
        assert answer.count(stop) == int(finished)
        assert answer[-1] == stop if finished else len(answer) == 40
    assert (drawn.seen.bool() | ~drawn.mask).all()


def test_advantages_are_those_of_single_rows(demo: Path, drawn: policy.Answers) -> None:
    drawn.right[:] = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 0, 1])
    lenvm = LengthValueModel.from_pretrained(demo / "lenvm").eval()
    found = policy.token_advantages(drawn, lenvm, 3, 0.5, 0.9)
    task = [2 / 3, -1 / 3, -1 / 3, 0, 0, 0, -1 / 3, -1 / 3, 2 / 3]
    for row, expected in enumerate(task):
        ids = drawn.ids[row][drawn.seen[row].bool()][None]
        count = int(drawn.mask[row].sum())
        with torch.no_grad():
            values = -torch.sigmoid(lenvm(input_ids=ids).z[:, -count - 1 :])
        last = torch.zeros(1) if drawn.finished[row] else values[:, -1]
        everywhere = torch.ones(1, count, dtype=torch.bool)
        length = length_advantages(values[:, :-1], everywhere, 0.95, 0.9, last)[0]
        torch.testing.assert_close(found[row][drawn.mask[row]], expected + 0.5 * length, rtol=1e-4, atol=1e-5)
    alone = policy.token_advantages(drawn, None, 3, 0.0, 0.9)
    torch.testing.assert_close(alone[:, 0], torch.tensor(task))


def test_the_step_follows_the_policy_gradient(demo: Path, drawn: policy.Answers) -> None:
    torch.manual_seed(2)
    advantage = 0.01 * torch.randn(drawn.ids.shape)  # small, so that the gradient is not clipped
    one, other = (AutoModelForCausalLM.from_pretrained(demo / "base").eval() for _ in range(2))
    policy.update(one, torch.optim.SGD(one.parameters(), lr=1.0), drawn, advantage, rows=2)
    total = torch.zeros(())
    for row in range(len(drawn.ids)):
        seen = drawn.seen[row].bool()
        ids, mask, weight = drawn.ids[row][seen], drawn.mask[row][seen], advantage[row][seen]
        log_p = other(input_ids=ids[None]).logits[0].log_softmax(-1)
        for t in range(1, len(ids)):
            if mask[t]:
                total = total + weight[t] * log_p[t - 1, ids[t]]
    (total / drawn.mask.sum()).backward()
    for (name, moved), started in zip(one.named_parameters(), other.parameters(), strict=True):
        assert started.grad is not None
        torch.testing.assert_close(moved, started + started.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_the_comparison_end_to_end(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rl"
    words = [str(demo), "--out", str(out), "--steps", "2", "--prompts", "2", "--group", "2", "--max-tokens", "24",
             "--samples", "2", "--limit", "3", "--seeds", "0", "1"]  # fmt: skip
    compare.main(words)
    outcome = read_outcome(out / "results.json")
    assert [row[0] for row in outcome.sheet("Before").rows] == [
        "base model, before", "A_task alone", "A_task + 2 A_length"
    ]  # fmt: skip
    assert [row[0] for row in outcome.sheet("With").rows] == ["A_task + 2 A_length"]
    assert len(outcome.sheet("Each").rows) == 5
    assert [len(s.x) for plot in outcome.plots for s in plot.series] == [1] * 3 + [2] * 4
    with (out / "table.csv").open() as file:
        assert [row["answers"] for row in csv.DictReader(file)] == ["6", "12", "12"]
    before = json.loads((out / "before.json").read_text())["result"]["answers"]
    assert float(outcome.sheet("Before").rows[0][1].value) == sum(a["length"] for a in before) / 6  # type: ignore[union-attr]
    assert (out / "figures.png").is_file()
    assert "step 2/2" in capsys.readouterr().out
    compare.main(words)
    assert "step" not in capsys.readouterr().out, "nothing is trained twice"
    for bad, said in (([str(tmp_path)], "give a finished demo run"), ([str(demo), "--group", "1"], "got 1")):
        with pytest.raises(SystemExit):
            compare.main(bad)
        assert said in capsys.readouterr().err
