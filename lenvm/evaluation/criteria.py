"""The thresholds a demo world must reach, each with what was measured."""

from __future__ import annotations

from lenvm.evaluation.data import NaturalData
from lenvm.evaluation.plan import SHARE, budget
from lenvm.evaluation.schema import ControlRow, Criterion, Estimate, MedianRow, TradeOff


def judge(
    data: NaturalData, control: list[ControlRow], median: list[MedianRow], trade_off: TradeOff | None
) -> list[Criterion]:
    """Every threshold that these results can speak about, in the order of the tables."""
    rows = {(r.mode, r.controller): r for r in control}
    found: list[Criterion] = []

    def add(
        name: str, value: Estimate | None, unit: str, at_least: float | None = None, at_most: float | None = None
    ) -> None:
        if value is not None:
            found.append(Criterion(name=name, value=value, unit=unit, at_least=at_least, at_most=at_most))

    count = float(len(data.prompts))
    add(
        "held-out prompts",
        Estimate(value=count, low=count, high=count, n=len(data.prompts), prompts=len(data.prompts)),
        "",
        100,
    )
    posterior = rows.get(("equal_to", "posterior"))
    if posterior is not None:
        add("equal_to, Length Score", posterior.length_score, "", 90)
        add("equal_to, exact hits", posterior.kept, "%", 60)
        add("equal_to, base log-probability minus the base's own", posterior.log_prob_difference, "nats", -0.1, 0.1)
        add("equal_to, natural stops", posterior.natural_stops, "%", 98)
    for row in median:
        if row.controller == "posterior":
            add("accuracy at the natural median minus the base's", row.difference, "points", -5)
    for mode, threshold in (("at_most", 90.0), ("at_least", 95.0)):
        if (mode, "posterior") in rows:
            add(f"{mode}, kept", rows[mode, "posterior"].kept, "%", threshold)
    for mode in ("equal_to", "at_most", "at_least"):
        if (mode, "posterior_strict") in rows:
            add(f"{mode} with length_strict, kept", rows[mode, "posterior_strict"].kept, "%", 100)
    if trade_off is not None:
        limit = budget(data.problems, SHARE)
        for name, points, bounds in (
            (f"posterior at_most {limit}: share of the base's accuracy", trade_off.budgets, (90.0, None)),
            (f"cutting at {limit}: share of the base's accuracy", trade_off.hard_cuts, (None, 50.0)),
        ):
            for point in points:
                if point.setting == limit:
                    add(name, point.share_of_base, "%", *bounds)
    return found
