"""The stages: what each reads, what decides its output, what it runs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from lenvm.pipeline.errors import PipelineError
from lenvm.pipeline.processes import run_logged
from lenvm.pipeline.recipe import Recipe, Training
from lenvm.pipeline.server import CPU_ENV, SglangServer, cpu_environment
from lenvm.sampling.log import write_json

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Context:
    """What a stage works with.

    Attributes:
        recipe: the recipe.
        out: folder of the run.
        train_python: interpreter of the training environment.
        console: for lines and progress bars.
        status: shows one line of progress.
    """

    recipe: Recipe
    out: Path
    train_python: Path
    console: Console
    status: Callable[[str], None]

    @property
    def base(self) -> str:
        """The base model: a directory, or a name in the Hugging Face cache."""
        return self.recipe.base.path or str(self.out / "base")

    @property
    def lenvm(self) -> Path:
        """The length value model."""
        return self.out / "lenvm"

    def prompts(self, split: str) -> Path | None:
        """The prompt file of a split: a name in the output of prepare if the recipe prepares, otherwise a path."""
        named: Path | None = getattr(self.recipe.prompts, split)
        if named is None:
            return None
        return named if self.recipe.prepare is None else self.out / "prepare" / named

    def log(self, stage: str) -> Path:
        """Where a stage's output goes."""
        return self.out / "logs" / f"{stage}.log"


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: as on the command line.
        needs: stages before it.
        outputs: folders it writes, relative to the run's; removed when it starts from nothing.
        wanted: whether a recipe has it.
        settings: the part of a recipe that decides its output.
        files: files whose content decides it as well.
        run: does it; called again after an interruption with its outputs as they were.
    """

    name: str
    needs: tuple[str, ...]
    outputs: tuple[str, ...]
    wanted: Callable[[Recipe], bool]
    settings: Callable[[Recipe], dict[str, Any]]
    files: Callable[[Context], Iterable[Path]]
    run: Callable[[Context], None]


def prepare(context: Context) -> None:
    """Run the recipe's script."""
    recipe = context.recipe
    if recipe.prepare is None:
        raise PipelineError("this recipe has no prepare script.")
    words = [str(context.train_python), str(recipe.prepare.script), str(context.out / "prepare"), *recipe.prepare.args]
    if recipe.data is not None:
        words += ["--data", str(recipe.data)]
    run_logged(words, context.log("prepare"), watch=lambda: context.status("preparing"))


def train_base(context: Context) -> None:
    """Train the base model with LlamaFactory."""
    training = context.recipe.base.train
    if training is None:
        raise PipelineError("this recipe does not train a base model.")
    prepared = context.out / "prepare"
    places = {"model_name_or_path": str(prepared / "base_init"), "dataset_dir": str(prepared / "data")}
    _train(context, "train_base", training, places, context.out / "base")


def sample(context: Context) -> None:
    """Sample the base model on the prompts of all splits, and describe the result to LlamaFactory."""
    from lenvm.sampling.commands import run as draw
    from lenvm.sampling.errors import SamplingError

    recipe, folder = context.recipe, context.out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    local = Path(context.base)
    tokenizer = local if local.is_dir() else None
    server = SglangServer(
        context.base, recipe.server, context.log("server_sample"), watch=lambda: context.status("the server starts")
    )
    with server:
        for split in SPLITS:
            prompts = context.prompts(split)
            if prompts is None:
                continue
            wanted = getattr(recipe.sampling, split)
            settings = recipe.sampling.settings(wanted)
            out = folder / f"{split}.jsonl"
            try:
                failed = draw(
                    prompts,
                    out,
                    server.url,
                    "sglang",
                    settings,
                    context.console,
                    limit=wanted.limit,
                    model=recipe.base.path or recipe.name,
                    tokenizer=tokenizer,
                    template=recipe.sampling.template,
                )
            except SamplingError as error:
                raise PipelineError(f"sampling {prompts}: {error}") from None
            if failed:
                raise PipelineError(
                    f"{len(failed)} prompts of {prompts} failed, see above; run again to try them again."
                )
    named = {split: {"file_name": f"{split}.jsonl", "formatting": "lenvm"} for split in SPLITS}
    write_json(folder / "dataset_info.json", {k: v for k, v in named.items() if (folder / v["file_name"]).is_file()})


def train_lenvm(context: Context) -> None:
    """Train the length value model with LlamaFactory under `stage: lenvm`."""
    places = {
        "model_name_or_path": context.recipe.lenvm.init or context.base,
        "dataset_dir": str(context.out / "samples"),
        "dataset": "train",
    }
    if context.recipe.prompts.val is not None:
        places["eval_dataset"] = "val"
    _train(context, "train_lenvm", context.recipe.lenvm, places, context.lenvm)


def evaluate(context: Context) -> None:
    """Ask the base model with its LenVM for answers of given lengths."""
    recipe = context.recipe
    server = SglangServer(
        context.base,
        recipe.server,
        context.log("server_evaluate"),
        lenvm=context.lenvm,
        watch=lambda: context.status("the server starts"),
    )
    with server:
        words = [sys.executable, "-m", "lenvm", "eval", "control", "--server", server.url]
        words += ["--prompts", str(context.prompts("test")), "--samples", str(context.out / "samples" / "test.jsonl")]
        words += ["--base", context.base, "--lenvm", str(context.lenvm), "--out", str(context.out / "evaluation")]
        words += ["--max-tokens", str(recipe.sampling.max_tokens), *recipe.evaluation.options()]
        log = context.log("evaluate")
        run_logged(words, log, watch=lambda: context.status(_last_line(log)))


def report(context: Context) -> None:
    """Write the report."""
    words = [sys.executable, "-m", "lenvm", "report", str(context.out / "evaluation")]
    words += ["--out", str(context.out / "report" / "index.html"), "--timings", str(context.out / "timings.json")]
    run_logged(words, context.log("report"), watch=lambda: context.status("writing the report"))


def _train(context: Context, name: str, training: Training, places: dict[str, str], out: Path) -> None:
    """`llamafactory-cli train`, from its last checkpoint if there is one."""
    given: dict[str, Any] = {
        **places,
        **training.overrides,
        "output_dir": str(out),
        "save_strategy": "steps",
        "save_steps": training.save_steps,
        "save_total_limit": 1,
        "save_only_model": False,
    }
    checkpoint = last_checkpoint(out)
    if checkpoint is not None:
        given |= {"overwrite_output_dir": False, "resume_from_checkpoint": str(checkpoint)}
        context.console.print(f"  {name} goes on from {checkpoint.name}", markup=False, highlight=False)
    else:
        shutil.rmtree(out, ignore_errors=True)
        given |= {"overwrite_output_dir": True}
    words = [str(context.train_python), "-m", "llamafactory.cli", "train", str(training.config)]
    words += [f"{key}={_omega(value)}" for key, value in given.items()]
    env = _training_environment(context)
    run_logged(words, context.log(name), env, watch=lambda: context.status(training_line(out)))
    for left in out.glob("checkpoint-*"):
        shutil.rmtree(left)


def _training_environment(context: Context) -> dict[str, str]:
    """Where we train the base ourselves everything is local, and nothing should try to reach the hub."""
    offline = {} if context.recipe.base.path else {"HF_HUB_OFFLINE": "1"}
    return {**cpu_environment(CPU_ENV), **offline}


def _omega(value: Any) -> str:
    """A value as LlamaFactory's command line (OmegaConf) reads it."""
    return value if isinstance(value, str) else json.dumps(value)


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint of the HF trainer in a folder: trainer_state.json is what it writes last."""
    found = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def training_line(out: Path) -> str:
    """One line of progress from LlamaFactory's trainer_log.jsonl."""
    try:
        lines = (out / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
        last = next(row for row in (json.loads(line) for line in reversed(lines)) if "loss" in row)
    except (OSError, ValueError, StopIteration):
        return "loading"
    loss = f"{last['loss']:.4f}" if isinstance(last.get("loss"), float) else "?"
    left = last.get("remaining_time", "?")
    return f"step {last.get('current_steps')} of {last.get('total_steps')}, loss {loss}, left {left}"


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 400))
            lines = file.read().decode(errors="replace").replace("\r", "\n").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""


def _script_files(context: Context) -> Iterable[Path]:
    """The prepare script, the modules beside it, and what the recipe says it reads."""
    prepare = context.recipe.prepare
    return () if prepare is None else sorted([*prepare.script.parent.glob("*.py"), *prepare.reads])


def _data_files(context: Context) -> Iterable[Path]:
    data = context.recipe.data
    return () if data is None else [data / name for name in context.recipe.needs_data]


def _given_prompts(context: Context) -> Iterable[Path]:
    """Prompt files that prepare did not write."""
    paths = [p for p in map(context.prompts, SPLITS) if p is not None]
    for path in paths:
        if not path.is_file() and context.recipe.prepare is None:
            raise PipelineError(f"there is no prompt file {path}; give one with --set prompts.train=FILE (val, test).")
    return [p for p in paths if not p.is_relative_to(context.out / "prepare")]


def _config_settings(training: Training | None) -> dict[str, Any]:
    if training is None:
        return {}
    config = yaml.safe_load(training.config.read_text(encoding="utf-8"))
    return {"config": config, **training.model_dump(exclude={"config", "save_steps"})}


STAGES: tuple[Stage, ...] = (
    Stage(
        "prepare",
        (),
        ("prepare",),
        lambda r: r.prepare is not None,
        lambda r: {"args": r.prepare.args if r.prepare else ()},
        lambda c: [*_script_files(c), *_data_files(c)],
        prepare,
    ),
    Stage(
        "train_base",
        ("prepare",),
        ("base",),
        lambda r: r.base.train is not None,
        lambda r: _config_settings(r.base.train),
        lambda c: (),
        train_base,
    ),
    Stage(
        "sample",
        ("prepare", "train_base"),
        ("samples",),
        lambda r: True,
        lambda r: {
            "base": r.base.path,
            "prompts": r.prompts.model_dump(mode="json"),
            # how many at a time changes nothing that is drawn
            "sampling": r.sampling.model_dump(exclude={"concurrency"}),
        },
        _given_prompts,
        sample,
    ),
    Stage(
        "train_lenvm",
        ("sample",),
        ("lenvm",),
        lambda r: True,
        lambda r: _config_settings(r.lenvm),
        lambda c: (),
        train_lenvm,
    ),
    Stage(
        "evaluate",
        ("train_lenvm",),
        ("evaluation",),
        lambda r: True,
        lambda r: {"evaluation": r.evaluation.model_dump(exclude={"concurrency"}), "lenvm_args": r.server.lenvm_args},
        lambda c: (),
        evaluate,
    ),
    Stage("report", ("evaluate",), ("report",), lambda r: True, lambda r: {}, lambda c: (), report),
)
NAMES = tuple(stage.name for stage in STAGES)
