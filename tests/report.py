"""A pytest plugin (`-p tests.report --report FILE`) that writes lines of JSON while tests run: how
many there are, then each test's name, outcome and seconds. SIGTERM ends the run as Ctrl-C does, and
fixtures end what they started."""

from __future__ import annotations

import json
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", type=Path, help="file for a line of JSON per test")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--report"):
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        config.pluginmanager.register(Report(config.getoption("--report")))


class Report:
    def __init__(self, path: Path) -> None:
        self.file = path.open("w", buffering=1)
        self.seconds: dict[str, float] = defaultdict(float)
        self.outcome: dict[str, str] = {}

    def write(self, **line: Any) -> None:
        self.file.write(json.dumps(line) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.write(total=len(session.items))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of a test's three phases the first that does not pass decides."""
        name = report.nodeid
        self.seconds[name] += report.duration
        if not report.passed or name not in self.outcome:
            self.outcome[name] = report.outcome
        if report.when == "teardown":
            self.write(test=name, outcome=self.outcome[name], seconds=self.seconds.pop(name))

    def pytest_unconfigure(self) -> None:
        self.file.close()
