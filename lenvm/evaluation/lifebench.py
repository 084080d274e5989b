"""LIFEBench with token targets (section 3.2, Table 2, Appendix B): its items, what is asked, and the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from lenvm.evaluation.assemble import LogProbs, control_row
from lenvm.evaluation.bootstrap import mean_interval
from lenvm.evaluation.client import Answer, ServerSettings
from lenvm.evaluation.data import NaturalPrompt
from lenvm.evaluation.errors import EvaluationError
from lenvm.evaluation.judge import JudgeSettings, judge_answers
from lenvm.evaluation.lifebench_items import PHRASES, Item, Unit, tokens_a_word, word_count
from lenvm.evaluation.metrics import MODES, Mode, length_score
from lenvm.evaluation.outcome import Cell, Outcome, Plot, Series, Sheet, new_outcome
from lenvm.evaluation.plan import BASE, CUT, HARD, SOFT, STRICT, Controller, Request, stable_seed
from lenvm.evaluation.runner import Notify, ask_plan, score_answers
from lenvm.evaluation.schema import ControlRow, Estimate

if TYPE_CHECKING:
    from lenvm.sampling.tokens import PromptTokenizer

WHOLE = {"create": "creative generation", "qa": "question answering", "reasoning": "reasoning", "summary": "summaries"}
"""The four categories of the whole benchmark, 360 items."""
BOOST = Controller("boost", "stop token boosted", None)
COUNTDOWN = Controller("countdown", "asked to count down", None)
OTHERS = {c.key: c for c in (CUT, BOOST, COUNTDOWN, HARD, SOFT, STRICT)}
UNGUIDED = (BASE, CUT, BOOST, COUNTDOWN)


DEFAULT_CONTROLLERS = ("cut", "boost", "countdown", "hard", "posterior", "posterior_strict")


class LifebenchSizes(BaseModel):
    """What is asked. `boost` is the logit bias on stop tokens, taken negative under at_least."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    targets: tuple[int, ...] = (32, 64, 128, 256, 512, 1024)
    modes: tuple[Mode, ...] = MODES
    unit: Unit = "tokens"
    controllers: tuple[str, ...] = DEFAULT_CONTROLLERS
    boost: float = Field(default=3.0, gt=0)
    sharpness: tuple[float, ...] = Field(default=(1.0, 2.0, 4.0), min_length=1)
    limit: int | None = Field(default=None, ge=2)
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    seed: int = 0

    @field_validator("targets", "sharpness")
    @classmethod
    def _positive(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or min(value) <= 0 or len(set(value)) < len(value):
            raise ValueError("must be different numbers above 0")
        return value

    @field_validator("controllers")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(value) - {"posterior", *OTHERS})
        if unknown:
            raise ValueError(f"unknown controller {unknown[0]!r}, allowed are posterior, {', '.join(OTHERS)}")
        return value

    def chosen(self, mode: Mode) -> list[Controller]:
        """Controllers of a mode, the base model first. Cutting cannot make an answer longer."""
        found = [BASE]
        for key in self.controllers:
            if key == "posterior":
                found += [
                    Controller(f"posterior_a{a:g}", f"posterior, sharpness {a:g}", {"length_sharpness": a})
                    for a in self.sharpness
                ]
            elif key != "cut" or mode != "at_least":
                found.append(OTHERS[key])
        return found


def make_plan(
    items: Sequence[Item],
    sizes: LifebenchSizes,
    tokens: Callable[[Item, int], int] = lambda item, target: target,
    stops: Sequence[int] = (),
) -> list[Request]:
    """Every request; one item is asked with the same seeds by all controllers.

    Args:
        items: the tasks.
        sizes: targets, modes, controllers.
        tokens: (item, target) -> the target in tokens, where targets are in words.
        stops: the base's stop tokens, for the controller that boosts them.
    """
    return list(_requests(items, sizes, tokens, stops))


def _requests(
    items: Sequence[Item], sizes: LifebenchSizes, tokens: Callable[[Item, int], int], stops: Sequence[int]
) -> Iterator[Request]:
    for mode in sizes.modes:
        for target in sizes.targets:
            for controller in sizes.chosen(mode):
                for item in items:
                    seed = stable_seed(sizes.seed, "lifebench", mode, target, controller.key, item.id)
                    fields = controller.request_fields(mode, tokens(item, target))
                    if controller is BOOST:
                        bias = -sizes.boost if mode == "at_least" else sizes.boost
                        fields = {"logit_bias": {str(stop): bias for stop in stops}}
                    yield Request(mode, controller.key, item.id, target, 0, seed, fields)


def run_lifebench(
    items: Sequence[Item],
    base: Path,
    out: Path,
    settings: ServerSettings,
    sizes: LifebenchSizes,
    notify: Notify,
    judge: JudgeSettings | None = None,
) -> Outcome:
    """Ask, score, tabulate.

    Args:
        items: the tasks.
        base: directory of the base model: its tokenizer, and the log-probability of every answer.
        out: directory of requests.jsonl, which is taken up where it stands.
        settings: the server.
        sizes: targets, modes, controllers.
        notify: progress.
        judge: an LLM that rates every answer; its replies are kept in OUT/judge.jsonl.

    Raises:
        EvaluationError: as `ask_plan` and `judge_answers`; also if the largest target does not fit into max_tokens.
    """
    import asyncio

    from lenvm.sampling.tokens import PromptTokenizer

    tokenizer = PromptTokenizer(base)
    whole = len(items)
    items = fitting(items, tokenizer, sizes)
    by_id = {item.id: item for item in items}
    ratio = {} if sizes.unit == "tokens" else tokens_a_word(items, tokenizer)

    def tokens(item: Item, target: int) -> int:
        return max(1, round(target * ratio.get(item.lang, 1.0)))

    longest = max(tokens(item, max(sizes.targets)) for item in items)
    if settings.max_tokens <= longest:
        raise EvaluationError(
            f"the largest target is {longest} tokens, but answers end at max_tokens {settings.max_tokens}; "
            "give a larger --max-tokens or smaller --targets."
        )

    def prompt(request: Request) -> str:
        mode = next(m for m in MODES if m == request.experiment)
        assert request.target is not None, "every request of LIFEBench has a target"
        countdown = request.controller == COUNTDOWN.key
        return by_id[request.prompt_id].prompt(mode, request.target, sizes.unit, countdown)

    def messages(request: Request) -> list[dict[str, Any]]:
        return [{"role": "user", "content": prompt(request)}]

    plan = make_plan(items, sizes, tokens, stop_ids(base))
    parameters = {"items": [item.id for item in items], "sizes": sizes.model_dump(mode="json")}
    answers = asyncio.run(ask_plan(plan, messages, settings, out / "requests.jsonl", parameters, notify))
    log_probs = score_answers(answers, lambda request: tokenizer.prompt_ids(messages(request)), base, notify)
    ratings: dict[str, int | None] = {}
    if judge is not None:
        log = out / "judge.jsonl"
        asked = judge_answers(answers, lambda a: prompt(a.request), judge, log, partial(notify, "judging"))
        ratings = asyncio.run(asked)
        parameters["judge"] = judge.model
    if sizes.unit == "words":
        answers = [replace(a, length=word_count(a.text, by_id[a.request.prompt_id].lang)) for a in answers]
        parameters["tokens_a_word"] = ratio
    recorded = {"max_tokens": settings.max_tokens, **parameters}
    outcome = tabulate(items, answers, log_probs, sizes, recorded, ratings)
    if len(items) < whole:
        left = (
            f"{whole - len(items)} items were left out: their prompts have more than {sizes.max_prompt_tokens} tokens."
        )
        outcome.summary.append(left)
    return outcome


def stop_ids(base: Path) -> list[int]:
    """The base model's stop tokens, as its generation config, else its config, names them; empty if neither does."""
    from transformers import AutoConfig, GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(base).eos_token_id
    except OSError:
        found = AutoConfig.from_pretrained(base).eos_token_id
    return [] if found is None else [int(i) for i in (found if isinstance(found, list) else [found])]


def fitting(items: Sequence[Item], tokenizer: PromptTokenizer, sizes: LifebenchSizes) -> Sequence[Item]:
    """The items whose prompts fit a small context; all of them without `max_prompt_tokens`.

    Raises:
        EvaluationError: if none fits.
    """
    if sizes.max_prompt_tokens is None:
        return items
    longest, countdown = max(sizes.targets), COUNTDOWN.key in sizes.controllers

    def tokens(item: Item) -> int:
        texts = [item.prompt(mode, longest, sizes.unit, countdown) for mode in sizes.modes]
        return max(len(tokenizer.prompt_ids([{"role": "user", "content": text}])) for text in texts)

    found = [item for item in items if tokens(item) <= sizes.max_prompt_tokens]
    if len(found) < 2:
        raise EvaluationError(
            f"{len(found)} of {len(items)} prompts have at most {sizes.max_prompt_tokens} tokens; "
            "at least 2 are needed: give a larger --max-prompt-tokens."
        )
    return found


def tabulate(
    items: Sequence[Item],
    answers: Sequence[Answer],
    log_probs: LogProbs,
    sizes: LifebenchSizes,
    parameters: dict[str, Any],
    ratings: Mapping[str, int | None] | None = None,
) -> Outcome:
    """Table 2, quality beside it, and the score by category, language and target. Intervals are clustered by item.

    Args:
        items: the tasks.
        answers: of the whole plan; lengths in the unit of the targets.
        log_probs: base log-probability a token, by request key.
        sizes: of the plan.
        parameters: recorded with the results.
        ratings: an LLM judge's, by request key.
    """
    prompts = {i.id: NaturalPrompt(i.id, [], (), (), None, i.category) for i in items}
    rows: dict[tuple[Mode, str], ControlRow] = {}
    for mode in sizes.modes:
        of_mode = [a for a in answers if a.request.experiment == mode]
        base = [a for a in of_mode if a.request.controller == BASE.key]
        for controller in sizes.chosen(mode):
            chosen = [a for a in of_mode if a.request.controller == controller.key]
            rows[mode, controller.key] = control_row(mode, controller, chosen, base, prompts, log_probs, points=False)
    by_id = {i.id: i for i in items}
    groups = {
        "category": {a.request.key: by_id[a.request.prompt_id].category for a in answers},
        "language": {a.request.key: by_id[a.request.prompt_id].lang for a in answers},
        "target": {a.request.key: f"{a.request.target} {sizes.unit}" for a in answers},
    }
    sheets = [_table_2(rows, sizes), _scorers(rows, sizes), _quality(rows, sizes)]
    if ratings:
        sheets.append(_ratings(ratings, answers, sizes))
    sheets += [_breakdown(name, labels, answers, sizes) for name, labels in groups.items()]
    return new_outcome(
        "lifebench",
        f"LIFEBench, targets in {sizes.unit}",
        parameters,
        summary=_summary(items, sizes),
        sheets=sheets,
        plots=_plots(rows, sizes),
    )


def _summary(items: Sequence[Item], sizes: LifebenchSizes) -> list[str]:
    here = {name: sum(i.category == name for i in items) for name in sorted({i.category for i in items})}
    parts = ", ".join(f"{count} {WHOLE.get(name, name)}" for name, count in here.items())
    absent = [label for name, label in WHOLE.items() if not any(c.startswith(name[:6]) for c in here)]
    without = f" There are no {', no '.join(absent)}, so the figures are not those of the whole benchmark." * bool(
        absent
    )
    counted = (
        "tokens, stop token included"
        if sizes.unit == "tokens"
        else "words (in Chinese, characters); guidance is asked for as many tokens as the base's tokenizer makes of so "
        "many words of the tasks"
    )
    languages = ", ".join(f"{sum(i.lang == x for i in items)} {x}" for x in PHRASES)
    return [
        f"{len(items)} of the benchmark's 360 items: {parts} ({languages}).{without}",
        f"Targets {', '.join(map(str, sizes.targets))} {counted}; one answer an item, target and mode. Intervals "
        "resample items.",
    ]


def _labels(sizes: LifebenchSizes) -> dict[str, str]:
    return {c.key: c.label for mode in sizes.modes for c in sizes.chosen(mode)}


def _table_2(rows: Mapping[tuple[Mode, str], ControlRow], sizes: LifebenchSizes) -> Sheet:
    def score(mode: Mode, key: str) -> Estimate | None:
        row = rows.get((mode, key))
        return None if row is None else row.length_score

    table: list[list[Cell]] = []
    for key, label in _labels(sizes).items():
        equal = rows.get(("equal_to", key))
        deviation = None if equal is None else equal.deviation
        table.append([label, deviation, *(score(mode, key) for mode in MODES)])
    head = ["", "equal_to: deviation %", "equal_to: score", "at_most: score", "at_least: score"]
    return Sheet(
        title="Table 2: Length Score (Eq. 18)",
        head=head,
        rows=table,
        note="A controller that cuts or forces the end scores without writing well: read this with the quality table.",
    )


def _scorers(rows: Mapping[tuple[Mode, str], ControlRow], sizes: LifebenchSizes) -> Sheet:
    table: list[list[Cell]] = [
        [mode, rows[mode, c.key].label, rows[mode, c.key].length_score, rows[mode, c.key].released_score,
         rows[mode, c.key].kept]
        for mode in sizes.modes for c in sizes.chosen(mode)
    ]  # fmt: skip
    return Sheet(
        title="Both scorers",
        head=["mode", "", "paper, Eq. 18", "released script", "exact or kept %"],
        rows=table,
        note="The released script puts the deviation as a percentage into the exponent, so it rewards little but hits.",
    )


def _quality(rows: Mapping[tuple[Mode, str], ControlRow], sizes: LifebenchSizes) -> Sheet:
    table: list[list[Cell]] = []
    for mode in sizes.modes:
        for c in sizes.chosen(mode):
            r = rows[mode, c.key]
            table.append(
                [mode, r.label, r.natural_stops, r.base_log_prob, r.log_prob_difference, r.repetition, r.cut_sentences,
                 r.mean_length]
            )  # fmt: skip
    return Sheet(
        title="Quality beside the score",
        head=["mode", "", "natural stops %", "base log p/token", "minus base", "4-gram rep. %", "cut sentences %",
              "mean L"],
        rows=table,
        digits=[1, 1, 1, 2, 2, 1, 1, 1],
        note="A cut sentence: the last character is no sentence's end. The base's own share is the floor.",
    )  # fmt: skip


def _ratings(ratings: Mapping[str, int | None], answers: Sequence[Answer], sizes: LifebenchSizes) -> Sheet:
    table: list[list[Cell]] = []
    for mode in sizes.modes:
        for c in sizes.chosen(mode):
            chosen = [a for a in answers if (a.request.experiment, a.request.controller) == (mode, c.key)]
            rated = [(float(value), a.request.prompt_id) for a in chosen if (value := ratings[a.request.key])]
            mean = Estimate.of(mean_interval([v for v, _ in rated], [p for _, p in rated]))
            table.append([mode, c.label, mean, len(chosen) - len(rated)])
    return Sheet(
        title="Rated by an LLM judge",
        head=["mode", "", "rating, 1 to 10", "no number in the reply"],
        rows=table,
        digits=[1, 1, 2, 0],
        note="The judge is told to leave the length aside. An answer without text counts 1.",
    )


def _breakdown(name: str, labels: Mapping[str, str], answers: Sequence[Answer], sizes: LifebenchSizes) -> Sheet:
    order = list(dict.fromkeys(labels.values()))
    table: list[list[Cell]] = []
    for mode in sizes.modes:
        for c in sizes.chosen(mode):
            line: list[Cell] = [mode, c.label]
            chosen = [a for a in answers if (a.request.experiment, a.request.controller) == (mode, c.key)]
            for group in order:
                here = [a for a in chosen if labels[a.request.key] == group]
                scores = length_score([a.length for a in here], [a.request.target or 1 for a in here], mode)
                line.append(Estimate.of(mean_interval(scores, [a.request.prompt_id for a in here])))
            table.append(line)
    return Sheet(title=f"Length Score by {name}", head=["mode", "", *order], rows=table)


def _plots(rows: Mapping[tuple[Mode, str], ControlRow], sizes: LifebenchSizes) -> list[Plot]:
    found = []
    for mode in sizes.modes:
        points = [rows[mode, c.key] for c in sizes.chosen(mode)]
        series = []
        for row in points:
            if row.base_log_prob is None:
                continue
            e = row.length_score
            colour = {"hard": "hard", "soft": "bias"}.get(row.controller, "posterior")
            if row.controller in {c.key for c in UNGUIDED}:
                colour = "base"
            series.append(
                Series(label=row.label, x=[row.base_log_prob.value], y=[e.value], y_low=[e.low], y_high=[e.high],
                       names=[row.label], style="points", colour=colour)
            )  # fmt: skip
        if series:
            found.append(
                Plot(name=f"score_{mode}", title=f"{mode}: score against the text's probability", series=series,
                     x_label="base log-probability, nats a token", y_label="Length Score")
            )  # fmt: skip
    return found
