"""A client that leaves in mid-stream; the server's log is checked when it ends. The output is
scripted, to be long enough for that."""

from __future__ import annotations

import time

from tests.vllm_chat import outputs
from tests.vllm_chat.server import MODEL, scripted

QUESTION = [{"role": "user", "content": "q"}]


def settled(server):
    """Wait until nothing runs and no block is in use."""
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        busy = server.metric("vllm:num_requests_running") + server.metric(
            "vllm:kv_cache_usage_perc"
        )
        if busy == 0:
            return True
        time.sleep(0.2)
    return False


def test_a_client_that_leaves_in_mid_stream(server, openai, words):
    stream = openai.chat.completions.create(
        model=MODEL, messages=QUESTION, stream=True, max_tokens=3000, tools=outputs.TOOLS,
        extra_body={"ignore_eos": True} | scripted(words(outputs.ONE_CALL * 20, end=False)),
    )  # fmt: skip
    for _, _ in zip(range(30), stream, strict=False):
        pass
    assert server.metric("vllm:num_requests_running") == 1
    stream.close()
    assert settled(server)
