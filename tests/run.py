"""Runs the tests in parts, as many at once as there are cores.

    python -m tests.run              the short set (`make test`)
    python -m tests.run --all        everything (`make test-all`); a part that has passed on these
                                     very files is not run again, unless it is named
    python -m tests.run [--all] PART ...

A part is one process on one core: what its tests share (servers, engines, checkpoints, compiled
kernels) is made once. Its output is kept under `.cache/tests`; that of a part that fails is shown.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.paths import ROOT

KEPT = ROOT / ".cache" / "tests"
LIMIT = 5400
"""Seconds that a part may take."""
PATIENCE = 60
"""Seconds that a part has to end itself."""
EVERY = 30
"""Seconds between words on how far it is."""
SLOWEST = 10
SHOWN, WIDTH = 100, 200
"""Last lines that are shown of a failing part's output, and characters of a line."""
MEMORY = 4 << 30
"""Bytes that a part may take: so many run at once as fit."""


@dataclass(frozen=True)
class Part:
    """What runs in one process.

    Args:
        name: how it is asked for.
        command: for the shell, where {report} is the file that the plugin tests.report writes and
            {options} are pytest's for this set.
        environ: further variables of the process.
        long: left out of the short set.
    """

    name: str
    command: str
    environ: dict[str, str] = field(default_factory=dict)
    long: bool = False


def pytest(name: str, paths: str, engine: str = "vllm", long: bool = False, **environ: str) -> Part:
    python = f"exec .venv-{engine}/bin/python"
    command = f"{python} -m pytest -p tests.report --report={{report}} {{options}} {paths}"
    return Part(name, command, environ, long)


SERVERS = [f"tests/sglang/test_{name}.py" for name in ("device", "formats", "mini", "soak")]
"""Files of SGLang's whose tests have servers of their own; the others share one."""
ENGINES = [f"tests/triton/test_{name}.py" for name in ("vllm", "budgets")]
"""Files of emulated kernels that take as long as all others together."""
OLDEST = ".cache/triton-3.6.0"
"""The oldest Triton that kernels have to compile with, as they do in torch 2.11."""


def without(folder: str, files: Sequence[str]) -> str:
    return " ".join([folder, *(f"--ignore={path}" for path in files)])


PARTS = (
    # Those that take longest first; the others fill the cores beside them.
    pytest("sglang", without("tests/sglang", SERVERS), "sglang"),
    pytest("emulated", without("tests/triton", ENGINES), DSV4_TEST_GPU="sm80"),
    pytest("emulated-engine", " ".join(ENGINES), DSV4_TEST_GPU="sm80"),
    pytest("vllm", "tests/vllm tests/parallel"),
    pytest("vllm-v2", "tests/vllm_v2"),
    pytest("mutants", "tests/mutants"),
    pytest("vllm-chat", "tests/vllm_chat"),
    pytest("core", "tests/core"),
    pytest("chat", "tests/chat"),
    pytest("interpreted", "tests/triton", TRITON_INTERPRET="1"),
    pytest("mini", "tests/mini"),
    Part("lint", "make --no-print-directory lint"),
    pytest("emulated-others", "tests/triton", long=True, DSV4_TEST_GPU="sm120,sm86,sm89,sm90"),
    Part(
        "emulated-oldest",
        f"make --no-print-directory {OLDEST} && "
        + pytest("", without("tests/triton", ENGINES)).command,
        {"DSV4_TEST_GPU": "sm80,sm90", "PYTHONPATH": str(ROOT / OLDEST)},
        long=True,
    ),
    pytest("sglang-servers", " ".join(SERVERS), "sglang", long=True),
    Part(
        "vllm-0.33",
        f".venv-vllm/bin/python -m tests.vllm033.get && {pytest('', 'tests/vllm033').command}",
        long=True,
    ),
    Part("fuzz", ".venv-vllm/bin/python -m tests.chat.fuzz --cases 100000", long=True),
)


@dataclass
class Result:
    """What came of a part: tests by outcome, and (seconds, name) of the slowest."""

    code: int
    seconds: float
    outcomes: dict[str, int]
    slowest: list[tuple[float, str]]

    @property
    def words(self) -> str:
        counts = [f"{n:,} {outcome}" for outcome, n in sorted(self.outcomes.items())]
        return ", ".join(counts + [f"exit code {self.code}"] * (self.code != 0)) or "passed"


class Running:
    """The process of a part, and what it has said so far."""

    def __init__(self, part: Part, folder: Path, options: str) -> None:
        self.part, self.start = part, time.monotonic()
        self.log, self.report = folder / f"{part.name}.log", folder / f"{part.name}.tests"
        self.report.unlink(missing_ok=True)
        command = part.command.format(report=self.report, options=options)
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                command,
                shell=True,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | part.environ,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def ended(self) -> bool:
        if self.seconds > LIMIT:
            self.stop()
        return self.process.poll() is not None

    def stop(self) -> None:
        """With time for tests to end their servers, which have process groups of their own."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(PATIENCE)

    def _lines(self) -> list[dict[str, Any]]:
        if not self.report.exists():
            return []
        return [json.loads(line) for line in self.report.read_text().splitlines()]

    def far(self) -> str:
        """'core 120/332'."""
        total, *done = self._lines() or [{"total": "?"}]
        return f"{self.part.name} {len(done)}/{total['total']}"

    def result(self) -> Result:
        done = [(line["seconds"], line["test"], line["outcome"]) for line in self._lines()[1:]]
        return Result(
            self.process.returncode,
            self.seconds,
            dict(Counter(outcome for _, _, outcome in done)),
            sorted(((s, f"{name} ({self.part.name})") for s, name, _ in done), reverse=True)[
                :SLOWEST
            ],
        )


def slots() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(len(os.sched_getaffinity(0)), memory // MEMORY))


def files_hash() -> str:
    """Of all files that git knows or would take up, as they are."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    digest = hashlib.sha256()
    for name in sorted(set(names.split("\0"))):
        path = ROOT / name
        digest.update(name.encode() + b"\0" + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


class Run:
    """Runs parts and prints what becomes of them.

    Args:
        long: the long set, whose parts keep what they gave, with the hash of the files they ran on.
    """

    def __init__(self, long: bool) -> None:
        self.long, self.start, self.files = long, time.monotonic(), files_hash() if long else ""
        self.folder = KEPT / ("all" if long else "short")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Result] = {}

    def say(self, text: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.start), 60)
        print(f"{minutes:3d}:{seconds:02d}  {text}", flush=True)

    def unknown(self, parts: Sequence[Part]) -> list[Part]:
        """Those that have not passed on these files."""
        left = []
        for part in parts:
            path = self.folder / f"{part.name}.passed"
            files, words = path.read_text().split("\n") if path.exists() else ("", "")
            if files == self.files:
                self.say(f"{part.name}: {words} (earlier, on the same files)")
            else:
                left.append(part)
        return left

    def run(self, waiting: list[Part]) -> None:
        running: list[Running] = []
        said = time.monotonic()
        try:
            while waiting or running:
                while waiting and len(running) < slots():
                    options = "--thorough" if self.long else ""
                    running.append(Running(waiting.pop(0), self.folder, options))
                time.sleep(0.5)
                for one in [r for r in running if r.ended()]:
                    running.remove(one)
                    self._ended(one)
                if running and time.monotonic() - said > EVERY:
                    said = time.monotonic()
                    self.say("  ".join(["...", *(r.far() for r in running)]))
        finally:
            for one in running:
                one.stop()

    def _ended(self, one: Running) -> None:
        found = self.results[one.part.name] = one.result()
        words = f"{found.words} in {found.seconds:.0f} s"
        if found.code:
            lines = one.log.read_text(errors="replace").splitlines()[-SHOWN:]
            shown = [line[:WIDTH] for line in lines]
            print("\n".join(["", f"--- {one.log.relative_to(ROOT)}", *shown, ""]), flush=True)
        elif self.long and files_hash() == self.files:
            (self.folder / f"{one.part.name}.passed").write_text(f"{self.files}\n{words}")
        self.say(f"{one.part.name}: {words}")

    def summary(self) -> int:
        """Print the slowest tests and the verdict. Returns the exit code."""
        slowest = sorted((s for r in self.results.values() for s in r.slowest), reverse=True)
        print("\nThe slowest tests, in seconds:")
        print("\n".join(f"{seconds:7.1f}  {name}" for seconds, name in slowest[:SLOWEST]))
        failed = [name for name, r in self.results.items() if r.code]
        minutes, seconds = divmod(round(time.monotonic() - self.start), 60)
        verdict = f"FAILED: {', '.join(failed)}" if failed else "All passed"
        print(f"\n{verdict}; {minutes} min {seconds} s, {slots()} parts at once")
        return int(bool(failed))


def main() -> int:
    names = {part.name: part for part in PARTS}
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("part", nargs="*", choices=[*names, []], help=", ".join(names))
    parser.add_argument("--all", action="store_true", help="everything, not the short set")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    run = Run(args.all)
    chosen = [names[name] for name in args.part] or [p for p in PARTS if args.all or not p.long]
    run.run(run.unknown(chosen) if args.all and not args.part else chosen)
    return run.summary()


if __name__ == "__main__":
    sys.exit(main())
