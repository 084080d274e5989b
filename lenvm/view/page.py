"""The page: one HTML file that holds the answers, the charting library and nothing from outside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lenvm.evaluation.errors import EvaluationError


def chart_library() -> str:
    """The source of plotly.js from the Python package plotly.

    Raises:
        EvaluationError: if it is not installed.
    """
    found = find_spec("plotly")  # its Python side is not needed, and would take a second to import
    for folder in (found.submodule_search_locations or []) if found else []:
        script = Path(folder) / "package_data" / "plotly.min.js"
        if script.is_file():
            return script.read_text(encoding="utf-8")
    raise EvaluationError("plotly is not installed; install lenvm[eval].")


def render_view(views: Sequence[dict[str, Any]], title: str) -> str:
    """The page as HTML.

    Args:
        views: of `lenvm.view.answers.view_of`, at least one.
        title: of the page.
    """
    page = resources.files("lenvm.view").joinpath("view.html").read_text(encoding="utf-8")
    style = resources.files("lenvm.report").joinpath("templates/style.css").read_text(encoding="utf-8")
    # inside a script element only "</" could end it; U+2028 and U+2029 are line ends to old engines
    data = json.dumps({"title": title, "answers": list(views)}, ensure_ascii=False).replace("</", "<\\/")
    data = data.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    for mark, text in (("/*STYLE*/", style), ("/*LIBRARY*/", chart_library()), ("/*DATA*/", data)):
        before, _, after = page.partition(mark)
        page = before + text + after
    return page


def write_view(views: Sequence[dict[str, Any]], title: str, out: Path) -> None:
    """Write the page; replaced in one step."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".part")
    temporary.write_text(render_view(views, title), encoding="utf-8")
    temporary.replace(out)
