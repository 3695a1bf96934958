"""Runs as one page of HTML that needs nothing but itself: the charts, what was run, the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dsv4_plugin.tools.bench import charts
from dsv4_plugin.tools.bench.report import MEASURES, Run

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-bottom: 1em; }
th, td { padding: 2px 10px; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.facts td { text-align: left; vertical-align: top; }
.mark { color: #a33; }
.wide { overflow-x: auto; }
"""


def write(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write bench.svg, bench.png and bench.html, and return where they are."""
    svg = charts.write(runs, folder)
    (folder / "bench.html").write_text(html(runs, svg), encoding="utf-8")
    return [folder / f"bench.{kind}" for kind in ("html", "svg", "png")]


def html(runs: Sequence[Run], svg: str) -> str:
    """The page. svg: the charts, from `<svg` on."""
    title = f"dsv4 bench: {', '.join(run.label for run in runs)}"
    parts = [part for number, run in enumerate(runs) for part in _run(number, run)]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            f"<style>{STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            svg,
            *parts,
            "</body></html>",
            "",
        ]
    )


def _run(number: int, run: Run) -> Iterator[str]:
    colour, _ = charts.look(number)
    yield f'<h2 style="color:{colour}">{escape(run.label)}</h2>'
    if run.ended:
        yield f'<p class="mark">This run is not complete: {escape(run.ended)}.</p>'
    yield '<table class="facts">'
    for name, value in _facts(run).items():
        yield f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>"
    yield "</table>"
    if run.levels:
        yield from _numbers(run)
    for level in run.levels:
        for mark in level.marks:
            yield f'<p class="mark">Concurrency {level.concurrency}: {escape(mark)}.</p>'
        for error, count in level.errors.items():
            yield f'<p class="mark">Concurrency {level.concurrency}: {count} x {escape(error)}</p>'


def _facts(run: Run) -> dict[str, str]:
    server, machine = run.server, run.machine
    where = "server and client" if machine.get("local") else "client; the server is elsewhere"
    return {
        "started": run.started,
        "server": f"{server.engine or 'unknown engine'} {server.version}, model {server.model}"
        + ("" if server.limit is None else f", at most {server.limit:,} tokens"),
        **({"server's settings": _listed(server.settings)} if server.settings else {}),
        "bench": _listed(run.options),
        "machine": f"{_listed({k: v for k, v in machine.items() if k != 'local'})} ({where})",
        "dsv4-plugin": _listed(run.code),
    }


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in values.items()
        if value not in (None, "", [])
    )


def _numbers(run: Run) -> Iterator[str]:
    yield '<div class="wide"><table><tr><th>concurrency</th>'
    yield "".join(f"<th>{level.concurrency}{' *' * bool(level.marks)}</th>" for level in run.levels)
    yield "</tr>"
    for measure in MEASURES:
        if any(measure.of(level) is not None for level in run.levels):
            cells = "".join(f"<td>{measure.shown(level)}</td>" for level in run.levels)
            yield f"<tr><td>{escape(measure.name)}</td>{cells}</tr>"
    yield "</table></div>"
