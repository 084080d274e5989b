"""A tiny Qwen2, a tiny chat tokenizer and sampled rows; real `llamafactory-cli` runs in subprocesses."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    "count",
    "to",
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "and",
    "so",
    "on",
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_base(directory: Path, **changes: Any) -> None:
    """A random tiny Qwen2 with a byte-level BPE tokenizer that knows the ChatML tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [f"system user assistant You are a helpful assistant. {' '.join(WORDS)} {i}" for i in range(40)]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=360,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=specials,
        chat_template=TEMPLATE,
    )
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = Qwen2Config(
        **{
            "vocab_size": len(fast) + 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": fast.eos_token_id,
            "pad_token_id": fast.pad_token_id,
            **changes,
        }
    )
    Qwen2ForCausalLM(config).save_pretrained(directory)


def sampled_rows(
    tokenizer: Any, prompts: int = 12, samples: int = 4, seed: int = 0, censored: bool = True
) -> list[dict]:
    """Rows as `lenvm sample` writes them; about one in eight is cut when `censored`."""
    rng = random.Random(seed)
    rows = []
    for p in range(prompts):
        messages = [{"role": "user", "content": f"count to {WORDS[p % len(WORDS)]} {p}"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for s in range(samples):
            completion = " ".join(rng.choices(WORDS, k=rng.randint(1, 6 + 3 * (p % 4))))
            ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
            cut = censored and rng.random() < 0.125
            rows.append(
                {
                    "prompt_id": f"p{p}",
                    "messages": messages,
                    "prompt_token_ids": prompt_ids,
                    "completion": completion,
                    "completion_token_ids": ids if cut else [*ids, tokenizer.eos_token_id],
                    "finish_reason": "length" if cut else "stop",
                    "seed": seed,
                    "sample": s,
                    "model": "tiny",
                    "sampling": {"temperature": 1.0, "max_tokens": 64},
                    "meta": {"answer": p} if p % 2 else {"answer": str(p), "kind": "word"},
                }
            )
    return rows


def write_jsonl(path: Path, rows: list[Any]) -> None:
    """One JSON object a line."""
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )


class World:
    """A base model, a data folder and a way to run the host on them."""

    def __init__(self, root: Path, sites: dict[str, Path]) -> None:
        from transformers import AutoTokenizer

        self.root, self.sites, self.runs = root, sites, itertools.count()
        self.base = root / "base"
        self.data = root / "data"
        self.data.mkdir(parents=True)
        make_base(self.base)
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        self.train_rows = sampled_rows(self.tokenizer)
        self.eval_rows = sampled_rows(self.tokenizer, prompts=5, samples=3, seed=1)
        self.info: dict[str, Any] = {}
        self.add("train", self.train_rows)
        self.add("held_out", self.eval_rows)
        chat = [
            {"messages": [*row["messages"], {"role": "assistant", "content": row["completion"]}]}
            for row in self.train_rows
        ]
        self.add(
            "chat",
            chat,
            formatting="sharegpt",
            columns={"messages": "messages"},
            tags={"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        )

    def add(self, name: str, rows: list[Any], **info: Any) -> None:
        """Write a data set and enter it into dataset_info.json."""
        write_jsonl(self.data / f"{name}.jsonl", rows)
        self.info[name] = {"file_name": f"{name}.jsonl", "formatting": "lenvm", **info}
        (self.data / "dataset_info.json").write_text(json.dumps(self.info), encoding="utf-8")

    @staticmethod
    def steps(output: Path, key: str = "loss") -> list[float]:
        """The values logged under `key`, step by step."""
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        return [entry[key] for entry in history if key in entry]

    def settings(self, output: Path, **changes: Any) -> dict[str, Any]:
        """A small full fine-tuning run on the CPU; a value of None removes the key."""
        settings = {
            "model_name_or_path": str(self.base),
            "stage": "lenvm",
            "do_train": True,
            "finetuning_type": "full",
            "dataset": "train",
            "dataset_dir": str(self.data),
            "template": "qwen",
            "cutoff_len": 128,
            "output_dir": str(output),
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "max_steps": 6,
            "logging_steps": 1,
            "save_steps": 1000,
            "report_to": "none",
            "use_cpu": True,
            "seed": 7,
            "disable_gradient_checkpointing": True,
            "dataloader_num_workers": 0,
            **changes,
        }
        return {key: value for key, value in settings.items() if value is not None}

    def run(
        self, settings: dict[str, Any], command: str = "train", route: str = "pth", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`llamafactory-cli COMMAND x.yaml` in a fresh interpreter.

        Args:
            route: "pth" (the plug-in's .pth file is active), "explicit" (`lenvm-train`, no .pth), "none" (no plug-in)
                or the name of another folder of `self.sites`.
        """
        path = self.root / f"run{next(self.runs)}.yaml"
        path.write_text(yaml.safe_dump(settings), encoding="utf-8")
        module = "lenvm_lf.cli" if route == "explicit" else "llamafactory.cli"
        argv = ["llamafactory-cli", command, str(path)]
        site = self.sites["none" if route == "explicit" else route]
        return subprocess.run(
            [sys.executable, "-c", f"import sys; sys.argv = {argv!r}; from {module} import main; main()"],
            env={**base_env(), "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]), **(env or {})},
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def train(self, output: Path, route: str = "pth", env: dict[str, str] | None = None, **changes: Any) -> Path:
        """A run in a process of its own; asserts that it went well and returns its output directory."""
        done = self.run(self.settings(output, **changes), route=route, env=env)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        return output

    def fit(self, output: Path, **changes: Any) -> Path:
        """The same inside this process (the host is imported once, so a run takes a second); errors are raised here."""
        from accelerate.state import AcceleratorState, GradientState, PartialState
        from llamafactory.train.tuner import run_exp

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        run_exp(self.settings(output, **changes))
        return output


def base_env() -> dict[str, str]:
    """The environment without anything that would change the host's route."""
    drop = ("LENVM_LF_DISABLE", "FORCE_TORCHRUN", "PYTHONPATH")
    return {key: value for key, value in os.environ.items() if key not in drop} | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "DISABLE_VERSION_CHECK": "1",
        "TQDM_DISABLE": "1",
        "LLAMAFACTORY_VERBOSITY": "WARNING",
    }


def make_site(folder: Path, code: str, pth: bool = True) -> Path:
    """A folder for PYTHONPATH whose `sitecustomize` first undoes what site-packages may have installed, then treats
    `lenvm_lf.pth` as site-packages would; torchrun's ranks see it too."""
    packages = folder / "packages"
    packages.mkdir(parents=True)
    lines = [
        "import os, site, sys",
        "sys.meta_path[:] = [f for f in sys.meta_path if f.__module__ != 'lenvm_lf._hook']",
    ]
    if pth:
        (packages / "lenvm_lf.pth").write_text((ROOT / "lenvm_lf" / "lenvm_lf.pth").read_text())
        lines += [code, f"site.addsitedir({str(packages)!r})"]
    (folder / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    return folder


SITES = {
    "pth": "",
    "interpreted": "import tests.lf.interpreted",
    # another signature of one function, as another version of the host would have
    "broken": "from lenvm_lf import seams; s = seams.SEAMS['llamafactory.model.loader'][0]; "
    "seams.SEAMS['llamafactory.model.loader'] = (seams.Seam(s.function, ('everything',), s.sha256),)",
}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One tiny world for the whole folder; this process is hooked too."""
    for key, value in base_env().items():
        os.environ[key] = value
    from lenvm_lf import _hook

    _hook.install()
    root = tmp_path_factory.mktemp("lf")
    sites = {name: make_site(root / f"site_{name}", code) for name, code in SITES.items()}
    sites["none"] = make_site(root / "site_none", "", pth=False)
    return World(root, sites)


@pytest.fixture(scope="session")
def trained(world: World) -> Path:
    """A checkpoint of the real command line, with an evaluation, a prediction and plots at the end."""
    return world.train(world.root / "trained", eval_dataset="held_out", do_eval=True, do_predict=True, plot_loss=True)
