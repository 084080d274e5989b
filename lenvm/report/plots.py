"""The report's figures as inline SVG.

Text and axes are drawn in placeholder colours that become CSS (`currentColor`, `var(--grid)`), so that one figure reads
well on a light and on a dark page. The colours of the series were chosen to stand out on both.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lenvm.evaluation.outcome import Plot
from lenvm.evaluation.schema import Example, Prediction, Results, TradeOff

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID = "#010101", "#020202"
COLOURS = {"base": "#8b93a1", "hard": "#e0823d", "posterior": "#2e86de", "bias": "#a066d3", "shade": "#2fa36b"}
NAMES = {"base": "Base model", "hard": "Paper's hard rule", "posterior": "Posterior"}
MODE_TITLES = {"equal_to": "equal_to: exactly T", "at_most": "at_most: T or fewer", "at_least": "at_least: T or more"}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.labelsize": 10.5,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def scatter(results: Results) -> str | None:
    """Asked against obtained length: a column a mode, a row a controller. None without control rows."""
    modes = [m for m in MODE_TITLES if any(r.mode == m and r.points for r in results.control)]
    keys = [k for k in NAMES if any(r.controller == k and r.points for r in results.control)]
    if not modes or not keys:
        return None
    every = [n for r in results.control for point in r.points for n in point]
    low, high = max(1, min(every)) * 0.8, max(every) * 1.25
    with _figure(len(modes), len(keys), width=9.6, height=2.75 * len(keys) + 0.5) as (figure, axes):
        for i, key in enumerate(keys):
            for j, mode in enumerate(modes):
                panel = axes[i][j]
                row = results.row(mode, key)
                _log_axes(panel, low, high)
                if mode != "equal_to":
                    edge = low if mode == "at_most" else high
                    panel.fill_between([low, high], [low, high], edge, color=COLOURS["shade"], alpha=0.12, lw=0)
                panel.plot([low, high], [low, high], color=INK, lw=0.9, alpha=0.55)
                if row is not None:
                    x, y = zip(*row.points, strict=True)
                    panel.scatter(x, y, s=11, color=COLOURS[key], alpha=0.5, lw=0)
                    share = f"{row.kept.value:.0f} % {'exact' if mode == 'equal_to' else 'kept'}"
                    panel.text(0.05, 0.93, share, transform=panel.transAxes, va="top", weight="bold")
                if i == 0:
                    panel.set_title(MODE_TITLES[mode], loc="left", weight="bold", pad=10)
                if i == len(keys) - 1:
                    panel.set_xlabel("asked, tokens")
                else:
                    panel.tick_params(labelbottom=False)
                if j == 0:
                    panel.set_ylabel(f"{NAMES[key]}\nobtained, tokens")
                else:
                    panel.tick_params(labelleft=False)
        return _svg(figure, "scatter", "Asked against obtained length")


def trade_off(t: TradeOff) -> str:
    """Accuracy against mean truncated length."""
    with _figure(1, 1, width=9.6, height=4.3) as (figure, axes):
        panel = axes[0][0]
        curve = t.curve
        panel.plot([0, *curve.mean_lengths], [0, *curve.accuracies], color=COLOURS["base"], lw=2)
        for points, colour, marker in ((t.biases, COLOURS["bias"], "s"), (t.budgets, COLOURS["posterior"], "o")):
            if points:
                ordered = sorted(points, key=lambda p: p.mean_length.value)
                x, y = [p.mean_length.value for p in ordered], [p.accuracy.value for p in ordered]
                low = [p.accuracy.value - p.accuracy.low for p in ordered]
                high = [p.accuracy.high - p.accuracy.value for p in ordered]
                panel.errorbar(x, y, yerr=[low, high], color=colour, lw=1.8, elinewidth=1, marker=marker, ms=6)
        panel.plot(t.base_mean_length.value, t.base_accuracy.value, marker="*", ms=15, color=INK, lw=0, zorder=5)
        for p in t.budgets:
            spot = (p.mean_length.value, p.accuracy.high)
            panel.annotate(f"≤ {p.setting:g}", spot, (0, 4), textcoords="offset points", ha="center", fontsize=9.5)
        for p in t.biases:
            spot = (p.mean_length.value, p.accuracy.value)
            label = f"β {p.setting:+g}".replace("-", "−")
            down = -12 if p.accuracy.value > 8 else 2  # not onto the axis
            panel.annotate(label, spot, (7, down), textcoords="offset points", fontsize=9.5)
        handles = [
            _handle("posterior at_most, budget T", COLOURS["posterior"], "o"),
            _handle("length_bias β", COLOURS["bias"], "s"),
            _handle("base, cut at a hard budget", COLOURS["base"], None),
            _handle("base, unguided", INK, "*"),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=4, handlelength=1.6, columnspacing=1.6)
        panel.set_xlim(0, 1.07 * panel.get_xlim()[1])
        panel.set_ylim(0, min(104, panel.get_ylim()[1] * 1.08))
        panel.set_xlabel("mean length, tokens (answers over a budget count as cut there)")
        panel.set_ylabel("accuracy, %")
        return _svg(figure, "tradeoff", "Accuracy against mean length")


def prediction(p: Prediction) -> str:
    """Predicted against true length at the prompt: value against L_GT, expected length against the mean."""
    second = [q for q in p.points if q.expected is not None]
    panels = [("Value z against L_GT (Eq. 14)", [(q.true_return, q.from_value) for q in p.points], COLOURS["bias"])]
    if second:
        pairs = [(q.true_mean, float(q.expected or 0.0)) for q in second]
        panels.append(("E[L] of the distribution against the mean", pairs, COLOURS["posterior"]))
    every = [v for _, pairs, _ in panels for pair in pairs for v in pair]
    low, high = max(1.0, min(every)) * 0.85, max(every) * 1.18
    with _figure(len(panels), 1, width=4.9 * len(panels), height=4.0) as (figure, axes):
        for panel, (title, pairs, colour) in zip(axes[0], panels, strict=True):
            _log_axes(panel, low, high)
            panel.plot([low, high], [low, high], color=INK, lw=0.9, alpha=0.55)
            x, y = zip(*pairs, strict=True)
            panel.scatter(x, y, s=22, color=colour, alpha=0.6, lw=0)
            panel.set_title(title, loc="left", weight="bold")
            panel.set_xlabel("true, tokens")
        axes[0][0].set_ylabel("predicted at the prompt, tokens")
        return _svg(figure, "prediction", "Predicted against true length at the prompt")


def example(e: Example) -> str:
    """Predicted remaining length along an answer, beside what really remained."""
    remaining = ([] if e.at_prompt is None else [e.at_prompt]) + e.remaining
    start = 0 if e.at_prompt is not None else 1
    x = list(range(start, start + len(remaining)))
    with _figure(1, 1, width=9.6, height=3.1) as (figure, axes):
        panel = axes[0][0]
        panel.plot([0, e.length], [e.length, 0], color=COLOURS["base"], lw=1.6, ls=(0, (4, 3)))
        panel.plot(x, remaining, color=COLOURS["posterior"], lw=1.8)
        panel.set_xlim(0, e.length)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("tokens written")
        panel.set_ylabel("tokens still to come")
        handles = [
            _handle("predicted", COLOURS["posterior"], None),
            _handle("what really remained", COLOURS["base"], None, dashed=True),
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
        return _svg(figure, "example", "Predicted remaining length along an answer")


def drawn(plot: Plot) -> str:
    """A figure of an `Outcome`: lines and points with their intervals, or words."""
    lines = sum(len(s.y) for s in plot.series if s.style == "rows")
    with _figure(1, 1, width=9.6, height=max(4.4, 1.0 + 0.2 * lines)) as (figure, axes):
        panel = axes[0][0]
        _draw(plot, panel)
        if lines:
            panel.legend()
        elif not _words(plot):
            panel.margins(x=0.12)
            if _numbered(plot):
                figure.legend(loc="outside right")
            else:
                figure.legend(loc="outside upper left", ncols=min(4, len(plot.series)))
        return _svg(figure, plot.name, plot.title)


def write_png(plots: Sequence[Plot], path: Path) -> None:
    """All figures of an `Outcome` as the panels of one picture, black on white."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(plots))
    lines = -(-len(plots) // columns)
    on_white = {"grid.color": "#dddddd", "axes.edgecolor": "#999999", "figure.facecolor": "white"}
    with mpl.rc_context({**_STYLE, **on_white, "savefig.facecolor": "white", "font.size": 9.0, "axes.labelsize": 8.5}):
        figure = Figure(figsize=(max(6.6, 4.4 * columns), 3.4 * lines), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(lines, columns, squeeze=False).flat
        for panel, plot in zip(panels, plots, strict=False):
            _draw(plot, panel)
            panel.set_title(plot.title, loc="left", weight="bold", fontsize=9.0)
            if _words(plot):
                continue
            if _rows(plot):
                panel.tick_params(axis="y", labelsize=6.5)
            if _numbered(plot):
                panel.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(0.0, -0.2), ncols=2)
            else:
                panel.legend(fontsize=7.5)
        for panel in list(figure.axes)[len(plots) :]:
            panel.set_visible(False)
        figure.savefig(path, dpi=100)


def _draw(plot: Plot, panel: Axes) -> None:
    """Lines and points; beside points with names stand numbers that the legend explains. Or rows, or words."""
    if _words(plot):
        _draw_words(plot, panel)
        return
    if _rows(plot):
        _draw_rows(plot, panel)
        return
    numbered = _numbered(plot)
    cycle = [COLOURS[k] for k in ("posterior", "hard", "shade", "bias", "base")]
    for i, s in enumerate(plot.series):
        colour = COLOURS[s.colour] if s.colour else cycle[i % len(cycle)]
        if s.y_low is not None and s.y_high is not None:
            if s.style == "line":
                panel.fill_between(s.x, s.y_low, s.y_high, color=colour, alpha=0.15, lw=0)
            else:
                panel.vlines(s.x, s.y_low, s.y_high, color=colour, lw=1.4, alpha=0.7)
        marker = "o" if s.style == "points" or len(s.x) < 30 else None
        label = f"{i + 1}  {s.label}" if numbered else s.label
        size = 5 if len(s.x) < 200 else 2.5
        panel.plot(s.x, s.y, color=colour, lw=1.8 if s.style == "line" else 0, marker=marker, ms=size, label=label)
        if numbered:
            panel.annotate(str(i + 1), (s.x[0], s.y[0]), xytext=(6, 4), textcoords="offset points", fontsize=9)
    panel.margins(y=0.1)
    if plot.log:
        panel.set(xscale="log", yscale="log")
    if plot.diagonal:
        ends = [v for s in plot.series for v in (*s.x, *s.y)]
        panel.plot([min(ends), max(ends)], [min(ends), max(ends)], color=INK, lw=0.9, alpha=0.55)
    panel.set_xlabel(plot.x_label)
    panel.set_ylabel(plot.y_label)


def _draw_rows(plot: Plot, panel: Axes) -> None:
    """Names one below the other, so that they never overlap; values and their intervals along the axis."""
    names: list[str] = []
    for s in plot.series:
        places = range(len(names), len(names) + len(s.y))
        colour = COLOURS[s.colour or "posterior"]
        if s.y_low is not None and s.y_high is not None:
            panel.hlines(places, s.y_low, s.y_high, color=colour, lw=1.4, alpha=0.7)
        panel.plot(s.y, places, color=colour, lw=0, marker="o", ms=4, label=s.label)
        names += [name.replace("$", r"\$") for name in s.names or []]
    panel.axvline(0.0, color=INK, lw=0.9, alpha=0.55)
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(len(names) - 0.5, -0.5)
    panel.set_xlabel(plot.y_label)


def _draw_words(plot: Plot, panel: Axes) -> None:
    """A word cloud: the words of all series, each in its series' colour."""
    import matplotlib as mpl
    from wordcloud import WordCloud

    sizes = {name: y for s in plot.series for name, y in zip(s.names or [], s.y, strict=True)}
    colours = {name: COLOURS[s.colour or "posterior"] for s in plot.series for name in s.names or []}
    cloud = WordCloud(
        width=960,
        height=400,
        scale=2,
        mode="RGBA",
        background_color=None,
        prefer_horizontal=1.0,  # a token that stands upright is hard to read
        relative_scaling=0.5,
        random_state=0,  # the same picture every time
        font_path=mpl.font_manager.findfont("DejaVu Sans"),
        color_func=lambda word, **_: colours[word],
    ).generate_from_frequencies(sizes)
    panel.imshow(cloud.to_array(), interpolation="bilinear")
    panel.set_axis_off()


def _words(plot: Plot) -> bool:
    return any(s.style == "words" for s in plot.series)


def _rows(plot: Plot) -> bool:
    return any(s.style == "rows" for s in plot.series)


def _numbered(plot: Plot) -> bool:
    """Whether every series is one named point: few, and often so near to each other that names would overlap."""
    return all(s.names and len(s.x) == 1 and s.style == "points" for s in plot.series)


class _figure:  # noqa: N801
    """A context with the page's style, a figure and its axes [rows][columns]."""

    def __init__(self, columns: int, rows: int, width: float, height: float) -> None:
        self._shape, self._size = (rows, columns), (width, height)

    def __enter__(self) -> tuple[Figure, list[list[Axes]]]:
        import matplotlib as mpl
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        self._style = mpl.rc_context(_STYLE)
        self._style.__enter__()
        figure = Figure(figsize=self._size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(*self._shape, squeeze=False)
        return figure, [list(row) for row in axes]

    def __exit__(self, *error: Any) -> None:
        self._style.__exit__(*error)


def _handle(label: str, colour: str, marker: str | None, dashed: bool = False) -> Any:
    from matplotlib.lines import Line2D

    width = 0 if marker == "*" else 2
    line = (0, (4, 3)) if dashed else "-"
    return Line2D([], [], color=colour, lw=width, ls=line, marker=marker, ms=11 if marker == "*" else 6, label=label)


def _log_axes(panel: Axes, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

    panel.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    ticks = [t for k in range(6) for t in (10**k, 3 * 10**k) if low <= t <= high]
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an <svg> element that takes its colours from the page."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name, "svg.id": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg ([^>]*?)width="[^"]*" ([^>]*?)height="[^"]*"', r"<svg \1 \2", text, count=1)
    text = re.sub(r'height="[\d.]+pt" ', "", text, count=1)
    text = re.sub(r'width="[\d.]+pt" ', "", text, count=1)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
    # ids are unique in a figure, the page holds several
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'xlink:href="#', f'xlink:href="#{name}-', text)
    # the page's own typeface, and no style that reaches beyond the figure
    text = re.sub(r"font-family: [^;\"]*;?\s?", "", text)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    return text.replace(INK, "currentColor").replace(GRID, "var(--grid)")
