"""The structural tags, compiled by xgrammar, accept what they should and nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from dsv4_plugin.chat.grammar import response_tag, tool_tag
from dsv4_plugin.chat.tokens import DSML

from .data import call, tool
from .outputs import output_of

xgrammar = pytest.importorskip("xgrammar")
testing = pytest.importorskip("xgrammar.testing")

WEATHER = tool("weather", city={"type": "string"}, days={"type": "integer"})
WEATHER["function"]["parameters"]["required"] = ["city"]
STRICT = {"type": "function", "function": WEATHER["function"] | {"name": "s", "strict": True}}
CITY = '{"city": "Köln <b>\\n"}'


def acceptor(tag: dict[str, Any] | None) -> Callable[[str], bool]:
    grammar = xgrammar.Grammar.from_structural_tag(json.dumps(tag))
    return lambda text: testing._is_grammar_accept_string(grammar, text)


def written(*calls: tuple[str, str], content: str = "", reasoning: str = "") -> str:
    """What the model writes to make `calls`, without the eos token."""
    message = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    message["tool_calls"] = [call(name, arguments) for name, arguments in calls]
    text = output_of(message, [WEATHER], thinking=bool(reasoning))
    return text[: text.rindex("<")]


def test_required() -> None:
    accepts = acceptor(tool_tag([WEATHER, STRICT], "required"))
    assert accepts(written(("weather", CITY)))
    assert accepts(written(("weather", CITY), ("s", '{"city": "a", "days": 2}')))
    assert not accepts(written(("weather", '{"days": 2}')))
    assert not accepts(written(("weather", '{"city": "a", "days": "2"}')))
    assert not accepts(written(("other", CITY)))
    assert not accepts(written(("weather", CITY), content="Sure."))
    assert not accepts("")


def test_required_without_parallel_calls() -> None:
    accepts = acceptor(tool_tag([WEATHER], "required", parallel=False))
    assert accepts(written(("weather", CITY)))
    assert not accepts(written(("weather", CITY), ("weather", CITY)))


@pytest.mark.parametrize(
    "choice", [{"type": "function", "function": {"name": "s"}}, {"type": "function", "name": "s"}]
)
def test_named(choice: dict[str, Any]) -> None:
    accepts = acceptor(tool_tag([WEATHER, STRICT], choice))
    assert accepts(written(("s", CITY)))
    assert not accepts(written(("weather", CITY)))
    assert not accepts(written(("s", CITY), ("s", CITY)))


def test_required_after_thinking() -> None:
    accepts = acceptor(tool_tag([WEATHER], "required", reasoning=True))
    assert accepts(written(("weather", CITY), reasoning="Which city?"))
    assert not accepts("Which city?</think>None.")
    assert not accepts(written(("weather", CITY)))


def test_auto_holds_strict_tools_to_their_schemas() -> None:
    assert tool_tag([WEATHER], "auto") is None
    accepts = acceptor(tool_tag([WEATHER, STRICT], "auto"))
    assert accepts("No tool needed.")
    assert accepts(written(("s", CITY), content="Let me see."))
    assert accepts(written(("weather", '{"days": "many"}')))
    assert not accepts(written(("s", '{"days": "many"}')))


def test_auto_can_hold_calls_to_their_envelope() -> None:
    accepts = acceptor(tool_tag([WEATHER], "auto", envelope=True, parallel=False))
    assert accepts("No tool needed.")
    assert accepts(written(("weather", '{"days": "many"}')))
    assert not accepts(written(("weather", "{}"), ("weather", "{}")))
    assert not accepts(written(("unknown", "{}")))


def test_none_allows_no_markup() -> None:
    accepts = acceptor(tool_tag([WEATHER], "none"))
    assert accepts("a <b> c")
    assert not accepts(f"a <{DSML}tool_calls>")


def test_responses() -> None:
    assert response_tag(None) is None
    assert response_tag({"type": "text"}) is None
    accepts = acceptor(response_tag({"type": "json_object"}))
    assert accepts('{"a": [1]}')
    assert not accepts("[1]")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tag = response_tag({"type": "json_schema", "json_schema": {"schema": schema}}, reasoning=True)
    accepts = acceptor(tag)
    assert accepts('so 1</think>{"a": 1}')
    assert not accepts('{"a": 1}')
    assert not accepts('so 1</think>{"a": "1"}')


@pytest.mark.parametrize("choice", ["required", "sometimes", {"type": "function", "name": "q"}])
def test_choices_that_cannot_be_met(choice: Any) -> None:
    with pytest.raises(ValueError, match=r"tool_choice: .* is not auto"):
        tool_tag([] if choice == "required" else [WEATHER], choice)


@pytest.mark.parametrize("schema", [{"type": "zzz"}, {"properties": []}, {"$ref": "#/x"}])
def test_schemas_that_no_grammar_can_be_made_of(schema: Any) -> None:
    """They are refused by index and name where they are to be followed, and nowhere else."""
    function = {"name": "bad", "parameters": schema}
    tools = [WEATHER, {"type": "function", "function": function}]
    compile_schema = xgrammar.Grammar.from_json_schema
    named = {"type": "function", "function": {"name": "weather"}}
    assert tool_tag(tools, "auto", compile_schema=compile_schema) is None
    assert tool_tag(tools, named, compile_schema=compile_schema)
    refused = r"^tools\[1\]\.function\.parameters: no grammar .* 'bad': [^\[]+$"
    with pytest.raises(ValueError, match=refused):
        tool_tag(tools, "required", compile_schema=compile_schema)
    tools[1] = {"type": "function", "function": function | {"strict": True}}
    with pytest.raises(ValueError, match=refused):
        tool_tag(tools, "auto", compile_schema=compile_schema)


def test_formats_that_are_none() -> None:
    with pytest.raises(ValueError, match="response_format: must be of type text"):
        response_tag({"type": "xml"})
