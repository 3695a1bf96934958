"""What the parser makes of well-formed outputs and of every slip seen in the field."""

from __future__ import annotations

import json
import re
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
    collect,
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


JSON = ' string="false"'
CALL = invoke(parameter("v"))
F = ("f", {})
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
    # Prose that names the markup.
    "invoke named in prose": (
        f'</think>Type <{DSML}invoke name="bash"> to start.',
        *(None, f'Type <{DSML}invoke name="bash"> to start.', []),
    ),
    "invoke named in the reasoning": (
        f'Type <{DSML}invoke name="bash"> to start.</think>c',
        *(f'Type <{DSML}invoke name="bash"> to start.', "c", []),
    ),
    "invoke and its end named in prose": (
        f'</think>Put it between <{DSML}invoke name="get_time"> and </{DSML}invoke>.',
        *(None, f'Put it between <{DSML}invoke name="get_time"> and </{DSML}invoke>.', []),
    ),
    "invoke without its required argument, named in prose": (
        f'</think>Type <{DSML}invoke name="bash"></{DSML}invoke> to start.',
        *(None, f'Type <{DSML}invoke name="bash"></{DSML}invoke> to start.', []),
    ),
    "invoke that needs no argument, named in prose": (
        f'</think>Type <{DSML}invoke name="get_time"/> to start.',
        *(None, f'Type <{DSML}invoke name="get_time"/> to start.', []),
    ),
    "prose in an invoke on a line of its own": (
        f'</think><{DSML}invoke name="get_time"> says the time </{DSML}invoke>',
        *(None, f'<{DSML}invoke name="get_time"> says the time </{DSML}invoke>', []),
    ),
    "invoke without its required argument, on a line of its own": (
        f'</think><{DSML}invoke name="bash"></{DSML}invoke>',
        *(None, f'<{DSML}invoke name="bash"></{DSML}invoke>', []),
    ),
    "parameter named in prose": (
        f'</think>Use <{DSML}invoke name="f"><{DSML}parameter name="x"> to start.',
        *(None, f'Use <{DSML}invoke name="f"><{DSML}parameter name="x"> to start.', []),
    ),
    "block named in prose": (
        f"</think>A <{DSML}tool_calls> block ends in </{DSML}tool_calls>.",
        *(None, f"A <{DSML}tool_calls> block ends in </{DSML}tool_calls>.", []),
    ),
    "call planned in the reasoning": (
        f'r\n<{DSML}tool_calls>\n<{DSML}invoke name="bash">\n{parameter("ls", "command")}</think>c',
        f'r\n<{DSML}tool_calls>\n<{DSML}invoke name="bash">\n{parameter("ls", "command")}',
        "c",
        [],
    ),
    "invoke without a parameter in a block": (
        f'</think>\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n</{DSML}tool_calls>',
        *(None, f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n</{DSML}tool_calls>', []),
    ),
    "required argument missing in a block": (
        "</think>" + block(invoke("", "bash")),
        *(None, None, [("bash", {})]),
    ),
    "call between quotes": (f"</think>Write `{CALL}` so.", None, f"Write `{CALL}` so.", []),
    "block between quotes": (
        f'</think>"<{DSML}tool_calls>{CALL}</{DSML}tool_calls>" it is.',
        *(None, f'"<{DSML}tool_calls>{CALL}</{DSML}tool_calls>" it is.', []),
    ),
    "call after a quote": (f'</think>I run "ls"{CALL}', None, 'I run "ls"', [V]),
    "call in a code fence": (f"</think>```xml{block(CALL)}\n```", None, "```xml\n```", [V]),
    # Prose in every gap.
    "text after a closed parameter, no </invoke>": (
        f'</think><{DSML}invoke name="f">{parameter("v")}\nso\n{CALL}',
        *(None, "\nso\n", [V, V]),
    ),
    "text after a closed JSON value": (
        "</think>" + block(invoke(parameter("[1]", "questions", JSON) + "\nok", "question")),
        *(None, "\nok\n", [("question", {"questions": [1]})]),
    ),
    "text after a JSON value, closed twice": (
        "</think>" + block(invoke(parameter("1", "n", JSON) + f"ok</{DSML}parameter>")),
        *(None, "ok", [("f", {"n": 1})]),
    ),
    "text after a JSON body": (
        "</think>" + block(invoke('{"x": "v"}\nok')),
        *(None, "\nok\n", [V]),
    ),
    "text before a call in its block": (
        f"</think>\n\n<{DSML}tool_calls>\nso\n{CALL}\n</{DSML}tool_calls>",
        *(None, "\nso\n", [V]),
    ),
    "text after a call in its block": (
        f"</think>\n\n<{DSML}tool_calls>\n{CALL}\nso\n</{DSML}tool_calls>",
        *(None, "\nso\n", [V]),
    ),
    # Tags that are not quite right.
    "self-closing invoke": ("</think>" + block(f'<{DSML}invoke name="f"/>'), *(None, None, [F])),
    "</parameter> twice": (
        "</think>" + block(invoke(parameter("v") + f"</{DSML}parameter>")),
        *(None, None, [V]),
    ),
    "all tags twice": (
        "</think>" + re.sub(r"<[^<>]*>", r"\g<0>\g<0>", block(CALL)),
        *(None, None, [V]),
    ),
    "no > after the block's tag": (
        "</think>" + block(CALL).replace("tool_calls>", "tool_calls", 1),
        *(None, None, [V]),
    ),
    "no > after any tag": (
        "</think>" + re.sub(r"(?<=[\w\"])>", "\n", block(CALL)),
        *(None, None, [V]),
    ),
    "attributes on the next line": (
        "</think>" + block(CALL).replace(" ", "\n  "),
        *(None, None, [V]),
    ),
    "</parameter >": ("</think>" + re.sub(">", " >", block(CALL)), *(None, None, [V])),
    "call without a name between calls": (
        "</think>" + block(CALL, f"<{DSML}invoke>\n</{DSML}invoke>", CALL),
        *(None, None, [V, V]),
    ),
    "</think> in a call": (
        "</think>" + block(invoke(f"</think>{parameter('v')}\n</think>")),
        *(None, None, [V]),
    ),
    "<think> in a call": (
        "</think>" + block(invoke(f"{parameter('v')}\n<think>r</think>")),
        *("r", None, [V]),
    ),
    "eos in a value": (
        "</think>" + block(invoke(parameter(f"a{EOS}b"))),
        *(None, None, [("f", {"x": f"a{EOS}b"})]),
    ),
    "</parameter> between quotes in a value": (
        "</think>" + block(invoke(parameter(f"`</{DSML}parameter>`, `</{DSML}invoke>`"))),
        *(None, None, [("f", {"x": f"`</{DSML}parameter>`, `</{DSML}invoke>`"})]),
    ),
    # Types.
    'string="True"': (
        "</think>" + block(invoke(parameter("12", "x", ' string="True"'))),
        *(None, None, [("f", {"x": "12"})]),
    ),
    'string="yes", a number for text': (
        "</think>" + block(invoke(parameter("12", "x", ' string="yes"'))),
        *(None, None, [("f", {"x": "12"})]),
    ),
    "1e999": (
        "</think>" + block(invoke(parameter("1e999", "n", JSON))),
        *(None, None, [("f", {"n": "1e999"})]),
    ),
    "text in arguments, one text required": (
        "</think>" + block(invoke(parameter("ls -l", "arguments"), "bash")),
        *(None, None, [("bash", {"command": "ls -l"})]),
    ),
    "JSON text in arguments, one text required": (
        "</think>" + block(invoke(parameter('"ls -l"', "arguments", JSON), "bash")),
        *(None, None, [("bash", {"command": "ls -l"})]),
    ),
    "text in arguments twice, one text required": (
        "</think>"
        + block(invoke(parameter("a", "arguments") + parameter("b", "arguments"), "bash")),
        *(None, None, [("bash", {"arguments": "b"})]),
    ),
    "JSON body with text in arguments, one text required": (
        "</think>" + block(invoke('{"arguments": "ls -l"}', "bash")),
        *(None, None, [("bash", {"command": "ls -l"})]),
    ),
    "text in arguments, none required": (
        "</think>" + block(invoke(parameter("ls -l", "arguments"))),
        *(None, None, [("f", {"arguments": "ls -l"})]),
    ),
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
    (f'c\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">', []),
    (f'c\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n<{DSML}parameter name="x', []),
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


@pytest.mark.parametrize("end", ["", EOS])
def test_a_value_that_eos_cuts(end: str) -> None:
    """The token itself is no text, whether it is spelled or an id."""
    text = f'<{DSML}invoke name="f"><{DSML}parameter name="x" string="true">v'
    (call,) = laws.read([text + end], False).tool_calls
    assert call == ToolCall("c0", "f", '{"x": "v', False)
    laws.check_ids(text + end, False, laws.read([text + end], False))


STOPPED = [
    # (what came before the client's stop string, content, arguments, finish reason)
    ("one\n", "one\n", [], "stop"),
    (f'a\n\n<{DSML}tool_calls>\n<{DSML}invoke name="get_time">\n', "a\n\n", [], "stop"),
    (f"{CALL[: CALL.index('</')]}", None, ['{"x": "v'], "stop"),
    (f"{CALL[: CALL.rindex('</')]}", None, ['{"x": "v"'], "stop"),
    (CALL, None, ['{"x": "v"}'], "tool_calls"),
]


@pytest.mark.parametrize(("text", "content", "arguments", "finish"), STOPPED)
def test_a_stop_string_of_the_client_cuts(
    text: str, content: str | None, arguments: list[str], finish: str
) -> None:
    parser = StreamParser(False, TOOLS)
    message = collect([*parser.feed(text), *parser.finish("stop", cut=True)])
    assert (message.content, message.finish_reason) == (content, finish)
    assert [call.arguments for call in message.tool_calls] == arguments


def test_a_call_amid_a_line_or_in_reasoning_waits_for_its_end() -> None:
    begun = f'<{DSML}invoke name="f"><{DSML}parameter name="x" string="true">v'
    for thinking in (False, True):
        parser = StreamParser(thinking, TOOLS, call_id=lambda: "id")
        assert [event.text for event in parser.feed("so ")] == ["so "]  # type: ignore[union-attr]
        assert parser.feed(begun) == []
        assert len(parser.feed(f"</{DSML}parameter></{DSML}invoke>")) == 7
        parser = StreamParser(thinking, TOOLS)
        assert parser.feed(f"so {begun}") == [(ReasoningDelta if thinking else ContentDelta)("so ")]
        assert laws.read([f"so {begun}"], thinking).tool_calls == []


def test_text_that_names_a_call_is_held_up_to_a_limit() -> None:
    parser = StreamParser(False, TOOLS)
    parser.feed(f'Type <{DSML}invoke name="f"> ')
    waiting = [parser.feed("word ") for _ in range(MAX_TAG)]
    assert waiting[0] == []
    assert waiting[-1] == [ContentDelta("word ")]


def test_events() -> None:
    parser = StreamParser(True, TOOLS, call_id=lambda: "id")
    assert parser.feed("r") == [ReasoningDelta("r")]
    assert parser.feed("</think>c\n") == [ContentDelta("c")]
    assert parser.feed(f'\n<{DSML}tool_calls>\n<{DSML}invoke name="f">') == []
    assert parser.feed(f'\n<{DSML}parameter name="x" string="true">') == [
        ToolCallStart(0, "id", "f"),
        ArgumentsDelta(0, "{"),
        ArgumentsDelta(0, '"x": "'),
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
