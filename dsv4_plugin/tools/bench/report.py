"""A run as JSON, runs as a page, two runs as ratios."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args, get_type_hints

from dsv4_plugin.json_file import read_object
from dsv4_plugin.tools.bench.measures import Level, Spread
from dsv4_plugin.tools.bench.server import Counted, Facts

FORMAT = 1
"""Of the JSON; another one is refused."""
LABEL = re.compile(r"[\w][\w .+=-]{0,63}")
"""Labels are names of files too."""


@dataclass(frozen=True)
class Run:
    """Everything that is kept of a run.

    Args:
        label: names it on the page.
        started: local time, ISO 8601.
        options: of `dsv4 bench`: dataset, sizes, seed, and the note of who ran it.
        server: what it tells of itself.
        machine: the client's; the server's too where `local`.
        code: version and git revision of this package.
        levels: those that were measured, by concurrency.
        ended: None where all levels were; otherwise why not.
    """

    label: str
    started: str
    options: dict[str, Any]
    server: Facts
    machine: dict[str, Any]
    code: dict[str, str | None]
    levels: tuple[Level, ...] = ()
    ended: str | None = None

    def save(self, folder: Path) -> Path:
        """Write it to FOLDER/LABEL.json, whole or not at all."""
        path = path_of(folder, self.label)
        new = path.with_suffix(".new")
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False)
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Raises ValueError where the file is no run, and OSError as reading a file does."""
        found = read_object(path)
        if found.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is no run of `dsv4 bench` (format {FORMAT})")
        try:
            levels = tuple(_level(level) for level in found.pop("levels"))
            return cls(server=Facts(**found.pop("server")), levels=levels, **found)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no run of `dsv4 bench`: {error}") from None


def _level(found: dict[str, Any]) -> Level:
    spreads = [name for name, kind in get_type_hints(Level).items() if Spread in get_args(kind)]
    parts = {name: Spread(**found[name]) if found[name] else None for name in spreads}
    return Level(**{**found, **parts, "counted": Counted(**found["counted"])})


def path_of(folder: Path, label: str) -> Path:
    return folder / f"{label}.json"


def runs_in(folder: Path) -> list[Run]:
    """All runs of a folder, the oldest first."""
    return sorted((Run.load(path) for path in folder.glob("*.json")), key=lambda r: r.started)


def machine(local: bool) -> dict[str, Any]:
    """This machine; `local`: the server runs on it too."""
    return {
        "local": local,
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "gpus": _gpus(),
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def _gpus() -> list[str]:
    """As the driver lists them, without asking the devices."""
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    names = (re.search(r"^Model:\s*(.*)$", file.read_text(), re.MULTILINE) for file in files)
    return [name[1] for name in names if name]


def code() -> dict[str, str | None]:
    """This package's version, and the git revision of the checkout that it runs from, if any."""
    root = Path(__file__).resolve().parents[3]
    revision = None
    if (root / ".git").exists():
        try:
            done = subprocess.run(
                ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
        except FileNotFoundError:  # a checkout without git
            return {"version": version("dsv4-plugin"), "revision": None}
        revision = done.stdout.strip() or None
    return {"version": version("dsv4-plugin"), "revision": revision}


@dataclass(frozen=True)
class Measure:
    """A number of a level under the name that tables give it."""

    name: str
    digits: int
    path: tuple[str, ...]
    scale: float = 1.0

    def of(self, level: Level) -> float | None:
        """The number in the unit of its name; None where the level has none."""
        value: Any = level
        for step in self.path:
            value = None if value is None else getattr(value, step)
        return None if value is None else float(value) * self.scale

    def shown(self, level: Level) -> str:
        value = self.of(level)
        return "-" if value is None else f"{value:,.{self.digits}f}"


MEASURES = (
    Measure("output tokens/s", 1, ("output_rate",)),
    Measure("total tokens/s", 1, ("total_rate",)),
    *(
        Measure(f"{name.upper()} {point} ms", 1, (name, point), 1000)
        for name in ("ttft", "itl", "tpot", "e2e")
        for point in ("mean", "p50", "p95", "p99")
    ),
    Measure("prefix hits %", 1, ("counted", "hit_rate"), 100),
    Measure("preemptions", 0, ("counted", "preemptions")),
    Measure("drafts kept %", 1, ("counted", "acceptance"), 100),
    Measure("completed", 0, ("completed",)),
    Measure("failed", 0, ("failed",)),
    Measure("not sent", 0, ("unsent",)),
    Measure("prompt tokens", 0, ("prompt_tokens",)),
    Measure("output tokens", 0, ("output_tokens",)),
    Measure("seconds", 1, ("seconds",)),
    Measure("client CPU %", 0, ("cpu",), 100),
    Measure("loop lag p95 ms", 1, ("lag",), 1000),
)
"""In the order of tables."""
SHORT = (
    "output tokens/s", "total tokens/s", "TTFT p50 ms", "TTFT p99 ms", "ITL p50 ms", "ITL p99 ms",
    "TPOT p50 ms", "E2E p50 ms", "prefix hits %", "failed",
)  # fmt: skip
"""Those that a terminal has room for."""


def measures(names: Sequence[str]) -> list[Measure]:
    known = {measure.name: measure for measure in MEASURES}
    return [known[name] for name in names]


def heading() -> str:
    """The first line of the terminal's table."""
    return "concurrency" + "".join(f"{name:>{_width(name)}}" for name in SHORT)


def row(level: Level) -> Iterator[str]:
    """A level in the terminal: its numbers, then its marks and errors."""
    cells = (f"{m.shown(level):>{_width(m.name)}}" for m in measures(SHORT))
    yield f"{level.concurrency:>11}" + "".join(cells)
    yield from (f"{'':11}  ! {mark}" for mark in level.marks)
    yield from (f"{'':11}  ! {count} x {error}" for error, count in level.errors.items())


def _width(name: str) -> int:
    return max(len(name), 6) + 2


def compare(a: Run, b: Run) -> Iterator[str]:
    """Two runs side by side, with B / A. Raises ValueError where no level is in both."""
    ours, theirs = ({level.concurrency: level for level in run.levels} for run in (a, b))
    both = sorted(ours.keys() & theirs.keys())
    if not both:
        raise ValueError(f"{a.label} and {b.label} have no concurrency in common")
    yield from differences(a, b)
    width = max(len(a.label), len(b.label), 12) + 2
    name = f"{b.label} / {a.label}"
    yield f"{'':22}{a.label:>{width}}{b.label:>{width}}  {name}"
    for concurrency in both:
        first, second = ours[concurrency], theirs[concurrency]
        yield f"concurrency {concurrency}"
        for m in MEASURES:
            x, y = m.of(first), m.of(second)
            if x is None and y is None:
                continue
            ratio = f"{y / x:.2f}" if x and y is not None else "-"
            yield (
                f"  {m.name:20}{m.shown(first):>{width}}{m.shown(second):>{width}}"
                f"{ratio:>{len(name) + 2}}"
            )
        for run, level in ((a, first), (b, second)):
            yield from (f"  ! {run.label}: {mark}" for mark in level.marks)
    for run in (a, b):
        missing = sorted({level.concurrency for level in run.levels} - set(both))
        if missing:
            yield f"only in {run.label}: concurrency {', '.join(map(str, missing))}"


def differences(a: Run, b: Run) -> Iterator[str]:
    """What was not the same in two runs, but for the seed and the note."""
    sides = [
        {**r.options, "model": r.server.model, "machine": r.machine, "revision": r.code}
        for r in (a, b)
    ]
    for name in sides[0] | sides[1]:
        x, y = (side.get(name) for side in sides)
        if x != y and name not in ("seed", "note", "concurrency"):
            yield f"! they differ in {name}: {_words(x)} and {_words(y)}"


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items() if v not in (None, [], ""))
    return str(value)
