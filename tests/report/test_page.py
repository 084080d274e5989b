"""The page holds everything, needs nothing from outside, and says what is missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from typer import Typer
from typer.testing import CliRunner

from lenvm.evaluation.schema import Results, write_results
from lenvm.report import plots
from lenvm.report.command import report
from lenvm.report.page import render, strip

TIMINGS = {
    "stages": {"prepare": {"seconds": 3.2, "peak_bytes": 2**28}, "train_base": {"seconds": 612.0, "peak_bytes": 2**31}},
    "total": {"seconds": 615.2, "peak_bytes": 2**31},
}
VOID = {"meta", "br"}


class Checker(HTMLParser):
    """Tags nest, ids are unique."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_stands_alone(results):
    page = render(results, TIMINGS)
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    assert all(link.startswith("#") for link in checker.links)
    assert "<script" not in page
    assert "@import" not in page
    assert "url(http" not in page
    assert page.count("<svg") == 4
    assert "Not measured" not in page
    for text in ("95.8", "β −5", "train the base model", "612 s", "10.3 minutes in all", "2.0 GiB", "2,480"):
        assert text in page, text
    assert "&lt;b&gt;" in page  # what a model wrote is never markup
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(checker.ids)


def test_figures_are_wellformed_and_take_their_colours_from_the_page(results):
    for svg in (plots.scatter(results), plots.trade_off(results.trade_off), plots.prediction(results.prediction),
                plots.example(results.example)):  # fmt: skip
        ElementTree.fromstring(svg)
        assert "currentColor" in svg
        assert "var(--grid)" in svg
        assert plots.INK not in svg
        assert "font-family" not in svg
        assert "<style" not in svg
    assert plots.scatter(results) == plots.scatter(results)  # nothing random, no date


def test_any_subset_of_results_makes_a_page_that_says_what_is_missing(results):
    empty = results.model_copy(
        update={"control": [], "side": [], "median": [], "trade_off": None, "prediction": None, "speed": None,
                "example": None, "criteria": []}
    )  # fmt: skip
    page = render(empty)
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert page.count('class="missing"') == 7
    assert "<svg" not in page
    for field in ("trade_off", "prediction", "speed", "example"):
        assert page != render(results.model_copy(update={field: None}))
    value_only = results.prediction.model_copy(
        update={"points": [p.model_copy(update={"expected": None}) for p in results.prediction.points],
                "coverage_p50": None}
    )  # fmt: skip
    assert render(results.model_copy(update={"prediction": value_only})).count("<svg") == 4


def test_strip_says_what_each_token_did(results):
    tokens = strip(results.example)
    assert len(tokens) == results.example.length
    assert tokens[0].change == pytest.approx(results.example.remaining[0] + 1 - results.example.at_prompt)
    assert tokens[14].text == "Wait"
    assert tokens[14].change > 5  # the detour came as a surprise
    assert tokens[13].breaks
    assert max(t.strength for t in tokens) == 1.0


def test_command(results: Results, tmp_path):
    app = Typer()
    app.command()(report)
    run = tmp_path / "run"
    (run / "evaluation").mkdir(parents=True)
    out = tmp_path / "deep" / "report.html"
    missing = CliRunner().invoke(app, [str(run), "--out", str(out)])
    assert missing.exit_code == 1
    assert "make it with `lenvm eval control`" in " ".join(missing.output.split())
    write_results(results, run / "evaluation" / "results.json")
    (run / "timings.json").write_text(json.dumps(TIMINGS))
    for directory in (run, run / "evaluation"):
        done = CliRunner().invoke(app, [str(directory), "--out", str(out)])
        assert done.exit_code == 0, done.output
        assert "612 s" in out.read_text()
    wrong = CliRunner().invoke(app, [str(run), "--out", str(out), "--timings", str(tmp_path / "no.json")])
    assert wrong.exit_code == 1
    assert "there is no" in wrong.output
