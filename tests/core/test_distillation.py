"""`lenvm distill`: what is learnt against a loop over candidates, falling KL, resume, and what is refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from typer.testing import CliRunner

from lenvm import LengthBins, LengthValueModel, LenvmConfig
from lenvm.attached import AttachedHead, base_hash
from lenvm.cli import main
from lenvm.distillation.control import ControlCheck
from lenvm.distillation.errors import DistillationError
from lenvm.distillation.run import Paths, distil
from lenvm.distillation.states import StateReader, read_completions
from lenvm.distillation.training import Progress, Settings
from lenvm.format import read_lenvm_config
from lenvm.heads import LookaheadHead

V, STOP = 24, 2
BINS = LengthBins.for_max_length(30)
SETTINGS = Settings(rank=8, round_size=16, passes=2, epochs=2, batch=32, states=6, candidates=5,
                    control_every=3, control_answers=8)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model with its tokenizer, a teacher, and samples whose tokens are random."""
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=False,
                         initializer_range=0.5, eos_token_id=STOP, pad_token_id=0, bos_token_id=None)  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder / "base")
    teacher = LengthValueModel.from_backbone(config, LenvmConfig(gamma=0.9, bins=BINS.centres, base_model="tiny"))
    torch.nn.init.normal_(teacher.length_head.w2, std=0.5)
    teacher.save_pretrained(folder / "lenvm")
    core = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    for part in ("base", "lenvm"):
        PreTrainedTokenizerFast(tokenizer_object=core, eos_token="w2").save_pretrained(folder / part)
    for name, prompts in (("train", range(12)), ("val", range(20, 24))):
        draw = random.Random(name)
        rows = [
            {
                "prompt_id": f"p{i}",
                "prompt_token_ids": [draw.randrange(3, V) for _ in range(draw.randrange(1, 6))],
                "completion_token_ids": [draw.randrange(3, V) for _ in range(draw.randrange(9))] + [STOP],
                "sampling": {"temperature": 0.8, "top_p": 0.95, "top_k": -1, "min_p": 0.0},
            }
            for i in prompts
            for _ in range(4)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


def paths(world: Path, out: Path) -> Paths:
    return Paths(world / "base", world / "lenvm", world / "train.jsonl", out, world / "val.jsonl")


@pytest.mark.parametrize("state_of", ["base", "lenvm"])
@torch.no_grad()
def test_states_are_those_of_separate_sequences(world: Path, state_of: Any) -> None:
    """Every state and candidate alone, as a sequence of its own, against the reader's two forwards a batch."""
    base = AutoModelForCausalLM.from_pretrained(world / "base").eval()
    teacher = LengthValueModel.from_pretrained(world / "lenvm").eval()
    completions, sampled = read_completions(world / "train.jsonl")
    completions = sorted(completions[:9], key=lambda c: len(c.prompt) + len(c.completion))
    reader = StateReader(base, teacher, sampled, [STOP], candidates=5, states=99, state_of=state_of)
    states = reader.read(completions, torch.Generator().manual_seed(0))
    row = compared = 0
    for c in completions:
        for t in range(len(c.completion)):
            ids = [*c.prompt, *c.completion[:t]]
            out = base.model(torch.tensor([ids])).last_hidden_state[0, -1]
            p, tokens = torch.softmax(base.lm_head(out).double() / 0.8, -1).sort(descending=True)
            keep = [k for k in range(5) if p[:k].sum() <= 0.95]
            candidates = {int(tokens[k]): float(p[k] / p[keep].sum()) for k in keep}
            if set(candidates) == {STOP}:
                continue
            own = out if state_of == "base" else teacher.backbone(torch.tensor([ids])).last_hidden_state[0, -1]
            torch.testing.assert_close(states.hidden[row], own, rtol=1e-4, atol=1e-4)
            assert states.token_ids[row, : len(keep)].tolist() == list(candidates)
            for k, (x, share) in enumerate(candidates.items()):
                weight = 0.0 if x == STOP else share**0.25
                assert states.weight[row, k].item() == pytest.approx(weight, rel=1e-4)
                if x != STOP:
                    scored = teacher(torch.tensor([[*ids, x]])).length_logits[0, -1].log_softmax(-1)
                    torch.testing.assert_close(states.log_q[row, k], scored, rtol=1e-4, atol=1e-4)
                    compared += 1
            assert not states.weight[row, len(keep) :].any()
            row += 1
    assert row == len(states)
    assert compared > 40


@pytest.mark.parametrize("state_of", ["base", "lenvm"])
@torch.no_grad()
def test_guided_answers_are_those_of_single_sequences(world: Path, state_of: Any) -> None:
    """Greedy answers of one padded batch with a cache, against whole sequences and the rule by hand."""
    base = AutoModelForCausalLM.from_pretrained(world / "base").eval()
    teacher = LengthValueModel.from_pretrained(world / "lenvm").eval()
    completions, sampled = read_completions(world / "val.jsonl")
    reader = StateReader(base, teacher, sampled, [STOP], candidates=5, states=6, state_of=state_of)
    torch.manual_seed(5)
    head = LookaheadHead(16, 8, len(BINS), tokens=V)
    head.reset_parameters()
    check = ControlCheck(reader, completions[::3], teacher.lenvm, None)
    lengths = []
    for c, answer in zip(completions[::3], check.answers(head, greedy=True), strict=True):
        ids, target, expected = list(c.prompt), len(c.completion), []
        while len(expected) < 1.5 * target and STOP not in expected:
            state = base.model(torch.tensor([ids])).last_hidden_state[0, -1]
            p, tokens = torch.softmax(base.lm_head(state).double() / 0.8, -1).sort(descending=True)
            if state_of == "lenvm":
                state = teacher.backbone(torch.tensor([ids])).last_hidden_state[0, -1]
            left, best = target - len(expected) - 1, {}
            for k in range(5):
                if p[:k].sum() > 0.95:
                    break
                pmf = BINS.pmf(head(state, tokens[k : k + 1]).log_softmax(-1))[0].double()
                after = torch.zeros_like(pmf).index_fill(0, torch.tensor(0), 1.0) if tokens[k] == STOP else pmf
                n = torch.arange(len(pmf))
                kernel = torch.exp(-n / 3) if left < 0 else (n == left).double()
                best[int(tokens[k])] = float(p[k].log() + 2 * ((after * kernel).sum() + 1e-30).log())
            token = max(best, key=lambda x: best[x])
            expected.append(token)
            ids.append(token)
        assert answer == expected
        lengths.append(len(answer))
    assert len(set(lengths)) > 1
    assert 0 < check(head) < 100


def test_distilling_lowers_the_kl_and_resumes_to_the_digit(world: Path, tmp_path: Path) -> None:
    whole = distil(paths(world, tmp_path / "whole"), SETTINGS, lambda *_: None)
    kl = [entry["held_out_kl"] for entry in whole.history]
    assert [i for i, entry in enumerate(whole.history, start=1) if "length_score" in entry] == [3, 6]
    assert whole.rounds == 6 and kl[-1] < 0.97 * kl[0] and whole.best == min(kl)

    def interrupt(progress: Progress, total: int) -> None:
        if progress.rounds == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distil(paths(world, tmp_path / "parts"), SETTINGS, interrupt)
    assert distil(paths(world, tmp_path / "parts"), SETTINGS, lambda *_: None) == whole
    for file in ("model.safetensors", "distill/round-00006.safetensors"):
        first, second = (load_file(tmp_path / run / file) for run in ("whole", "parts"))
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    with pytest.raises(DistillationError, match=r"lr: 0\.002 then, 0\.1 now"):
        distil(paths(world, tmp_path / "whole"), SETTINGS.model_copy(update={"lr": 0.1}), lambda *_: None)


def test_early_stop_and_numbers_that_are_none(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = SETTINGS.model_copy(update={"epochs": 20, "patience": 2, "control_every": 0})
    monkeypatch.setattr("lenvm.distillation.training.held_out_kl", lambda *_: 1.0)
    progress = distil(paths(world, tmp_path / "still"), settings, lambda *_: None)
    assert (progress.best_round, progress.rounds) == (1, 3)
    monkeypatch.setattr("lenvm.distillation.training.held_out_kl", lambda *_: float("nan"))
    with pytest.raises(DistillationError, match="lower --lr"):
        distil(paths(world, tmp_path / "nan"), settings, lambda *_: None)


def test_what_is_written(world: Path, tmp_path: Path) -> None:
    hidden, tokens = torch.randn(3, 16), torch.randint(V, (3, 4))
    for embedding in ("table", "projection"):
        settings = SETTINGS.model_copy(update={"embedding": embedding, "epochs": 0.3})
        distil(paths(world, tmp_path / embedding), settings, lambda *_: None)
        head = AttachedHead.from_pretrained(tmp_path / embedding, world / "base")
        assert head.lenvm.base_hash == base_hash(world / "base")
        assert head.lenvm.gamma == 0.9
        assert head.lenvm.base_model == "tiny"
        torch.testing.assert_close(head.lookahead(hidden, tokens).exp().sum(-1), torch.ones(3, 4))
        assert (tmp_path / embedding / "tokenizer.json").is_file()
    beside = SETTINGS.model_copy(update={"state_of": "lenvm", "epochs": 0.7})
    distil(paths(world, tmp_path / "lenvm"), beside, lambda *_: None)
    before, after = (LengthValueModel.from_pretrained(f).eval() for f in (world / "lenvm", tmp_path / "lenvm"))
    assert read_lenvm_config(tmp_path / "lenvm").heads == ("value", "length", "lookahead")
    ids = torch.randint(V, (1, 5))
    with torch.no_grad():
        assert torch.equal(before(ids).z, after(ids).z)
        assert after.lookahead(hidden, tokens).shape == (3, 4, len(BINS))


def test_command(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "head"
    words = ["distill", "--base", world / "base", "--lenvm", world / "lenvm", "--samples", world / "train.jsonl",
             "--out", out, "--rank", 4, "--epochs", 0.5, "--round-size", 16]  # fmt: skip
    done = CliRunner().invoke(main, [str(w) for w in words])
    assert done.exit_code == 0 and "held-out KL" in done.output, done.output
    assert read_lenvm_config(out).lookahead.rank == 4
    for changes, says in (
        (["--validation", world / "train.jsonl"], "share 12 prompts"),
        (["--samples", world / "none.jsonl"], "there is no"),
        (["--samples", world / "base/config.json"], "line 1 is not a completion"),
        (["--lenvm", world / "base"], "has no `lenvm` block"),
    ):
        done = CliRunner().invoke(main, [str(w) for w in [*words, *changes]])
        assert done.exit_code == 1 and says in done.output.replace("\n", " "), done.output


@pytest.mark.slow
def test_two_processes_distil_what_one_does(world: Path, tmp_path: Path) -> None:
    """Under torchrun, with batches so small that both have some to read."""
    small = "import lenvm.distillation.states as states; states.TOKENS_A_BATCH = 64\n"
    script = tmp_path / "distill.py"
    script.write_text(f"{small}from lenvm.cli import main\nmain()\n")
    words = ["distill", "--base", str(world / "base"), "--lenvm", str(world / "lenvm"), "--samples",
             str(world / "train.jsonl"), "--validation", str(world / "val.jsonl"), "--rank", "8", "--candidates", "5",
             "--round-size", "16", "--passes", "1", "--control-every", "2"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}

    def run(name: str, count: int, epochs: str) -> tuple[dict[str, torch.Tensor], str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
        command = [sys.executable, *launcher, str(script), *words, "--out", str(tmp_path / name), "--epochs", epochs]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        said = [line for line in done.stderr.splitlines() if "round" in line and "held out" in line]
        (kept,) = (tmp_path / name / "distill").glob("round-*.safetensors")
        return load_file(kept), "\n".join(said)

    one, said = run("one", 1, "1")
    two, said_by_two = run("two", 2, "1")
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert said == said_by_two, "one voice, the same figures"
    assert said.count("Length Score") >= 1
