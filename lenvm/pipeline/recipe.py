"""Recipes: the YAML file that says what a pipeline does. Every key is described in examples/README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lenvm.evaluation import defaults
from lenvm.pipeline.errors import PipelineError
from lenvm.sampling.settings import Distribution, SamplingSettings


class Section(BaseModel):
    """A part of a recipe; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Prepare(Section):
    """A script of the recipe's own: `TRAIN_PYTHON SCRIPT OUT/prepare ARGS...`, with `--data DIR` where the recipe has
    `data`. It writes the prompt files, and where the base is trained also `base_init/` and `data/`. `reads` are further
    files whose content decides its output; the Python files beside it always do."""

    script: Path
    args: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()


class Training(Section):
    """A LlamaFactory training: its YAML file, and keys that replace some of it."""

    config: Path
    overrides: dict[str, Any] = Field(default_factory=dict)
    save_steps: int = Field(default=200, ge=1)


class LenvmTraining(Training):
    """Training of the length value model; `init` is the backbone it starts from, by default the base model."""

    init: str | None = None


class Base(Section):
    """The base model: either a directory or name in the Hugging Face cache, or how to train one."""

    path: str | None = None
    train: Training | None = None

    @model_validator(mode="after")
    def _one(self) -> Base:
        if (self.path is None) == (self.train is None):
            raise ValueError("give either base.path (a model that exists) or base.train (how to train one)")
        return self


class Prompts(Section):
    """Prompt files: names in the output of `prepare`, or paths."""

    train: Path = Path("prompts_train.jsonl")
    val: Path | None = Path("prompts_val.jsonl")
    test: Path = Path("prompts_test.jsonl")


class Split(Section):
    """How many completions a prompt, and of how many prompts (default all)."""

    n: int = Field(ge=1)
    limit: int | None = Field(default=None, ge=1)


class Sampling(Distribution):
    """Sampling of the base model. The distribution is the same for all three sets: it is what the LenVM learns."""

    concurrency: int = Field(default=256, ge=1)
    train: Split = Split(n=8)
    val: Split = Split(n=8)
    test: Split = Split(n=64)
    template: dict[str, Any] | None = None

    def settings(self, split: Split) -> SamplingSettings:
        """For one of the three sets."""
        shared = self.model_dump(include={*Distribution.model_fields, "concurrency"})
        return SamplingSettings(n=split.n, **shared)


class Evaluation(Section):
    """Options of `lenvm eval control`, by their names there."""

    max_prompts: int = Field(default=defaults.MAX_PROMPTS, ge=2)
    targets: int = Field(default=defaults.TARGETS, ge=1)
    bound_targets: int = Field(default=defaults.BOUND_TARGETS, ge=1)
    median_samples: int = Field(default=defaults.MEDIAN_SAMPLES, ge=1)
    share_samples: int = Field(default=defaults.SHARE_SAMPLES, ge=1)
    curve_samples: int = Field(default=defaults.CURVE_SAMPLES, ge=1)
    biases: tuple[float, ...] = defaults.BIASES
    budgets: tuple[float, ...] = defaults.BUDGETS
    modes: tuple[str, ...] = defaults.MODES
    controllers: tuple[str, ...] | None = None
    concurrency: int = Field(default=64, ge=1)
    speed: bool = True
    seed: int = 0

    def options(self) -> list[str]:
        """As command line words."""
        words: list[str] = []
        for name, value in self.model_dump().items():
            flag = "--" + name.replace("_", "-")
            if value is None:
                continue
            if isinstance(value, bool):
                words.append(flag if value else "--no-" + flag[2:])
            elif isinstance(value, tuple):
                words.append(f"{flag}={','.join(x if isinstance(x, str) else f'{x:g}' for x in value)}")
            else:
                words.append(f"{flag}={value}")
        return words


class Server(Section):
    """How SGLang is started: arguments for every server, more for the one with the LenVM, environment variables,
    and how many seconds it may take to get ready."""

    args: tuple[str, ...] = ()
    lenvm_args: tuple[str, ...] = ()
    env: dict[str, str] = Field(default_factory=dict)
    start_seconds: float = Field(default=600.0, gt=0.0)


class Recipe(Section):
    """The whole recipe. Paths in it are relative to the recipe's folder, `out` and `data` to where one stands."""

    name: str = Field(pattern=r"^[\w.-]+$")
    out: Path | None = None
    data: Path | None = None
    needs_data: tuple[str, ...] = ()
    prepare: Prepare | None = None
    base: Base
    prompts: Prompts = Prompts()
    sampling: Sampling = Sampling()
    lenvm: LenvmTraining
    evaluation: Evaluation = Evaluation()
    server: Server = Server()

    @model_validator(mode="after")
    def _trainable(self) -> Recipe:
        if self.base.train is not None and self.prepare is None:
            raise ValueError("base.train needs a prepare script, which writes base_init/ and data/")
        return self

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        return self.out or Path("runs") / self.name


def load_recipe(path: Path, changes: list[str] | None = None) -> Recipe:
    """Read a recipe, apply `a.b=value` changes, check everything.

    Args:
        path: YAML file.
        changes: each `key.key=value`, the value in YAML (`--set` of the command line).

    Raises:
        PipelineError: with the key, the value got and what is allowed.
    """
    if not path.is_file():
        raise PipelineError(f"there is no recipe {path}; examples/ holds some.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise PipelineError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(raw, dict):
        raise PipelineError(f"{path} must be a mapping of keys to values, got {type(raw).__name__}.")
    for change in changes or []:
        _set(raw, change)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise PipelineError(f"{path}: {'; '.join(_problem(e) for e in error.errors())}.") from None
    return _resolve(recipe, path)


def _set(raw: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key.strip():
        raise PipelineError(f"--set takes key.key=value, got {change!r}.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    here = raw
    *parents, last = key.strip().split(".")
    for parent in parents:
        if here.get(parent) is None:
            here[parent] = {}
        here = here[parent]
        if not isinstance(here, dict):
            raise PipelineError(f"--set {change}: {parent} is {here!r}, which has no keys.")
    here[last] = value


def _problem(error: Any) -> str:
    place = ".".join(str(part) for part in error["loc"]) or "the recipe"
    if error["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in error["loc"][:-1]:
            section = _section(section, part)
        allowed = f"; allowed here: {', '.join(section.model_fields)}" if section is not None else ""
        return f"unknown key {place}{allowed}"
    if error["type"] == "missing":
        return f"{place} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return message if error["type"] == "value_error" else f"{place}: {message}, got {error['input']!r}"


def _section(section: Any, part: Any) -> Any:
    """The model class behind a field, None where there is none."""
    field = section.model_fields.get(part) if section is not None else None
    if field is None:
        return None
    candidates = (field.annotation, *getattr(field.annotation, "__args__", ()))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _resolve(recipe: Recipe, path: Path) -> Recipe:
    """Make script and configuration paths absolute and check that they are there."""
    folder = path.resolve().parent

    def found(relative: Path, key: str) -> Path:
        absolute = folder / relative
        if not absolute.is_file():
            raise PipelineError(f"{path}: {key} names {relative}, but there is no file {absolute}.")
        return absolute

    changes: dict[str, Any] = {
        "lenvm": recipe.lenvm.model_copy(update={"config": found(recipe.lenvm.config, "lenvm.config")})
    }
    if recipe.prepare is not None:
        script = found(recipe.prepare.script, "prepare.script")
        reads = tuple(found(file, "prepare.reads") for file in recipe.prepare.reads)
        changes["prepare"] = recipe.prepare.model_copy(update={"script": script, "reads": reads})
    if recipe.base.train is not None:
        config = found(recipe.base.train.config, "base.train.config")
        changes["base"] = recipe.base.model_copy(
            update={"train": recipe.base.train.model_copy(update={"config": config})}
        )
    for name in recipe.needs_data:
        if recipe.data is None:
            raise PipelineError(
                f"{path} needs a folder with {', '.join(recipe.needs_data)}; give it with --set data=DIR."
            )
        if not (recipe.data / name).is_file():
            raise PipelineError(f"{path} needs {name} in the data folder, but {recipe.data} has no such file.")
    if recipe.data is not None:
        changes["data"] = recipe.data.resolve()
    return recipe.model_copy(update=changes)
