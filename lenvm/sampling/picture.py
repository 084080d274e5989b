"""The lengths of a file of completions as a picture."""

from __future__ import annotations

from pathlib import Path

from lenvm.sampling.errors import SamplingError
from lenvm.sampling.log import read_rows
from lenvm.sampling.statistics import summarise

BARS = 40


def check_picture(picture: Path) -> None:
    """Whether `draw_lengths` can write such a file, to be known before hours of sampling.

    Raises:
        SamplingError: without matplotlib, or for a suffix that it does not know.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SamplingError("--picture needs matplotlib; install lenvm[eval].") from None
    known = Figure().canvas.get_supported_filetypes()
    if picture.suffix.lstrip(".") not in known:
        raise SamplingError(f"--picture must end in one of {', '.join(sorted(known))}, got {picture.name!r}.")


def draw_lengths(completions: Path, picture: Path) -> None:
    """Histogram of the completions' lengths, finished ones and cut ones, with what the statistics suggest.

    Args:
        completions: JSONL file of `lenvm sample`, at least one row.
        picture: the file to write; its suffix (png, svg, pdf) names the format. `check_picture` comes first.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    found = summarise(read_rows(completions))
    lengths: dict[str, list[int]] = {"finished": [], "cut by max_tokens": []}
    for row in read_rows(completions):
        kind = "cut by max_tokens" if row["finish_reason"] == "length" else "finished"
        lengths[kind].append(len(row["completion_token_ids"]))
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    panel = figure.subplots()
    shown = {kind: values for kind, values in lengths.items() if values}
    panel.hist(list(shown.values()), bins=BARS, stacked=True, label=list(shown),
               color=["#2a78d6" if kind == "finished" else "#e07b39" for kind in shown])  # fmt: skip
    for p in (50, 99):
        panel.axvline(found.percentiles[p], color="#555555", lw=1.0, ls=":")
        panel.annotate(f"p{p}: {found.percentiles[p]}", (found.percentiles[p], 1.0), xytext=(3, -10),
                       xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=8)  # fmt: skip
    panel.set(xlabel="tokens, stop token included", ylabel="completions")
    panel.set_title(
        f"{found.completions} completions of {found.prompts} prompts, {found.cut:.1%} cut; "
        f"suggested gamma {found.gamma:.4f}, cutoff_len {found.cutoff}",
        fontsize=9,
        loc="left",
    )
    panel.legend(frameon=False, fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.fonttype": "none"}):  # text stays text
        figure.savefig(picture, dpi=120)
