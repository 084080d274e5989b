"""Running a recipe's stages: skip what is done, take up what was interrupted, time and weigh what is run."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from lenvm.pipeline.errors import PipelineError
from lenvm.pipeline.markers import Marker, read_marker, stage_key, write_marker
from lenvm.pipeline.processes import MemoryMeter
from lenvm.pipeline.stages import STAGES, Context, Stage
from lenvm.sampling.log import write_json

LINE_SECONDS = 30.0


class Runner:
    """Runs stages of one recipe in one folder.

    Args:
        context: recipe, folder, interpreter, console.
        stages: in order; those the recipe does not want are left out.
    """

    def __init__(self, context: Context, stages: Sequence[Stage] = STAGES) -> None:
        self.context = context
        self.stages = [stage for stage in stages if stage.wanted(context.recipe)]

    def marker_path(self, stage: Stage) -> Path:
        """Where a stage's marker lies."""
        return self.context.out / "stages" / f"{stage.name}.json"

    def stage(self, name: str) -> Stage:
        """A stage of this recipe by name.

        Raises:
            PipelineError: if the recipe has none of that name.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise PipelineError(f"this recipe has no stage {name!r}; it has {', '.join(s.name for s in self.stages)}.")

    def key(self, stage: Stage) -> str:
        """Hash of everything that decides the stage's output."""
        upstream = [self.key(s) for s in self.stages if s.name in stage.needs]
        return stage_key(stage.settings(self.context.recipe), stage.files(self.context), upstream)

    def is_done(self, stage: Stage) -> bool:
        """Whether it was finished with the inputs it would get now, and its output is still there."""
        marker = read_marker(self.marker_path(stage))
        there = all((self.context.out / name).exists() for name in stage.outputs)
        return marker is not None and marker.state == "done" and marker.key == self.key(stage) and there

    def run(self, first: str | None = None, only: str | None = None, last: str | None = None) -> None:
        """Run what is not done.

        Args:
            first: run this stage and all after it from nothing.
            only: run this stage alone, from nothing; those before it must be done.
            last: stop after this stage.

        Raises:
            PipelineError: if a stage fails; what it had done is kept where it can be taken up.
        """
        chosen = self.stages
        if only is not None:
            chosen = [self.stage(only)]
            self._require_before(chosen[0])
        if last is not None:
            chosen = chosen[: chosen.index(self.stage(last)) + 1]
        again = False
        for stage in chosen:
            again = again or stage.name in (first, only)
            if first is not None and not again and not self.is_done(stage):
                raise PipelineError(
                    f"--from {first}: {stage.name}, which comes before it, is not done; leave --from out."
                )
        if first is not None:
            self.stage(first)
        again = False
        for stage in chosen:
            again = again or stage.name in (first, only)
            if not again and self.is_done(stage):
                self._line(stage, "done before")
            else:
                self._run(stage, afresh=again)
            self._write_timings()

    def _require_before(self, stage: Stage) -> None:
        for other in self.stages:
            if other.name == stage.name:
                return
            if not self.is_done(other):
                raise PipelineError(f"--only {stage.name}: {other.name}, which comes before it, is not done.")

    def _run(self, stage: Stage, afresh: bool) -> None:
        key, path = self.key(stage), self.marker_path(stage)
        before = read_marker(path)
        if afresh or before is None or before.key != key or before.state == "done":
            for name in stage.outputs:
                shutil.rmtree(self.context.out / name, ignore_errors=True)
            before = Marker(key=key, state="running")
        marker = before.model_copy(update={"state": "running", "attempts": before.attempts + 1})
        write_marker(path, marker)
        self.context.console.print(f"{stage.name} ...", highlight=False)
        began, finished = time.perf_counter(), False
        meter = MemoryMeter()
        try:
            with meter:
                stage.run(self.context)
            finished = True
        finally:
            marker = marker.model_copy(
                update={
                    "state": "done" if finished else "running",
                    "seconds": marker.seconds + time.perf_counter() - began,
                    "peak_bytes": max(marker.peak_bytes, meter.peak),
                }
            )
            write_marker(path, marker)
        self._line(stage, "done")

    def _line(self, stage: Stage, what: str) -> None:
        marker = read_marker(self.marker_path(stage))
        figures = f"{marker.seconds:7.1f} s  peak {marker.peak_bytes / 2**30:4.1f} GiB" if marker else ""
        self.context.console.print(f"{stage.name:<12} {what:<12} {figures}", highlight=False)

    def _write_timings(self) -> None:
        """`timings.json`: seconds and peak memory of every finished stage, all attempts together."""
        stages = {}
        for stage in self.stages:
            marker = read_marker(self.marker_path(stage))
            if marker is not None and marker.state == "done":
                stages[stage.name] = {
                    "seconds": round(marker.seconds, 2),
                    "peak_bytes": marker.peak_bytes,
                    "attempts": marker.attempts,
                }
        total = {
            "seconds": round(sum(float(s["seconds"]) for s in stages.values()), 2),
            "peak_bytes": max((int(s["peak_bytes"]) for s in stages.values()), default=0),
        }
        write_json(self.context.out / "timings.json", {"stages": stages, "total": total})


@contextmanager
def status_line(console: Console) -> Iterator[Callable[[str], None]]:
    """One line of progress: in place on a terminal, a line now and then elsewhere."""
    last_text, last_time = "", time.monotonic()

    def show(text: str) -> None:
        nonlocal last_text, last_time
        now = time.monotonic()
        due = now - last_time >= (0.0 if console.is_terminal else LINE_SECONDS)
        if not text or text == last_text or not due:
            return
        last_text, last_time = text, now
        if console.is_terminal:
            width = max(20, console.width - 4)
            console.file.write(f"\r\x1b[2K  {text[:width]}\r")
            console.file.flush()
        else:
            console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)

    yield show
