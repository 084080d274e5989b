"""Recipes: what is read, what is refused, and what the refusal says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lenvm.pipeline.errors import PipelineError
from lenvm.pipeline.recipe import Evaluation, load_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("prepare.py", "base.yaml", "lenvm.yaml"):
        (tmp_path / name).write_text("{}\n")
    return tmp_path


def minimal(**changes: Any) -> dict[str, Any]:
    return {"name": "small", "base": {"path": "/models/base"}, "lenvm": {"config": "lenvm.yaml"}, **changes}


def write(folder: Path, recipe: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    return path


def test_minimal_recipe_and_its_defaults(folder: Path):
    recipe = load_recipe(write(folder, minimal()))
    assert recipe.folder == Path("runs/small")
    assert recipe.lenvm.config == folder / "lenvm.yaml"
    assert recipe.sampling.settings(recipe.sampling.test).n == 64
    assert recipe.sampling.settings(recipe.sampling.train).concurrency == recipe.sampling.concurrency


def test_set_replaces_and_adds(folder: Path):
    changes = ["sampling.train.n=3", "server.args=[--tp, '2']", "lenvm.overrides.learning_rate=1e-4", "out=elsewhere"]
    recipe = load_recipe(write(folder, minimal()), changes)
    assert recipe.sampling.train.n == 3
    assert recipe.server.args == ("--tp", "2")
    assert recipe.lenvm.overrides == {"learning_rate": "1e-4"}
    assert recipe.folder == Path("elsewhere")


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("- 1\n", [], "must be a mapping of keys to values, got list"),
        ("a: [\n", [], "is not YAML"),
        (minimal(nmae="x"), [], "unknown key nmae; allowed here: name, out, data"),
        (minimal(), ["sampling.train.m=3"], "unknown key sampling.train.m; allowed here: n, limit"),
        (minimal(), ["base.train.confg=x"], "unknown key base.train.confg; allowed here: config, overrides"),
        (minimal(), ["sampling.top_p=0"], r"sampling.top_p: .*greater than 0, got 0"),
        (minimal(), ["name=a/b"], "name: .*match pattern"),
        (minimal(), ["sampling"], "--set takes key.key=value, got 'sampling'"),
        (minimal(), ["name.x=1"], "name is 'small', which has no keys"),
        (minimal(base={}), [], "give either base.path"),
        (minimal(base={"train": {"config": "base.yaml"}}), [], "base.train needs a prepare script"),
        ({"name": "x"}, [], "base is missing; lenvm is missing"),
        (minimal(lenvm={"config": "none.yaml"}), [], "lenvm.config names none.yaml, but there is no file"),
        (minimal(needs_data=["q.jsonl"]), [], r"needs a folder with q.jsonl; give it with --set data=DIR"),
        (minimal(needs_data=["q.jsonl"], data="/"), [], "needs q.jsonl in the data folder, but / has no such file"),
    ],
)
def test_refusals(folder: Path, recipe: Any, changes: list[str], message: str):
    with pytest.raises(PipelineError, match=message):
        load_recipe(write(folder, recipe), changes)


def test_missing_recipe(tmp_path: Path):
    with pytest.raises(PipelineError, match="there is no recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_evaluation_options_are_words_of_the_command():
    words = Evaluation(biases=(-2.0, 3.5), speed=False).options()
    assert "--biases=-2,3.5" in words
    assert "--no-speed" in words
    assert "--max-prompts=104" in words


def test_evaluation_options_exist_there():
    import inspect

    from lenvm.evaluation.commands import control

    assert set(Evaluation.model_fields) <= set(inspect.signature(control).parameters)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/recipe.yaml")), ids=lambda p: p.parent.name)
def test_shipped_recipes_are_valid(path: Path, tmp_path: Path):
    raw = yaml.safe_load(path.read_text())
    for name in raw.get("needs_data", []):
        (tmp_path / name).write_text("")
    recipe = load_recipe(path, [f"data={tmp_path}"] if raw.get("needs_data") else [])
    assert recipe.name
