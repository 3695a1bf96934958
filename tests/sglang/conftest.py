"""SGLang's tests run where SGLang is installed; without torchvision, with a stand-in for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.paths import STUBS

collect_ignore_glob = [] if find_spec("sglang") else ["test_*.py"]
if find_spec("sglang") and not find_spec("torchvision"):
    sys.path.insert(0, str(STUBS))


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
