"""The four charts of a set of runs, one line of points for each run."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from dsv4_plugin.tools.bench.measures import Level, Spread
from dsv4_plugin.tools.bench.report import Run

INCHES, DPI = (12.0, 9.6), 100
"""A picture 1,200 pixels wide."""
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#8c564b", "#e69f00", "#333333"
)  # fmt: skip
"""Okabe and Ito's, which colour-blind people can tell apart, without the yellow."""
MARKERS = "osD^vPX*"
GREY = "#888888"
STYLE: dict[Any, Any] = {
    "font.size": 11.0,
    "axes.titlesize": 13.0,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "svg.hashsalt": "dsv4",
}


def draw(runs: Sequence[Run]) -> Figure:
    """A figure with four axes: ITL, TTFT and throughput against concurrency, and total tokens per
    second against mean TTFT. Hollow points are levels that have a mark."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=INCHES, dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
        )
        (itl, ttft), (throughput, trade) = figure.subplots(2, 2)
        _latency(itl, runs, "itl", "Inter-token latency")
        _latency(ttft, runs, "ttft", "Time to first token")
        _throughput(throughput, runs)
        _trade(trade, runs)
        for axes in (itl, ttft, throughput):
            _against_concurrency(axes, runs)
        _legend(figure, runs)
        figure.suptitle(subject(runs), fontsize=13)
    return figure


def subject(runs: Sequence[Run]) -> str:
    """What all runs measured; of what they differ in nothing."""
    known = [run for run in runs if run.levels]
    models = {run.server.model for run in known}
    options = [run.options for run in known]
    same = {
        k: v
        for k, v in (options[0] if options else {}).items()
        if all(other.get(k) == v for other in options)
    }
    parts = [*models] if len(models) == 1 else []
    if "dataset" in same:
        parts.append(f"dataset {same['dataset']}")
    if same.get("input_len"):
        parts.append(f"{same['input_len']:,} tokens in")
    if "output_len" in same:
        parts.append(f"{same['output_len']:,} tokens out")
    if "requests" in same:
        parts.append(f"{same['requests']:,} requests per level")
    return ", ".join(parts)


def to_png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def to_svg(figure: Figure) -> str:
    """From its `<svg` on, as it stands in a page of HTML."""
    out = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def write(runs: Sequence[Run], folder: Path) -> str:
    """Write bench.svg and bench.png; the SVG is what is returned."""
    figure = draw(runs)
    svg = to_svg(figure)
    (folder / "bench.svg").write_text(svg, encoding="utf-8")
    (folder / "bench.png").write_bytes(to_png(figure))
    return svg


def look(number: int) -> tuple[str, str]:
    """Colour and marker of a run; where colours come again, it is with another marker."""
    turn, colour = divmod(number, len(COLOURS))
    return COLOURS[colour], MARKERS[(colour + turn) % len(MARKERS)]


def _latency(axes: Axes, runs: Sequence[Run], name: str, title: str) -> None:
    for number, run in enumerate(runs):
        found: list[tuple[Level, Spread]] = [
            (level, spread) for level in run.levels if (spread := getattr(level, name))
        ]
        levels = [level for level, _ in found]
        x = [level.concurrency for level in levels]
        _line(axes, number, x, [s.p50 * 1000 for _, s in found], levels)
        colour, _ = look(number)
        axes.plot(x, [s.p99 * 1000 for _, s in found], "--", color=colour, lw=1, alpha=0.8)
    axes.set(title=title, ylabel=f"{name.upper()} (ms)")
    _log(axes, "y")


def _throughput(axes: Axes, runs: Sequence[Run]) -> None:
    for number, run in enumerate(runs):
        levels = [level for level in run.levels if level.output_rate]
        x, y = [level.concurrency for level in levels], [level.output_rate for level in levels]
        if levels:
            ideal = [y[0] * c / x[0] for c in x]
            axes.plot(x, ideal, ":", color=look(number)[0], lw=1, alpha=0.7)
        _line(axes, number, x, y, levels)
    axes.set(title="Throughput scaling", ylabel="Output tokens per second")
    _log(axes, "y")


def _trade(axes: Axes, runs: Sequence[Run]) -> None:
    for number, run in enumerate(runs):
        levels = [level for level in run.levels if level.ttft and level.total_rate]
        x = [level.ttft.mean * 1000 for level in levels if level.ttft]
        y = [level.total_rate for level in levels]
        _line(axes, number, x, y, levels)
        for level, a, b in zip(levels, x, y, strict=True):
            axes.annotate(
                str(level.concurrency), (a, b), xytext=(6, -11), textcoords="offset points",
                fontsize=9, color=look(number)[0],
            )  # fmt: skip
    axes.set(
        title="Throughput against latency",
        xlabel="Mean TTFT (ms); the numbers are the concurrency",
        ylabel="Total tokens per second",
    )
    _log(axes, "x")
    _log(axes, "y")


def _line(
    axes: Axes, number: int, x: Sequence[float], y: Sequence[float], levels: Sequence[Level]
) -> None:
    """A line with a marker for each level, hollow where it has a mark."""
    colour, marker = look(number)
    axes.plot(x, y, "-", color=colour, lw=1.8)
    for a, b, level in zip(x, y, levels, strict=True):
        face = "white" if level.marks else colour
        axes.plot(
            [a], [b], marker, color=colour, markerfacecolor=face, ms=7, zorder=3, clip_on=False
        )


def _against_concurrency(axes: Axes, runs: Sequence[Run]) -> None:
    levels = sorted({level.concurrency for run in runs for level in run.levels})
    axes.set_xlabel("Concurrency (requests in flight)")
    if levels:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(levels))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))


def _log(axes: Axes, name: Literal["x", "y"]) -> None:
    """A logarithmic axis with ticks at 1, 2, 5, 10, ... from below to above what is drawn."""
    box = axes.dataLim
    low, high = (box.x0, box.x1) if name == "x" else (box.y0, box.y1)
    if not math.isfinite(low):  # nothing is drawn
        return
    marks = ticks(low, high)
    axis = axes.xaxis if name == "x" else axes.yaxis
    axes.set(**{f"{name}scale": "log", f"{name}lim": (marks[0], marks[-1])})
    axis.set_major_locator(FixedLocator(marks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def ticks(low: float, high: float) -> list[float]:
    """Numbers like 10, 20, 50 that enclose both; powers of ten only, where there would be many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if last - first <= 3 else (1,)
    found = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
    start = max(i for i, mark in enumerate(found) if mark <= low * 1.0001)
    end = min(i for i, mark in enumerate(found) if mark >= high * 0.9999)
    return found[start : max(end, start + 1) + 1]


def _legend(figure: Figure, runs: Sequence[Run]) -> None:
    handles = []
    for number, run in enumerate(runs):
        colour, marker = look(number)
        label = run.label if run.levels else f"{run.label} (not measured)"
        handles.append(Line2D([], [], color=colour, marker=marker, ms=7, lw=1.8, label=label))
    handles.append(Line2D([], [], color=GREY, lw=1.8, label="p50"))
    handles.append(Line2D([], [], color=GREY, lw=1, ls="--", label="p99"))
    handles.append(Line2D([], [], color=GREY, lw=1, ls=":", label="linear scaling"))
    if any(level.marks for run in runs for level in run.levels):
        hollow = Line2D([], [], color=GREY, marker="o", markerfacecolor="white", ms=7, lw=0)
        hollow.set_label("with a mark: see the page")
        handles.append(hollow)
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
