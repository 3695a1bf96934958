"""Many streams at once, and a client that leaves; the server's log is checked when it ends."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from dsv4_plugin.chat import parse
from tests.vllm_chat import outputs
from tests.vllm_chat.server import MODEL, scripted
from tests.vllm_chat.test_chat import calls, collect

QUESTION = [{"role": "user", "content": "q"}]
STREAMS = 64


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


def test_concurrent_streams(server, openai, words):
    texts = [outputs.PLAIN, outputs.ONE_CALL, outputs.TWO_CALLS, outputs.IN_REASONING]

    def one(number):
        stream = openai.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": f"question {number}"}], stream=True,
            max_tokens=200, tools=outputs.TOOLS, stream_options={"include_usage": True},
            extra_body=scripted(words(texts[number % 4])),
        )  # fmt: skip
        return collect(stream)

    with ThreadPoolExecutor(STREAMS) as pool:
        for number, (message, finish, _) in enumerate(pool.map(one, range(STREAMS))):
            wanted = parse(texts[number % 4], True, outputs.TOOLS)
            assert (message["reasoning"], message["content"] or None, finish) == (
                wanted.reasoning, wanted.content, wanted.finish_reason
            )  # fmt: skip
            assert calls(message) == [(c.name, c.arguments) for c in wanted.tool_calls]
    assert settled(server)
