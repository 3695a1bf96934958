"""Cut outputs through the Responses API with the `openai` client and /v1/messages with the
`anthropic` client. They are scripted, to be cut where it hurts; test_mini.py has whole ones."""

from __future__ import annotations

from dsv4_plugin.chat import parse
from tests.vllm_chat import outputs
from tests.vllm_chat.server import MODEL, scripted

CLAUDES = [
    {
        "name": tool["function"]["name"],
        "description": tool["function"]["description"],
        "input_schema": tool["function"]["parameters"],
    }
    for tool in outputs.TOOLS
]
CALL = parse(outputs.ONE_CALL, True, outputs.TOOLS)


def test_a_response_cut_by_max_tokens(openai, words):
    answer = openai.responses.create(
        model=MODEL, input="q", max_output_tokens=6, extra_body=scripted(words(outputs.PLAIN))
    )
    assert answer.status == "incomplete"
    assert outputs.PLAIN.startswith(answer.output[0].content[0].text)


def test_a_streamed_message_cut_inside_a_call(anthropic, words):
    ids = words(outputs.ONE_CALL)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "q"}], "tools": CLAUDES}
    body |= {"max_tokens": len(ids) - 20, "extra_body": scripted(ids)}
    events = list(anthropic.messages.create(**body, stream=True))
    pieces = [
        e.delta.partial_json for e in events if hasattr(getattr(e, "delta", 0), "partial_json")
    ]
    assert CALL.tool_calls[0].arguments.startswith("".join(pieces))
    assert len("".join(pieces)) > 10
    (stop,) = [e.delta.stop_reason for e in events if e.type == "message_delta"]
    assert stop == "max_tokens"
