"""The Responses API with the `openai` client, /v1/messages with the `anthropic` client."""

from __future__ import annotations

import json

import pytest

from dsv4_plugin.chat import parse
from tests.vllm_chat import outputs
from tests.vllm_chat.server import MODEL, scripted

FLAT = [{"type": "function", **tool["function"]} for tool in outputs.TOOLS]
CLAUDES = [
    {
        "name": tool["function"]["name"],
        "description": tool["function"]["description"],
        "input_schema": tool["function"]["parameters"],
    }
    for tool in outputs.TOOLS
]
CALL = parse(outputs.ONE_CALL, True, outputs.TOOLS)


def respond(openai, ids, history, stream):
    body = {"model": MODEL, "input": history, "tools": FLAT, "max_output_tokens": 200}
    if not stream:
        return openai.responses.create(**body, extra_body=scripted(ids))
    events = list(openai.responses.create(**body, stream=True, extra_body=scripted(ids)))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events[-1].response


@pytest.mark.parametrize("stream", [False, True])
def test_responses_two_steps(openai, words, stream):
    history = [{"role": "user", "content": "q"}]
    ids = words(outputs.ONE_CALL)
    first = respond(openai, ids, history, stream)
    reasoning, message, call = first.output
    assert reasoning.content[0].text == CALL.reasoning
    assert message.content[0].text == CALL.content
    assert (call.name, call.arguments) == ("weather", CALL.tool_calls[0].arguments)
    assert first.usage.output_tokens_details.reasoning_tokens == ids.index(128822)
    history += [item.model_dump(exclude_none=True) for item in first.output]
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "sunny"})
    second = respond(openai, words(outputs.PLAIN), history, stream)
    assert second.status == "completed"
    assert second.output_text == parse(outputs.PLAIN).content


def test_a_response_cut_by_max_tokens(openai, words):
    answer = openai.responses.create(
        model=MODEL, input="q", max_output_tokens=6, extra_body=scripted(words(outputs.PLAIN))
    )
    assert answer.status == "incomplete"
    assert outputs.PLAIN.startswith(answer.output[0].content[0].text)


def message(anthropic, ids, history, stream):
    body = {"model": MODEL, "messages": history, "tools": CLAUDES, "max_tokens": 200}
    if not stream:
        return anthropic.messages.create(**body, extra_body=scripted(ids))
    with anthropic.messages.stream(**body, extra_body=scripted(ids)) as events:
        return events.get_final_message()


@pytest.mark.parametrize("stream", [False, True])
def test_messages_two_steps(anthropic, words, stream):
    history = [{"role": "user", "content": "q"}]
    first = message(anthropic, words(outputs.ONE_CALL), history, stream)
    assert first.stop_reason == "tool_use"
    thinking, text, call = first.content
    assert (thinking.thinking, text.text) == (CALL.reasoning, CALL.content)
    assert (call.name, call.input) == ("weather", json.loads(CALL.tool_calls[0].arguments))
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    history.append({"role": "assistant", "content": [b.model_dump() for b in first.content]})
    history.append({"role": "user", "content": [result, {"type": "text", "text": "and?"}]})
    second = message(anthropic, words(outputs.PLAIN), history, stream)
    assert second.stop_reason == "end_turn"
    assert second.content[-1].text == parse(outputs.PLAIN).content


def test_messages_without_thinking(anthropic, words):
    answer = anthropic.messages.create(
        model=MODEL, messages=[{"role": "user", "content": "q"}], max_tokens=9,
        thinking={"type": "disabled"}, extra_body=scripted(words("Yes.")),
    )  # fmt: skip
    assert [block.type for block in answer.content] == ["text"]
    assert answer.content[0].text == "Yes."


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
