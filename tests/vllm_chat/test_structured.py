"""A random model, held to schemas and tool choices by vLLM's structured output: whatever it wants
to say, the grammar has to do the work. Its reasoning, or how a call begins, is scripted, so that
the grammar starts at once. test_mini.py has a model that knows what to say."""

from __future__ import annotations

import json

import pytest

from dsv4_plugin.chat import parse
from tests.vllm_chat import outputs
from tests.vllm_chat.server import MODEL, scripted

QUESTION = [{"role": "user", "content": "q"}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "dog"]}, "good": {"type": "boolean"}},
    "required": ["kind", "good"],
    "additionalProperties": False,
}
PICK = outputs.tool("pick", SCHEMA["properties"], schema={"required": ["kind", "good"]})
OTHER = outputs.tool("other", {"good": {"type": "boolean"}}, schema={"required": ["good"]})
TOOLS = [PICK, OTHER]
THOUGHT = "Hm.</think>"


def ask(openai, words, stream=False, extra=None, **more):
    """An answer that thinks as told, and then as the grammar lets it."""
    extra = scripted(words(THOUGHT, end=False)) | (extra or {})
    return openai.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        max_tokens=400,
        seed=1,
        extra_body=extra,
        stream=stream,
        **more,
    )


def check(call):
    arguments = json.loads(call.function.arguments)
    assert isinstance(arguments["good"], bool)
    if call.function.name == "pick":
        assert arguments["kind"] in ("cat", "dog")


def test_a_schema_after_the_reasoning(openai, words):
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    (choice,) = ask(openai, words, response_format=schema).choices
    assert (choice.message.reasoning, choice.finish_reason) == ("Hm.", "stop")
    assert json.loads(choice.message.content)["kind"] in ("cat", "dog")


@pytest.mark.thorough
def test_a_schema_where_reasoning_is_not_wanted_back(openai, words):
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
    extra = {"include_reasoning": False}
    (choice,) = ask(openai, words, extra=extra, response_format=schema).choices
    assert json.loads(choice.message.content)["kind"] in ("cat", "dog")


@pytest.mark.parametrize("parallel", [False, True])
def test_a_call_is_required(openai, words, parallel):
    more = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": parallel}
    (choice,) = ask(openai, words, **more).choices
    assert (choice.message.reasoning, choice.finish_reason) == ("Hm.", "tool_calls")
    assert parallel or len(choice.message.tool_calls) == 1
    for call in choice.message.tool_calls:
        check(call)


@pytest.mark.thorough
def test_a_required_call_where_reasoning_is_not_wanted_back(openai, words):
    more = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}
    (choice,) = ask(openai, words, extra={"include_reasoning": False}, **more).choices
    assert choice.finish_reason == "tool_calls"
    check(choice.message.tool_calls[0])


def test_one_call_at_most(openai, words):
    """The envelope of calls is constrained here, not their arguments."""
    more = {"tools": outputs.TOOLS, "parallel_tool_calls": False}
    extra = scripted(words(outputs.ONE_CALL))
    (choice,) = ask(openai, words, extra=extra, **more).choices
    assert choice.finish_reason == "tool_calls"
    wanted = parse(outputs.ONE_CALL, True, outputs.TOOLS)
    assert choice.message.content == wanted.content
    assert choice.message.tool_calls[0].function.arguments == wanted.tool_calls[0].arguments


def test_a_schema_of_a_response(openai, words):
    schema = {"type": "json_schema", "name": "s", "schema": SCHEMA}
    answer = openai.responses.create(
        model=MODEL,
        input="q",
        max_output_tokens=400,
        text={"format": schema},
        extra_body=scripted(words(THOUGHT, end=False)) | {"seed": 1},
    )
    assert json.loads(answer.output_text)["kind"] in ("cat", "dog")


@pytest.mark.parametrize("thinking", [True, False])
def test_a_named_call(openai, words, thinking):
    named = {"type": "function", "function": {"name": "pick"}}
    extra = {} if thinking else {"chat_template_kwargs": {"thinking": False}, "vllm_xargs": {}}
    more = {"tools": TOOLS, "tool_choice": named}
    (choice,) = ask(openai, words, extra=extra, **more).choices
    assert choice.finish_reason == "stop"
    (call,) = choice.message.tool_calls
    assert call.function.name == "pick"
    check(call)


def test_a_required_call_streamed(openai, words):
    stream = ask(openai, words, stream=True, tools=[PICK], tool_choice="required",
                 parallel_tool_calls=False)  # fmt: skip
    arguments = ""
    for chunk in stream:
        for call in chunk.choices[0].delta.tool_calls or ():
            arguments += call.function.arguments
    assert chunk.choices[0].finish_reason == "tool_calls"
    assert json.loads(arguments)["kind"] in ("cat", "dog")


def test_a_strict_tool_under_auto(openai, words):
    """Once the model begins a call, its arguments follow the schema."""
    tool = outputs.tool("pick", SCHEMA["properties"], schema={"required": ["kind"]}, strict=True)
    begun = '</think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="pick">\n'
    extra = scripted(words(begun, end=False))
    (choice,) = ask(openai, words, extra=extra, tools=[tool], parallel_tool_calls=False).choices
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert json.loads(call.function.arguments)["kind"] in ("cat", "dog")
