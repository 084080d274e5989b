"""Serving the pair that a recipe made, for a person to play with."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lenvm.pipeline.errors import PipelineError
from lenvm.pipeline.markers import read_marker
from lenvm.pipeline.processes import tail
from lenvm.pipeline.runner import Runner
from lenvm.pipeline.server import SglangServer
from lenvm.sampling.prompts import read_prompts

NEEDED = ("train_base", "train_lenvm")
EXAMPLE_TARGET = 40


def serve_pair(runner: Runner, host: str, port: int | None) -> None:
    """Serve until interrupted.

    Args:
        runner: of the recipe; its stages up to the LenVM are run unless both models are there.
        host: address to listen on.
        port: None takes a free one.

    Raises:
        PipelineError: if a stage or the server fails.
    """
    context = runner.context
    if not _models_there(runner):
        runner.run(last="train_lenvm")
    server = SglangServer(
        context.base,
        context.recipe.server,
        context.log("server"),
        lenvm=context.lenvm,
        port=port,
        host=host,
        watch=lambda: context.status("the server starts"),
    )
    with server:
        context.console.print(
            _invitation(server.url, _example_messages(runner)), markup=False, highlight=False, soft_wrap=True
        )
        while server.alive():
            time.sleep(0.5)
        raise PipelineError(f"the server has ended by itself. The end of {server.log}:\n{tail(server.log)}")


def _models_there(runner: Runner) -> bool:
    """Whether both models were made, be it with other settings than the recipe's of now."""
    for stage in runner.stages:
        if stage.name not in NEEDED:
            continue
        marker = read_marker(runner.marker_path(stage))
        if (
            marker is None
            or marker.state != "done"
            or not all((runner.context.out / o).is_dir() for o in stage.outputs)
        ):
            return False
        if marker.key != runner.key(stage):
            runner.context.console.print(
                f"note: {stage.name} was made with other settings than the recipe's of now; it is served as it is.",
                style="yellow",
            )
    return True


def _example_messages(runner: Runner) -> list[dict[str, Any]]:
    """A prompt that the model was not trained on, open rather than with a fixed answer if there is one."""
    path: Path | None = runner.context.prompts("test")
    if path is None or not path.is_file():
        return [{"role": "user", "content": "Hello."}]
    prompts = [p for p in read_prompts(path) if not p.images]  # what is printed should be short enough to be copied
    if not prompts:
        return [{"role": "user", "content": "Hello."}]
    return next((p for p in prompts if "answer" not in p.meta), prompts[0]).messages


def _invitation(url: str, messages: list[dict[str, Any]]) -> str:
    import json
    import shlex

    body = {"model": "default", "messages": messages, "length_target": EXAMPLE_TARGET}
    curl = f"curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"
    return f"""
Ready at {url} (Ctrl-C ends it). An answer of exactly {EXAMPLE_TARGET} tokens:

{curl}

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="none")
answer = client.chat.completions.create(
    model="default",
    messages={json.dumps(messages)},
    extra_body={{"length_target": {EXAMPLE_TARGET}, "length_mode": "equal_to"}},
)
print(answer.usage.completion_tokens, answer.choices[0].message.content)
"""
