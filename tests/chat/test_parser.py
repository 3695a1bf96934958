"""What the parser makes of well-formed outputs and of every slip seen in the field."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dsv4_plugin.chat import (
    ArgumentsDelta,
    ContentDelta,
    Finish,
    Message,
    ReasoningDelta,
    StreamParser,
    ToolCall,
    ToolCallEnd,
    ToolCallStart,
    parse,
)
from dsv4_plugin.chat.lexer import MAX_TAG
from dsv4_plugin.chat.tokens import DSML, EOS

from . import laws
from .data import TOOLS, tool


def parameter(value: str, name: str = "x", attributes: str = ' string="true"') -> str:
    return f'<{DSML}parameter name="{name}"{attributes}>{value}</{DSML}parameter>'


def invoke(body: str, name: str = "f") -> str:
    return f'<{DSML}invoke name="{name}">\n{body}\n</{DSML}invoke>'


def block(*calls: str, name: str = "tool_calls") -> str:
    return f"\n\n<{DSML}{name}>\n" + "\n".join(calls) + f"\n</{DSML}{name}>"


CALL = invoke(parameter("v"))
V = ("f", {"x": "v"})

SLIPS: dict[str, tuple[str, str | None, str | None, list[tuple[str, Any]]]] = {
    # what it is: (the output, its reasoning, its content, its calls)
    "well-formed": ("r</think>c" + block(CALL), "r", "c", [V]),
    "parallel calls": ("r</think>c" + block(CALL, CALL), "r", "c", [V, V]),
    "no parameters": ("</think>" + block(invoke("")), None, None, [("f", {})]),
    "call inside the reasoning": ("r" + block(CALL), "r", None, [V]),
    "call inside the reasoning, then its end": ("r" + block(CALL) + "\n</think>\n", "r", None, [V]),
    "no wrapper": ("r</think>c\n\n" + CALL, "r", "c", [V]),
    "no wrapper, only its end": (f"</think>c\n{CALL}\n</{DSML}tool_calls>", None, "c", [V]),
    "V3.2's wrapper": ("r</think>c" + block(CALL, name="function_calls"), "r", "c", [V]),
    "toolcalls": ("r</think>c" + block(CALL, name="toolcalls"), "r", "c", [V]),
    "tool": ("r</think>c" + block(CALL, name="tool"), "r", "c", [V]),
    "no newlines": (f"</think>c{block(CALL)}".replace("\n", ""), None, "c", [V]),
    "no string attribute": ("</think>" + block(invoke(parameter("v", "x", ""))), None, None, [V]),
    "no string attribute, a number for text": (
        "</think>" + block(invoke(parameter("12", "x", ""))),
        *(None, None, [("f", {"x": "12"})]),
    ),
    "no string attribute, a number": (
        "</think>" + block(invoke(parameter("12", "n", ""))),
        *(None, None, [("f", {"n": 12})]),
    ),
    "no string attribute, no schema": (
        "</think>" + block(invoke(parameter("[1]", "q", "") + parameter("[1", "p", ""))),
        *(None, None, [("f", {"q": [1], "p": "[1"})]),
    ),
    "no string attribute, number or null": (
        "</think>" + block(invoke(parameter("null", "days", ""), "get_weather")),
        *(None, None, [("get_weather", {"days": None})]),
    ),
    "single quotes": (
        "</think>" + block(invoke(parameter("v", "x", " string='true'"))),
        None,
        None,
        [V],
    ),
    "no quotes": ("</think>" + block(invoke(parameter("v", "x", " string=true"))), None, None, [V]),
    "quote left out": (
        "</think>" + block(invoke(parameter("v")).replace('name="f"', 'name="f')),
        *(None, None, [V]),
    ),
    "extra attributes": (
        "</think>" + block(invoke(parameter("v", "x", ' type="a>b" string="true" z'))),
        *(None, None, [V]),
    ),
    "JSON body": (
        "</think>" + block(invoke('{"x": "v", "n": 1}')),
        None,
        None,
        [("f", {"x": "v", "n": 1})],
    ),
    "JSON body, wrapped": (
        "</think>" + block(invoke('{"arguments": {"x": "v"}}')),
        None,
        None,
        [V],
    ),
    "wrapped in arguments": (
        "</think>" + block(invoke(parameter('{"x": "v"}', "arguments", ' string="false"'))),
        *(None, None, [V]),
    ),
    "wrapped in input, as text": (
        "</think>" + block(invoke(parameter('{"x": "v"}', "input"))),
        *(None, None, [V]),
    ),
    "wrapped, but not alone": (
        "</think>" + block(invoke(parameter('{"x": "v"}', "input") + parameter("1", "n", ""))),
        *(None, None, [("f", {"input": '{"x": "v"}', "n": 1})]),
    ),
    "wrapped, but not declared": (
        "</think>" + block(invoke(parameter('{"q": 1}', "input", ' string="false"'))),
        *(None, None, [("f", {"input": {"q": 1}})]),
    ),
    "duplicate parameters": (
        "</think>" + block(invoke(parameter("u") + "\n" + parameter("v"))),
        *(None, None, [V]),
    ),
    "NaN": (
        "</think>" + block(invoke(parameter("NaN", "n", ' string="false"'))),
        *(None, None, [("f", {"n": "NaN"})]),
    ),
    "Infinity in a list": (
        "</think>" + block(invoke(parameter("[-Infinity]", "o", ' string="false"'))),
        *(None, None, [("f", {"o": "[-Infinity]"})]),
    ),
    "too deep for a JSON reader": (
        "</think>" + block(invoke(parameter("[" * 10**5, "o", ' string="false"'))),
        *(None, None, [("f", {"o": "[" * 10**5})]),
    ),
    "text for JSON": (
        "</think>" + block(invoke(parameter("{a", "o", ' string="false"'))),
        *(None, None, [("f", {"o": "{a"})]),
    ),
    "</invoke> in a value": (
        "</think>" + block(invoke(parameter(f"a</{DSML}invoke>b"))),
        *(None, None, [("f", {"x": f"a</{DSML}invoke>b"})]),
    ),
    "</parameter> in a value": (
        "</think>" + block(invoke(parameter(f"a</{DSML}parameter> b"))),
        *(None, None, [("f", {"x": f"a</{DSML}parameter> b"})]),
    ),
    "</tool_calls> in a value": (
        "</think>" + block(invoke(parameter(f"a\n</{DSML}tool_calls>\nb"))),
        *(None, None, [("f", {"x": f"a\n</{DSML}tool_calls>\nb"})]),
    ),
    "think and a parameter in a value": (
        "</think>" + block(invoke(parameter(f'<think><{DSML}parameter name="q">'))),
        *(None, None, [("f", {"x": f'<think><{DSML}parameter name="q">'})]),
    ),
    "</parameter> left out": (
        "</think>"
        + block(invoke(f'<{DSML}parameter name="x" string="true">v' + parameter("1", "n", ""))),
        *(None, None, [("f", {"x": "v", "n": 1})]),
    ),
    "</parameter> and </invoke> left out": (
        f'</think><{DSML}invoke name="f"><{DSML}parameter name="x" string="true">'
        f"v</{DSML}tool_calls>",
        *(None, None, [V]),
    ),
    "</invoke> left out": (
        f'</think><{DSML}invoke name="f">{parameter("v")}<{DSML}invoke name="f">{parameter("v")}',
        *(None, None, [V, V]),
    ),
    "block quoted in prose": (
        f"</think>Write `<{DSML}tool_calls>` and `</{DSML}tool_calls>`.",
        *(None, f"Write `<{DSML}tool_calls>` and `</{DSML}tool_calls>`.", []),
    ),
    "call quoted in prose": (
        f'</think>Write `<{DSML}invoke name="f">` first.',
        *(None, f'Write `<{DSML}invoke name="f">` first.', []),
    ),
    "DSML in the reasoning": (
        f"use {DSML} or <{DSML}tool>?</think>c",
        f"use {DSML} or <{DSML}tool>?",
        "c",
        [],
    ),
    "second block": ("r</think>c" + block(CALL) + block(CALL), "r", "c", [V, V]),
    "text after the block": ("r</think>c" + block(CALL) + "\n\nd", "r", "c\n\nd", [V]),
    "text between blocks": (
        "</think>c" + block(CALL) + "\n\nd" + block(CALL),
        None,
        "c\n\nd",
        [V, V],
    ),
    "text in a call": ("</think>" + block(invoke("oops " + parameter("v"))), None, "\noops ", [V]),
    "leading <think>": ("<think>r</think>c", "r", "c", []),
    "second </think>": ("r</think>a</think>b", "r", "ab", []),
    "no </think>": ("abc", "abc", None, []),
    "<think> in content": ("r</think>a<think>b</think>c", "rb", "ac", []),
    "<think> quoted in content": ("r</think>Use `<think>`.", "r", "Use `<think>`.", []),
    "eos": (f"r</think>c{EOS}", "r", "c", []),
    "unknown tool": (
        "</think>" + block(invoke(parameter("v"), "zzz")),
        None,
        None,
        [("zzz", {"x": "v"})],
    ),
    "call without a name": (f"</think>a <{DSML}invoke> b", None, f"a <{DSML}invoke> b", []),
    "newlines kept": ("\nr\n</think>\n\nc\n\n", "\nr\n", "\n\nc\n\n", []),
    "three newlines before the block": ("</think>c\n" + block(CALL), None, "c\n", [V]),
    "html": ("</think><td><b>a</b></td><t", None, "<td><b>a</b></td><t", []),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_slips(slip: str) -> None:
    text, reasoning, content, calls = SLIPS[slip]
    message = laws.read([text])
    assert laws.read(text) == message
    assert (message.reasoning, message.content) == (reasoning, content)
    assert [(c.name, json.loads(c.arguments)) for c in message.tool_calls] == calls
    assert all(call.complete for call in message.tool_calls)
    assert message.finish_reason == ("tool_calls" if calls else "stop")


@pytest.mark.parametrize("tools", [None, []])
def test_without_tools_dsml_is_content(tools: list[Any] | None) -> None:
    message = parse("r</think>c" + block(CALL), tools=tools)
    assert message == Message("r", "c" + block(CALL), [], "stop")


def test_chat_mode_starts_in_content() -> None:
    assert parse("c" + block(CALL), False, TOOLS).content == "c"
    assert parse("<think>r</think>c", False, TOOLS) == Message("r", "c", [], "stop")


CUTS = [
    (f'c\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f', []),
    (f'c\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">', ["{"]),
    (f'c\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n<{DSML}parameter name="x', ["{"]),
    (f'c<{DSML}invoke name="f"><{DSML}parameter name="x" string="true">a"b', ['{"x": "a\\"b']),
    (f'c<{DSML}invoke name="f">{parameter("v")}', ['{"x": "v"']),
    (f'c<{DSML}invoke name="f">{parameter("v")}\n</{DSML}', ['{"x": "v"']),
    (
        f'c<{DSML}invoke name="f">' + parameter("[1, 2", "o", "")[: -len(f"</{DSML}parameter>")],
        ['{"o": [1, 2'],
    ),
    (f'c<{DSML}invoke name="f">{{"x": "v', ['{"x": "v']),
]


@pytest.mark.parametrize(("text", "arguments"), CUTS)
def test_cut_calls_do_not_look_complete(text: str, arguments: list[str]) -> None:
    message = laws.read([text], False, finish="length")
    assert (message.content, message.finish_reason) == ("c", "length")
    assert message.tool_calls == [ToolCall("c0", "f", part, False) for part in arguments]


def test_eos_inside_a_value_is_not_a_call() -> None:
    text = f'<{DSML}invoke name="f"><{DSML}parameter name="x" string="true">v'
    message = laws.read([text], False)
    assert (message.finish_reason, message.tool_calls[0].complete) == ("stop", False)


def test_events() -> None:
    parser = StreamParser(True, TOOLS, call_id=lambda: "id")
    assert parser.feed("r") == [ReasoningDelta("r")]
    assert parser.feed("</think>c\n") == [ContentDelta("c")]
    assert parser.feed(f'\n<{DSML}tool_calls>\n<{DSML}invoke name="f">') == [
        ToolCallStart(0, "id", "f"),
        ArgumentsDelta(0, "{"),
    ]
    assert parser.feed(f'\n<{DSML}parameter name="x" string="true">') == [
        ArgumentsDelta(0, '"x": "')
    ]
    assert parser.feed('a"') == [ArgumentsDelta(0, 'a\\"')]
    assert parser.feed(f"</{DSML}parameter>\n") == []
    assert parser.feed(f"</{DSML}invoke>") == [
        ArgumentsDelta(0, '"'),
        ArgumentsDelta(0, "}"),
        ToolCallEnd(0),
    ]
    assert parser.finish("stop") == [Finish("tool_calls")]
    with pytest.raises(ValueError, match="finished"):
        parser.feed("x")


def test_long_text_value_streams() -> None:
    """Nothing but the start of a possible tag waits, however long the value is."""
    parser = StreamParser(False, TOOLS)
    parser.feed(f'<{DSML}invoke name="f"><{DSML}parameter name="x" string="true">')
    for piece in ["word", " <", "b>", "\n"] * 5000:
        events = parser.feed(piece)
        assert events or piece == " <"
    assert len(parser.finish("length")) == 1


def test_unclosed_tag_is_held_up_to_its_limit() -> None:
    text = f'<{DSML}invoke name="' + "a" * 2 * MAX_TAG
    parser = StreamParser(False, TOOLS)
    shown = "".join(event.text for letter in text for event in parser.feed(letter))
    assert shown == text


def test_ids_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        StreamParser().feed_ids([1])


@pytest.mark.parametrize("schema", [None, 1, "string", [], {"type": 1}, {"enum": 1, "anyOf": {}}])
def test_schemas_that_are_none(schema: Any) -> None:
    body = parameter("[1]", "x", "")
    (call,) = parse(block(invoke(body)), False, [tool("f", x=schema)]).tool_calls
    assert json.loads(call.arguments) == {"x": [1]}


def test_typed_by_schemas_of_any_form() -> None:
    tools = [
        tool(
            "f",
            either={"anyOf": [{"type": "string"}, {"type": "boolean"}]},
            choice={"enum": ["1", "2"]},
            free=True,
        )
    ]
    values = {"either": "true", "choice": "1", "free": '"1"'}
    body = "".join(parameter(value, name, "") for name, value in values.items())
    (call,) = parse(block(invoke(body)), False, tools).tool_calls
    assert json.loads(call.arguments) == {"either": True, "choice": "1", "free": "1"}
