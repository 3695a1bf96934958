"""SGLang under load for ten minutes, and ended while requests wait."""

from __future__ import annotations

import time

import pytest

from lab.server import MODEL
from tests import soak

from .server import FLOAT32, PARSERS, Server

OPTIONS = (
    *FLOAT32, *PARSERS, "--max-total-tokens=8192", "--max-running-requests=12",
    f"--served-model-name={MODEL}",
)  # fmt: skip
"""A pool in which fewer streams fit than are open."""
DRAIN = 180
"""Seconds for all streams of `test_sigterm_drains`, one dozen after the other."""


@pytest.fixture
def small_server(mini, tmp_path, request):
    force = getattr(request, "param", "1")
    server = Server(
        mini, *OPTIONS, log=tmp_path / "server.log", environ={"SGL_FORCE_SHUTDOWN": force}
    )
    server.lifetime = request.config.getoption("--soak") + soak.LIFETIME
    with server as running:
        yield running


def sum_of(server: Server, *names: str) -> float:
    path = "/v1/loads?format=prometheus"
    return sum(server.metric(f"sglang_{name}", path) for name in names)


REQUESTS = ("num_running_reqs", "num_waiting_reqs", "queues_grammar")


@pytest.mark.thorough
def test_soak(small_server, request):
    def busy() -> float:
        return sum_of(small_server, *REQUESTS, "num_used_tokens")

    soak.soak(small_server, busy, request.config.getoption("--soak"))
    assert_ends(small_server)


@pytest.mark.thorough
def test_sigterm_while_requests_wait(small_server):
    assert_ends(small_server)


def assert_ends(server: Server) -> None:
    """Where SGLang is told not to drain, every stream hears that the server ends."""
    join = soak.occupy(server, lambda: sum_of(server, *REQUESTS), tokens=3000)
    assert sum_of(server, "num_waiting_reqs") > 0
    soak.terminate(server)
    assert join() == {"error": soak.STREAMS}


@pytest.mark.thorough
@pytest.mark.parametrize("small_server", ["0"], indirect=True)
def test_sigterm_drains(small_server):
    """SGLang's own way: what runs and what waits is answered, then the server ends."""
    join = soak.occupy(small_server, lambda: sum_of(small_server, *REQUESTS), tokens=200)
    assert sum_of(small_server, "num_waiting_reqs") > 0
    start = time.monotonic()
    soak.terminate(small_server, DRAIN)
    print(f"drained in {time.monotonic() - start:.0f} s")
    assert join() == {"length": soak.STREAMS}
