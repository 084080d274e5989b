"""Stages: skipped when done, run again when an input changes, taken up after an interruption; timed and weighed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lenvm.pipeline.errors import PipelineError
from lenvm.pipeline.markers import read_marker
from lenvm.pipeline.recipe import Base, LenvmTraining, Recipe, Sampling, Split
from lenvm.pipeline.runner import Runner
from lenvm.pipeline.stages import STAGES, Context, Stage, last_checkpoint, training_line

Trace = list[str]


def recipe(seed: int = 1, n: int = 8, concurrency: int = 4) -> Recipe:
    sampling = Sampling(seed=seed, train=Split(n=n), concurrency=concurrency)
    return Recipe(name="t", base=Base(path="b"), lenvm=LenvmTraining(config=Path("x.yaml")), sampling=sampling)


def chain(trace: Trace, watched: Path, fail: dict[str, BaseException]) -> list[Stage]:
    """first -> second -> third; `second` reads the sampling seed and a file, and works in two steps."""

    def first(context: Context) -> None:
        trace.append("first")
        (context.out / "a").mkdir()

    def second(context: Context) -> None:
        folder = context.out / "b"
        folder.mkdir(exist_ok=True)
        if not (folder / "half").exists():
            trace.append("second, first half")
            (folder / "half").touch()
        if "second" in fail:
            raise fail["second"]
        trace.append("second, second half")

    def third(context: Context) -> None:
        trace.append("third")
        (context.out / "c").mkdir()

    def stage(name: str, needs: tuple[str, ...], output: str, run: Callable[[Context], None], **more: Any) -> Stage:
        given = {"wanted": lambda r: True, "settings": lambda r: {}, "files": lambda c: (), **more}
        return Stage(name, needs, (output,), run=run, **given)

    return [
        stage("first", (), "a", first, settings=lambda r: {"n": r.sampling.train.n}),
        stage(
            "second", ("first",), "b", second, settings=lambda r: {"seed": r.sampling.seed}, files=lambda c: [watched]
        ),
        stage("third", ("second",), "c", third),
    ]


class World:
    def __init__(self, out: Path) -> None:
        self.out = out / "run"
        self.out.mkdir()
        self.watched = out / "watched"
        self.watched.write_text("1")
        self.trace: Trace = []
        self.fail: dict[str, BaseException] = {}

    def run(self, made: Recipe | None = None, **options: Any) -> Trace:
        self.trace.clear()
        context = Context(made or recipe(), self.out, Path("python"), Console(quiet=True), lambda text: None)
        Runner(context, chain(self.trace, self.watched, self.fail)).run(**options)
        return list(self.trace)


SECOND = ["second, first half", "second, second half"]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_everything_once_then_nothing(world: World):
    assert world.run() == ["first", *SECOND, "third"]
    assert world.run() == []
    assert world.run(recipe(concurrency=99)) == []


def test_a_change_runs_what_depends_on_it_and_no_more(world: World):
    world.run()
    assert world.run(recipe(seed=2)) == [*SECOND, "third"]
    world.watched.write_text("2")
    assert world.run(recipe(seed=2)) == [*SECOND, "third"]
    assert world.run(recipe(seed=2, n=9)) == ["first", *SECOND, "third"]


def test_a_missing_output_is_made_again(world: World):
    world.run()
    (world.out / "c").rmdir()
    assert world.run() == ["third"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), PipelineError("broken")])
def test_an_interrupted_stage_goes_on_where_it_was(world: World, error: BaseException):
    world.fail["second"] = error
    with pytest.raises(type(error)):
        world.run()
    assert world.trace == ["first", "second, first half"]
    assert read_marker(world.out / "stages" / "second.json").state == "running"
    world.fail.clear()
    assert world.run() == ["second, second half", "third"]
    marker = read_marker(world.out / "stages" / "second.json")
    assert (marker.state, marker.attempts) == ("done", 2)


def test_an_interrupted_stage_with_other_settings_begins_anew(world: World):
    world.fail["second"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        world.run()
    world.fail.clear()
    assert world.run(recipe(seed=5)) == [*SECOND, "third"]


def test_from_and_only(world: World):
    with pytest.raises(PipelineError, match="--from second: first, which comes before it, is not done"):
        world.run(first="second")
    with pytest.raises(PipelineError, match="--only second: first, which comes before it, is not done"):
        world.run(only="second")
    world.run()
    assert world.run(first="second") == [*SECOND, "third"]
    assert world.run(only="second") == SECOND
    assert world.run() == []
    with pytest.raises(PipelineError, match="no stage 'fourth'; it has first, second, third"):
        world.run(only="fourth")
    with pytest.raises(PipelineError, match="no stage 'fourth'"):
        world.run(first="fourth")


def test_last_stops_early(world: World):
    assert world.run(last="second") == ["first", *SECOND]


def test_timings_hold_seconds_and_memory(world: World):
    world.run()
    timings = json.loads((world.out / "timings.json").read_text())
    assert list(timings["stages"]) == ["first", "second", "third"]
    assert timings["stages"]["first"]["peak_bytes"] > 10 * 2**20
    assert timings["total"]["seconds"] == pytest.approx(sum(s["seconds"] for s in timings["stages"].values()), abs=0.02)


def test_the_stages_of_a_recipe_with_a_given_base(tmp_path: Path):
    context = Context(recipe(), tmp_path, Path("python"), Console(quiet=True), lambda text: None)
    assert [s.name for s in Runner(context).stages] == ["sample", "train_lenvm", "evaluate", "report"]
    assert [s.name for s in STAGES] == ["prepare", "train_base", "sample", "train_lenvm", "evaluate", "report"]
    assert context.base == "b"
    with pytest.raises(PipelineError, match="there is no prompt file"):
        Runner(context).run()


def test_training_is_taken_up_from_the_last_complete_checkpoint(tmp_path: Path):
    assert last_checkpoint(tmp_path) is None
    for step in (50, 100, 1000, 1050):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 1050:  # torn: the state is written last
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path).name == "checkpoint-1000"


def test_training_line(tmp_path: Path):
    assert training_line(tmp_path) == "loading"
    row = {"current_steps": 5, "total_steps": 9, "loss": 0.25, "remaining_time": "0:00:04"}
    (tmp_path / "trainer_log.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"eval_loss": 1}) + "\n")
    assert training_line(tmp_path) == "step 5 of 9, loss 0.2500, left 0:00:04"
