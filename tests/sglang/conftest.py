"""SGLang's tests run where SGLang is installed; without torchvision, with a stand-in for it."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from lab.paths import STUBS

collect_ignore_glob = [] if find_spec("sglang") else ["test_*.py"]
if find_spec("sglang") and not find_spec("torchvision"):
    sys.path.insert(0, str(STUBS))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """One of the extensions that SGLang 0.5.23 imports without a GPU crashes (SIGSEGV) when Python
    takes itself apart, long after pytest has reported; so Python is left before it does."""
    if "sglang" in sys.modules:
        atexit.register(_leave, int(exitstatus))


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@pytest.fixture(scope="session")
def judge(tiny: Path):
    from .reference import Reference

    return Reference(tiny)


@pytest.fixture(scope="session")
def serve(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """serve(*options, **arguments of Server): a server of the tiny checkpoint."""
    from .server import Server

    def make(*options: str, **arguments):
        log = tmp_path_factory.mktemp("server") / "log"
        return Server(tiny, *options, log=log, **arguments)

    return make


@pytest.fixture(scope="session")
def roomy(serve):
    """A server with mixed chunks, overlap, parsers, and a pool poisoned with NaN."""
    from .server import FLOAT32, PARSERS

    options = ("--max-total-tokens=16384", "--max-running-requests=16", "--enable-mixed-chunk")
    options += ("--served-model-name=m", "--constrained-json-disable-any-whitespace")
    with serve(*FLOAT32, *options, *PARSERS) as server:
        yield server
