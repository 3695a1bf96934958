"""vLLM under load for ten minutes, and ended while requests wait."""

from __future__ import annotations

import pytest

from tests import soak
from tests.vllm_chat.server import FLAGS, Server

SMALL = f"{FLAGS} --max-num-seqs 12 --num-gpu-blocks-override 100"
"""A pool in which fewer streams fit than are open, and for some of which others make room."""


@pytest.fixture
def small_server(mini, tmp_path, request):
    server = Server(mini, tmp_path / "server.log", SMALL)
    server.lifetime = request.config.getoption("--soak") + soak.LIFETIME
    with server as running:
        yield running


def requests(server: Server) -> float:
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    return sum(map(server.metric, names))


@pytest.mark.thorough
def test_soak(small_server, request):
    def busy() -> float:
        return requests(small_server) + small_server.metric("vllm:kv_cache_usage_perc")

    soak.soak(small_server, busy, request.config.getoption("--soak"))
    assert small_server.metric("vllm:num_preemptions_total") > 0
    assert_ends(small_server)


@pytest.mark.thorough
def test_sigterm_while_requests_wait(small_server):
    assert_ends(small_server)


def assert_ends(server: Server) -> None:
    """Every stream hears that the engine is gone."""
    join = soak.occupy(server, lambda: requests(server), tokens=3000)
    assert server.metric("vllm:num_requests_waiting") > 0
    soak.terminate(server)
    assert join() == {"error": soak.STREAMS}
