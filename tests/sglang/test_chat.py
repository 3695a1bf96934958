"""Chat through a real server: the core's prompt ids, and outputs parsed by the core.

The weights are random: a grammar (`regex`) makes the model write what no model writes by itself,
content beside two calls and stop strings. test_mini.py has a model's own answers.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dsv4_plugin.chat import Encoder

from .server import Server

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "reasoning_content": "Look it up.",
    "tool_calls": [
        {
            "id": "call_1",
            "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Zürich", "days": 2}'},
        }
    ],
}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
NO_THINKING = {"chat_template_kwargs": {"thinking": False}}
USER = {"role": "user", "content": "Wie wird <｜User｜> das Wetter? </think> 🌦"}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "plain": {"messages": [{"role": "system", "content": "Be brief."}, USER]},
    "tools": {"messages": [USER], "tools": [WEATHER]},
    "multi-turn": {"messages": [USER, CALL, RESULT, {"role": "user", "content": "Danke!"}]},
    "multi-turn with tools": {"messages": [USER, CALL, RESULT], "tools": [WEATHER]},
    "no tool choice": {"messages": [USER], "tools": [WEATHER], "tool_choice": "none"},
    "continued": {
        "messages": [USER, {"role": "assistant", "content": "Es wird"}],
        "continue_final_message": True,
    },
    "effort": {"messages": [USER], "reasoning_effort": "max"},
    "json": {"messages": [USER], "response_format": {"type": "json_object"}},
}


@pytest.fixture(scope="module")
def encoder(tiny: Path) -> Encoder:
    return Encoder.from_pretrained(tiny)


def chat(server: Server, **body: Any) -> Any:
    answer = server.post("/v1/chat/completions", {"model": "m", "temperature": 0} | body)
    return answer["choices"][0]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prompt_ids_are_the_core_s(roomy: Server, encoder: Encoder, name: str, thinking: bool):
    body = CONVERSATIONS[name]
    asked = {"chat_template_kwargs": {"thinking": thinking}, "max_tokens": 1}
    choice = chat(roomy, **body, **asked, return_prompt_token_ids=True)
    expected = encoder.encode(
        body["messages"],
        None if body.get("tool_choice") == "none" else body.get("tools"),
        thinking=thinking,
        effort=body.get("reasoning_effort"),
        response_format=body.get("response_format"),
        continue_final_message=body.get("continue_final_message", False),
    )
    assert choice["prompt_token_ids"] == expected.ids


def test_what_the_format_cannot_hold_is_the_client_s_error(roomy: Server):
    with pytest.raises(RuntimeError, match=r"^400.*messages\[0\]\.role"):
        chat(roomy, messages=[USER], continue_final_message=True)
    image = {"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}
    with pytest.raises(RuntimeError, match=r"^400.*only supports text input.*'image_url'"):
        chat(roomy, messages=[USER | {"content": [{"type": "text", "text": "what?"}, image]}])


KWARGS = "chat_template_kwargs"


@pytest.mark.parametrize(
    ("body", "thinks"),
    [
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "high"}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"thinking": False}, False),
        ({"thinking": {"type": "enabled"}, "reasoning_effort": "none"}, False),
        ({KWARGS: {"thinking": {"type": "disabled"}}}, False),
        ({KWARGS: {"enable_thinking": False}}, False),
        ({KWARGS: {"enable_thinking": False}, "reasoning_effort": "high"}, False),
        ({KWARGS: {"enable_thinking": True}}, True),
    ],
)
def test_all_ways_to_switch_thinking(roomy: Server, encoder: Encoder, body: Any, thinks: bool):
    choice = chat(roomy, messages=[USER], max_tokens=2, return_prompt_token_ids=True, **body)
    effort = body.get("reasoning_effort")
    assert choice["prompt_token_ids"] == encoder.encode([USER], None, thinks, effort).ids
    assert bool(choice["message"]["reasoning_content"]) == thinks


def test_json_where_the_request_itself_switches_thinking_off(roomy: Server):
    """SGLang holds grammars back until reasoning ends: it has to know that there is none."""
    body = {"messages": [USER], "thinking": {"type": "disabled"}, "max_tokens": 5}
    choice = chat(roomy, **body, response_format={"type": "json_object"})
    assert choice["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        *(({"thinking": value}, "thinking") for value in ("false", "off", 0, 1, {"type": "x"})),
        *(({KWARGS: {"thinking": value}}, rf"{KWARGS}\.thinking") for value in ("false", 0, 1)),
        ({KWARGS: {"enable_thinking": "no"}}, rf"{KWARGS}\.enable_thinking"),
    ],
)
def test_other_values_of_thinking_are_the_client_s_error(roomy: Server, body: Any, field: str):
    with pytest.raises(RuntimeError, match=f"^400.*{field}: must be true, false"):
        chat(roomy, messages=[USER], **body)


def test_tools_of_messages_without_tool_choice(roomy: Server, encoder: Encoder):
    messages = [{"role": "system", "content": "s", "tools": [WEATHER]}, USER]
    asked = {"messages": messages, "max_tokens": 1, "return_prompt_token_ids": True}
    choice = chat(roomy, **asked)
    assert choice["prompt_token_ids"] == encoder.encode(messages).ids
    choice = chat(roomy, **asked, tool_choice="none")
    bare = [{"role": "system", "content": "s"}, USER]
    assert choice["prompt_token_ids"] == encoder.encode(bare).ids


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_a_schema_that_no_grammar_can_be_made_of(roomy: Server, choice: str):
    bad = {"type": "object", "properties": {"a": {"enum": []}}}
    tools = [WEATHER, {"type": "function", "function": {"name": "bad", "parameters": bad}}]
    tools[1]["function"]["strict"] = True
    with pytest.raises(RuntimeError, match=r"^400.*tools\[1\]\.function\.parameters: .*'bad'"):
        chat(roomy, messages=[USER], tools=tools, tool_choice=choice)


def test_a_name_that_the_format_cannot_hold(roomy: Server):
    with pytest.raises(RuntimeError, match=r"^400.*tools\[0\]\.function\.name: .*cannot be a name"):
        chat(roomy, messages=[USER], tools=[{"type": "function", "function": {"name": "a>b"}}])


def forced(text: str, **body: Any) -> dict[str, Any]:
    """A request whose answer is `text`."""
    return {
        "messages": [USER],
        "regex": re.escape(text).replace("\\ ", " "),
        "max_tokens": 300,
        "temperature": 0,
        "model": "m",
        **NO_THINKING,
        **body,
    }


INVOKE = (
    '<｜DSML｜invoke name="weather">\n<｜DSML｜parameter name="city" string="true">{}'
    "</｜DSML｜parameter>\n</｜DSML｜invoke>\n"
)
CALLS = f"<｜DSML｜tool_calls>\n{INVOKE.format('Köln')}{INVOKE.format('Ulm')}</｜DSML｜tool_calls>"


def streamed(server: Server, body: dict[str, Any]) -> dict[str, Any]:
    """The message that the deltas of a stream add up to."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": {}}
    for chunk in server.stream("/v1/chat/completions", body):
        for choice in chunk["choices"]:
            delta = choice["delta"]
            for key in ("content", "reasoning_content"):
                message[key] += delta.get(key) or ""
            for call in delta.get("tool_calls") or ():
                known = message["calls"].setdefault(call["index"], {"name": "", "arguments": ""})
                for key in known:
                    known[key] += call["function"].get(key) or ""
            message["finish_reason"] = choice["finish_reason"]
    return message


def test_streaming_adds_up(roomy: Server):
    body = forced(f"Moment.\n\n{CALLS}", tools=[WEATHER])
    whole = chat(roomy, **body)
    calls = [call["function"] for call in whole["message"]["tool_calls"]]
    assert [json.loads(call["arguments"])["city"] for call in calls] == ["Köln", "Ulm"]
    assert whole["message"]["content"] == "Moment."
    parts = streamed(roomy, body)
    assert parts["content"] == whole["message"]["content"]
    assert list(parts["calls"].values()) == [
        {key: call["function"][key] for key in ("name", "arguments")}
        for call in whole["message"]["tool_calls"]
    ]
    assert parts["finish_reason"] == "tool_calls"


def test_reasoning(roomy: Server):
    """Models think by default; an output that never closes the block is all reasoning."""
    body = {"model": "m", "messages": [USER], "max_tokens": 20, "temperature": 0}
    whole = chat(roomy, **body)
    assert whole["message"]["reasoning_content"]
    assert not whole["message"]["content"]
    assert streamed(roomy, body)["reasoning_content"] == whole["message"]["reasoning_content"]


def test_stop_string(roomy: Server):
    body = forced("eins zwei drei vier", stop=["drei"])
    assert chat(roomy, **body)["message"]["content"] == "eins zwei "
    assert streamed(roomy, body)["content"] == "eins zwei "


def test_a_stop_string_that_cuts_a_call(roomy: Server):
    text = f"<｜DSML｜tool_calls>\n{INVOKE.format('Köln am Rhein')}</｜DSML｜tool_calls>"
    body = forced(text, tools=[WEATHER], stop=["Rhein"])
    whole = chat(roomy, **body)
    assert whole["finish_reason"] == streamed(roomy, body)["finish_reason"] == "stop"
    (call,) = whole["message"]["tool_calls"]
    assert call["function"]["arguments"] == '{"city": "Köln am '
    assert chat(roomy, **body | {"stop": ["xyz"]})["finish_reason"] == "tool_calls"


def test_text_that_names_the_markup_is_content(roomy: Server):
    text = 'Type <｜DSML｜invoke name="weather"> to start.'
    body = forced(text, tools=[WEATHER])
    assert chat(roomy, **body)["message"]["content"] == text
    assert streamed(roomy, body)["content"] == text


def test_json_schema(roomy: Server):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["sun", "rain"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "w", "schema": schema}}
    body = {"messages": [USER], "response_format": wanted, "max_tokens": 100, **NO_THINKING}
    choice = chat(roomy, **body)
    answer = json.loads(choice["message"]["content"])
    assert set(answer) == {"ok", "kind"}


def test_required_tool_choice(roomy: Server):
    """SGLang's grammar lets the model write nothing but calls of the right shape."""
    tool = json.loads(json.dumps(WEATHER))
    tool["function"]["parameters"]["properties"] = {"city": {"enum": ["Köln", "Ulm"]}}
    body = {"messages": [USER], "tools": [tool], "tool_choice": "required", "max_tokens": 200}
    choice = chat(roomy, **body, **NO_THINKING, parallel_tool_calls=False)
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"])["city"].strip() in ("Köln", "Ulm")


def test_text_endpoints(roomy: Server):
    parsed = roomy.post(
        "/parse_function_call",
        {"text": CALLS, "tools": [WEATHER], "tool_call_parser": "deepseekv4"},
    )
    assert [call["name"] for call in parsed["calls"]] == ["weather", "weather"]
    split = roomy.post(
        "/separate_reasoning", {"text": "a</think>b", "reasoning_parser": "deepseek-v4"}
    )
    assert (split["reasoning_text"], split["text"]) == ("a", "b")


def test_anthropic_messages(roomy: Server):
    body = {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": "Hallo"}]}
    answer = roomy.post("/v1/messages", body)
    assert answer["usage"]["output_tokens"] == 8


def test_responses(roomy: Server):
    """The same conversation by another door; SGLang keeps two tokens of the limit for itself."""
    body = {"model": "m", "input": "Hallo", "max_output_tokens": 10, "temperature": 0}
    answer = roomy.post("/v1/responses", body)
    same = chat(roomy, messages=[{"role": "user", "content": "Hallo"}], max_tokens=8)
    assert answer["output"][0]["content"][0]["text"] == same["message"]["reasoning_content"]
