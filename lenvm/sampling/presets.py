"""Data sets known by name: which columns they have, the paper's instruction, and where they are kept.

The columns are those of the sets' cards. A copy of the repository is read, as `lenvm pull` makes it; nothing is loaded
from afar by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lenvm import instructions
from lenvm.sampling.errors import SamplingError


@dataclass(frozen=True)
class Preset:
    """How the rows of a data set become prompts; the fields are those of `Reading`.

    Attributes:
        hub: the repository of the data set.
        columns: our name -> its column.
        instruction: the paper's, before the question.
        split: what is trained on.
        meta: columns that travel to the samples, None for all; other models' answers, which some sets have, do not.
        first_turn: of a conversation only the first question.
        absent: a text that stands where the set leaves a question out.
    """

    hub: str
    columns: Mapping[str, str]
    instruction: str
    split: str
    meta: tuple[str, ...] | None = None
    first_turn: bool = False
    absent: str | None = None


PRESETS = {
    "gsm8k": Preset("openai/gsm8k", {"prompt": "question"}, instructions.MATH, "train", ("answer",)),
    "math": Preset(
        "EleutherAI/hendrycks_math", {"prompt": "problem"}, instructions.MATH, "train", ("solution", "level", "type")
    ),
    "deepmath": Preset(
        "zwhe99/DeepMath-103K",
        {"prompt": "question"},
        instructions.MATH,
        "train",
        ("final_answer", "difficulty", "topic"),
    ),
    "wildchat": Preset(
        "allenai/WildChat",
        {"messages": "conversation"},
        instructions.FOLLOW,
        "train",
        ("language", "toxic", "redacted"),
        first_turn=True,
    ),
    "opencodereasoning-2": Preset(
        "nvidia/OpenCodeReasoning-2",
        {"prompt": "question"},
        instructions.CODE,
        "python",
        ("question_id", "source", "dataset", "difficulty"),
        absent="-",
    ),
    "r1-onevision": Preset(
        "Fancy-MLLM/R1-Onevision",
        {"id": "id", "messages": "conversations", "images": "image"},
        instructions.MATH,
        "train",
        (),
        first_turn=True,
    ),
}
"""By the names that `--preset` takes."""


def preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        SamplingError: if there is none.
    """
    try:
        return PRESETS[name.lower()]
    except KeyError:
        raise SamplingError(f"--preset knows {', '.join(PRESETS)}, got {name!r}; --columns describes others.") from None
