"""The results on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lenvm.evaluation.outcome import Cell, Outcome
from lenvm.evaluation.schema import ControlRow, Criterion, CurvePoint, Estimate, Results

_KEPT = {"equal_to": "exact hits %", "at_most": "kept %", "at_least": "kept %"}


def show(results: Results, console: Console) -> None:
    """Print every table of the results, the thresholds last."""
    _natural(results, console)
    for mode in dict.fromkeys(r.mode for r in results.control):
        _control(f"{mode}: targets within each prompt's natural range", mode, results, console)
    if results.side:
        console.print(_control_table("equal_to, other controllers (one target a prompt)", "equal_to", results.side))
        console.print()
    _median(results, console)
    _trade_off(results, console)
    _prediction(results, console)
    if results.speed is not None:
        s = results.speed
        console.print(
            f"Speed at concurrency {s.concurrency}: unguided {s.unguided:,.0f} tokens/s, "
            f"guided {s.guided:,.0f} tokens/s, guided / unguided {100 * s.ratio:.0f} %\n"
        )
    if results.criteria:
        console.print(criteria_table(results.criteria))
    console.print(
        "± is the wider side of the 95 % interval, resampled by prompt; results.json has both ends.", style="dim"
    )


def show_outcome(outcome: Outcome, console: Console) -> None:
    """Print the tables of any other evaluation than `control`."""
    console.print()
    for line in outcome.summary:
        console.print(line, highlight=False)
    console.print()
    for sheet in outcome.sheets:
        table = _table(sheet.title)
        texts = [all(isinstance(row[i], str) for row in sheet.rows) for i in range(len(sheet.head))]
        for name, text in zip(sheet.head, texts, strict=True):
            table.add_column(name, justify="left" if text else "right")
        for row in sheet.rows:
            table.add_row(*(_cell(value, sheet.decimals(i)) for i, value in enumerate(row)))
        console.print(table)
        if sheet.note:
            console.print(sheet.note, style="dim", highlight=False)
        console.print()


def _cell(value: Cell, digits: int) -> str:
    from rich.markup import escape

    if value is None or isinstance(value, Estimate):
        return figure(value, digits)
    return f"{value:.{digits}f}" if isinstance(value, float) else escape(str(value))


def figure(estimate: Estimate | None, digits: int = 1, interval: bool = True) -> str:
    """`91.8 ±2.1`, the wider side of the interval; a dash where there is none."""
    if estimate is None:
        return "–"
    text = f"{estimate.value:.{digits}f}"
    side = max(estimate.value - estimate.low, estimate.high - estimate.value)
    return f"{text} [dim]±{side:.{digits}f}[/dim]" if interval else text


def criteria_table(criteria: Sequence[Criterion]) -> Table:
    """Thresholds: wanted, measured, met."""
    table = _table("Thresholds")
    for name in ("criterion", "wanted", "measured", "met"):
        table.add_column(name, justify="left" if name == "criterion" else "right")
    for c in criteria:
        digits = 3 if c.unit == "nats" else 0 if not c.unit and c.value.low == c.value.high else 1
        table.add_row(
            c.name,
            wanted(c),
            f"{figure(c.value, digits, c.value.low != c.value.high)} {c.unit}".strip(),
            "[green]yes[/green]" if c.met else "[bold red]no[/bold red]",
        )
    return table


def wanted(criterion: Criterion) -> str:
    """The bounds in words: `>= 90`, `<= 50 %`, `within 0.1 nats`."""
    low, high, unit = criterion.at_least, criterion.at_most, f" {criterion.unit}" if criterion.unit else ""
    if low is not None and high is not None:
        return f"within ±{high:g}{unit}" if low == -high else f"{low:g} to {high:g}{unit}"
    if low == 100 and unit == " %":
        return "100 %"
    return f"≥ {low:g}{unit}" if low is not None else f"≤ {high:g}{unit}"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)


def _natural(results: Results, console: Console) -> None:
    n = results.natural
    spread = ", ".join(f"{k} {v:.0f}" for k, v in n.percentiles.items())
    console.print(
        f"\n{n.prompts} held-out prompts ({n.problems} with a checkable answer), {n.samples} completions of the base: "
        f"mean length {n.mean_length:.1f} tokens ({spread}), {n.censored:.1f} % cut by max_tokens, "
        f"accuracy {figure(n.accuracy)} %\n"
    )


def _control(title: str, mode: str, results: Results, console: Console) -> None:
    console.print(_control_table(title, mode, [r for r in results.control if r.mode == mode]))
    console.print()


def _control_table(title: str, mode: str, rows: Sequence[ControlRow]) -> Table:
    table = _table(title)
    heads = (
        "",
        "Length Score",
        "deviation %",
        _KEPT[mode],
        "natural stops %",
        "base log p/token",
        "accuracy %",
        "4-gram rep. %",
        "mean L",
        "n",
    )
    for i, name in enumerate(heads):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(
            row.label,
            figure(row.length_score),
            figure(row.deviation),
            figure(row.kept),
            figure(row.natural_stops, interval=False),
            figure(row.base_log_prob, 2),
            figure(row.accuracy),
            figure(row.repetition, interval=False),
            figure(row.mean_length, interval=False),
            str(row.length_score.n),
        )
    return table


def _median(results: Results, console: Console) -> None:
    if not results.median:
        return
    table = _table("Problems, equal_to at the natural median")
    for name in ("", "accuracy %", "minus base", "exact hits %"):
        table.add_column(name, justify="left" if not name else "right")
    for row in results.median:
        table.add_row(row.label, figure(row.accuracy), figure(row.difference), figure(row.kept))
    console.print(table)
    console.print()


def _trade_off(results: Results, console: Console) -> None:
    t = results.trade_off
    if t is None:
        return
    table = _table(
        f"Accuracy against length on problems; base {t.base_accuracy.value:.1f} % "
        f"at {t.base_mean_length.value:.1f} tokens"
    )
    heads = ("", "mean truncated L", "accuracy %", "share of base %", "over budget %", "hard cut at that length %")
    for i, name in enumerate(heads):
        table.add_column(name, justify="left" if i == 0 else "right")
    for group in (t.budgets, t.hard_cuts, t.biases):
        for p in group:
            table.add_row(*_point(p))
        table.add_section()
    console.print(table)
    console.print()


def _point(p: CurvePoint) -> tuple[str, ...]:
    cut = "–" if p.hard_cut_accuracy is None or p.label.startswith("cut") else f"{p.hard_cut_accuracy:.1f}"
    return (
        p.label,
        figure(p.mean_length),
        figure(p.accuracy),
        figure(p.share_of_base),
        figure(p.overruns, interval=False),
        cut,
    )


def _prediction(results: Results, console: Console) -> None:
    p = results.prediction
    if p is None:
        return
    table = _table(f"Length predicted at the prompt, truth from {p.samples_per_prompt:.0f} completions a prompt")
    for name in ("", "MRE of L_GT % (Eq. 15)", "MRE of mean length %", "bias of mean length %"):
        table.add_column(name, justify="left" if not name else "right")
    for row in p.predictors:
        table.add_row(row.label, figure(row.error_return), figure(row.error_mean), figure(row.bias_mean))
    console.print(table)
    if p.coverage_p50 is not None:
        console.print(
            f"coverage of p50 {figure(p.coverage_p50)} %, of p90 {figure(p.coverage_p90)} %; "
            f"total bias of E[L] {p.total_bias:+.1f} %"
        )
    console.print()
