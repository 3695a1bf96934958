"""Prompts: the published pairs, effort, turns, continuation, tasks, and what is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4_plugin import env
from dsv4_plugin.chat import Encoder, render
from dsv4_plugin.chat.effort import EFFORTS
from dsv4_plugin.chat.encoder import TextEncoder
from dsv4_plugin.chat.messages import ROLES
from dsv4_plugin.chat.options import read_thinking, thinks
from dsv4_plugin.chat.tokens import (
    ABSOLUTE_EFFORT,
    BEYOND_EFFORT,
    TASKS,
    TOOLS_CONCLUSION,
    TOOLS_INTRODUCTION,
)
from dsv4_plugin.chat.tools import without_tools

from .data import ENCODING, TOOLS, call, encoder, needs_encoding_data, tokenizer_file, tool

USER = {"role": "user", "content": "hi"}
BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"


def text(*messages: dict[str, Any], effort: str = "low", **options: Any) -> str:
    """The prompt text, without bos, of `messages` and of strings as user messages."""
    prompt = encoder().encode(list(messages), effort=effort, **options)
    assert prompt.text.startswith(BOS)
    return prompt.text.removeprefix(BOS)


def assistant(
    content: str | None = None, reasoning: str | None = None, **more: Any
) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "reasoning_content": reasoning, **more}


@needs_encoding_data
@pytest.mark.parametrize("number", [1, 2])
def test_published_pairs(number: int) -> None:
    folder = ENCODING / "published"
    given = json.loads((folder / f"test_input_{number}.json").read_text(encoding="utf-8"))
    given = given if isinstance(given, dict) else {"messages": given}
    expected = (folder / f"test_output_{number}.txt").read_text(encoding="utf-8")
    prompt = encoder("april").encode(**given, add_generation_prompt=False)
    assert prompt.text == expected
    assert prompt.ids == encoder().tokenizer.encode(expected, add_special_tokens=False).ids


@needs_encoding_data
def test_literal_texts_are_the_authors() -> None:
    efforts = json.loads((ENCODING / "effort_texts.json").read_text(encoding="utf-8"))
    assert (efforts["ABS"], efforts["BEYOND"]) == (ABSOLUTE_EFFORT, BEYOND_EFFORT)
    preamble = (ENCODING / "tool_preamble.txt").read_text(encoding="utf-8")
    ours = "".join(TOOLS_INTRODUCTION) + "{tool_schemas}" + TOOLS_CONCLUSION
    assert ours.strip("\n") == preamble.strip("\n")


EFFORT_TEXTS = {
    # asked: (April, 0731); None is chat mode
    None: ("", ABSOLUTE_EFFORT),
    "minimal": ("", ""),
    "low": ("", ""),
    "medium": ("", ABSOLUTE_EFFORT),
    "high": ("", ABSOLUTE_EFFORT),
    "xhigh": (ABSOLUTE_EFFORT, BEYOND_EFFORT),
    "max": (ABSOLUTE_EFFORT, BEYOND_EFFORT),
    "ultra": (ABSOLUTE_EFFORT, BEYOND_EFFORT),
    "none": (None, None),
}


@pytest.mark.parametrize("asked", EFFORT_TEXTS)
@pytest.mark.parametrize(("generation", "column"), [("april", 0), ("0731", 1)])
def test_effort_by_generation(asked: str | None, generation: str, column: int) -> None:
    expected = EFFORT_TEXTS[asked][column]
    prompt = encoder(generation).encode([USER], effort=asked)
    mode = "</think>" if expected is None else "<think>"
    assert prompt.text == f"{BOS}{expected or ''}<｜User｜>hi<｜Assistant｜>{mode}"
    assert prompt.thinking == (expected is not None)
    chat = encoder(generation).encode([USER], thinking=False, effort=asked)
    assert chat.text == f"{BOS}<｜User｜>hi<｜Assistant｜></think>"
    assert not chat.thinking


def test_default_effort_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert env.EFFORT.read() == "high"
    assert encoder("0731", "low").encode([USER]).text == f"{BOS}<｜User｜>hi<｜Assistant｜><think>"
    monkeypatch.setenv(env.EFFORT.name, "lots")
    with pytest.raises(ValueError, match="DSV4_DEFAULT_EFFORT is 'lots'; allowed are none"):
        env.EFFORT.read()


@pytest.mark.parametrize(("config", "generation"), [({}, "april"), ({"dspark_x": 1}, "0731")])
def test_from_pretrained(tmp_path: Path, config: dict[str, Any], generation: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").symlink_to(tokenizer_file())
    assert Encoder.from_pretrained(tmp_path).generation == generation


RESULTS = [
    {"role": "tool", "tool_call_id": "2", "content": "second"},
    {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "first"}]},
]
CALLS = [call("f", '{"x": "a\\nb", "n": 1, "o": {"é": [1.5, null]}}', "1"), call("f", "{}", "2")]

TURNS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    # what it shows: (messages, options, prompt after bos)
    "users merge": ([USER, USER], {}, "<｜User｜>hi\n\nhi<｜Assistant｜><think>"),
    "system texts come first": (
        [USER, {"role": "system", "content": "a"}, {"role": "system", "content": "b"}],
        {},
        "a\n\nb<｜User｜>hi<｜Assistant｜><think>",
    ),
    "text parts": (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}],
        {},
        "<｜User｜>a\n\nb<｜Assistant｜><think>",
    ),
    "null content": ([{"role": "user", "content": None}], {}, "<｜User｜><｜Assistant｜><think>"),
    "reasoning of earlier turns is dropped": (
        [USER, assistant("a", "r"), USER],
        {},
        f"<｜User｜>hi<｜Assistant｜></think>a{EOS}<｜User｜>hi<｜Assistant｜><think>",
    ),
    "chat mode drops all reasoning": (
        [USER, assistant("a", "r"), USER],
        {"thinking": False},
        f"<｜User｜>hi<｜Assistant｜></think>a{EOS}<｜User｜>hi<｜Assistant｜></think>",
    ),
    "nothing is opened": (
        [USER, assistant("a", "r")],
        {"add_generation_prompt": False},
        f"<｜User｜>hi<｜Assistant｜><think>r</think>a{EOS}",
    ),
    "nothing is opened after a user": (
        [USER],
        {"add_generation_prompt": False},
        "<｜User｜>hi",
    ),
    "continue content": (
        [USER, assistant("a", "r")],
        {"continue_final_message": True},
        "<｜User｜>hi<｜Assistant｜><think>r</think>a",
    ),
    "continue reasoning": (
        [USER, assistant(None, "r")],
        {"continue_final_message": True},
        "<｜User｜>hi<｜Assistant｜><think>r",
    ),
    "continue nothing": (
        [USER, assistant()],
        {"continue_final_message": True},
        "<｜User｜>hi<｜Assistant｜><think>",
    ),
    "prefix in chat mode": (
        [USER, assistant("a", prefix=True)],
        {"thinking": False},
        "<｜User｜>hi<｜Assistant｜></think>a",
    ),
    "calls and results, sorted": (
        [USER, assistant("c", "r", tool_calls=CALLS), *RESULTS, USER],
        {},
        "<｜User｜>hi<｜Assistant｜></think>c\n\n<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="x" string="true">a\nb</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="n" string="false">1</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="o" string="false">{"é": [1.5, null]}</｜DSML｜parameter>\n'
        '</｜DSML｜invoke>\n<｜DSML｜invoke name="f">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
        f"{EOS}<｜User｜><tool_result>first</tool_result>\n\n"
        "<tool_result>second</tool_result>\n\nhi<｜Assistant｜><think>",
    ),
    "a tool result opens a turn": (
        [USER, RESULTS[0]],
        {},
        "<｜User｜>hi<｜User｜><tool_result>second</tool_result><｜Assistant｜><think>",
    ),
    "arguments that are no object": (
        [assistant(None, tool_calls=[call("f", "[1]"), call("f", ""), call("f", '"\\ud800"')])],
        {"add_generation_prompt": False, "thinking": False},
        "<｜Assistant｜></think>\n\n<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="arguments" string="true">[1]'
        '</｜DSML｜parameter>\n</｜DSML｜invoke>\n<｜DSML｜invoke name="f">\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="arguments" string="true">"\\ud800"'
        f"</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>{EOS}",
    ),
    "latest reminder": (
        [USER, {"role": "latest_reminder", "content": "r"}],
        {},
        "<｜User｜>hi<｜latest_reminder｜>r<｜Assistant｜><think>",
    ),
    "developer": (
        [
            USER,
            {"role": "developer", "content": "d", "response_format": {"type": "json_object"}},
            assistant("a", "r"),
        ],
        {"add_generation_prompt": False},
        "<｜User｜>hi<｜User｜>d\n\nYou are a helpful assistant designed to output JSON.\n"
        "## Response Format:\n\nReply with JSON object ONLY."
        f"<｜Assistant｜><think>r</think>a{EOS}",
    ),
    "a call of the old API": (
        [assistant(None, function_call={"name": "f", "arguments": '{"x": "v"}'})],
        {"add_generation_prompt": False, "thinking": False},
        '<｜Assistant｜></think>\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="x" string="true">v</｜DSML｜parameter>\n'
        f"</｜DSML｜invoke>\n</｜DSML｜tool_calls>{EOS}",
    ),
    "a refusal": (
        [assistant(None, refusal="I won't."), assistant("Hm.", refusal="No.")],
        {"add_generation_prompt": False, "thinking": False},
        f"<｜Assistant｜></think>I won't.{EOS}<｜Assistant｜></think>Hm.\n\nNo.{EOS}",
    ),
    "numbers that JSON cannot hold": (
        [assistant(None, tool_calls=[call("f", '{"x": [1e999]}'), call("f", '{"x": NaN}')])],
        {"add_generation_prompt": False, "thinking": False},
        "<｜Assistant｜></think>\n\n<｜DSML｜tool_calls>\n"
        '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="arguments" string="true">'
        '{"x": [1e999]}</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="arguments" string="true">'
        f'{{"x": NaN}}</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>{EOS}',
    ),
    "prefix: false": (
        [USER, assistant("a", prefix=False)],
        {"add_generation_prompt": False, "thinking": False},
        f"<｜User｜>hi<｜Assistant｜></think>a{EOS}",
    ),
    "task action": (
        [USER | {"task": "action"}],
        {},
        "<｜User｜>hi<｜Assistant｜><think><｜action｜>",
    ),
    "task query": ([USER | {"task": "query"}], {}, "<｜User｜>hi<｜query｜>"),
    "task and its answer": (
        [USER | {"task": "read_url"}, assistant("u")],
        {"add_generation_prompt": False},
        f"<｜User｜>hi<｜read_url｜>u{EOS}",
    ),
    "task title": (
        [USER, assistant("a") | {"task": "title"}],
        {},
        f"<｜User｜>hi<｜Assistant｜></think>a{EOS}<｜title｜>",
    ),
}


@pytest.mark.parametrize("what", TURNS)
def test_turns(what: str) -> None:
    messages, options, expected = TURNS[what]
    assert text(*messages, **options) == expected


@pytest.mark.parametrize(
    ("what", "thinking"),
    [("continue content", False), ("continue reasoning", True), ("task action", False)],
)
def test_where_the_output_starts(what: str, thinking: bool) -> None:
    messages, options, _ = TURNS[what]
    assert encoder().encode(messages, **options).thinking == thinking


def test_tools_keep_all_reasoning() -> None:
    prompt = text(USER, assistant("a", "r"), USER, tools=TOOLS)
    assert "<｜User｜>hi<｜Assistant｜><think>r</think>a" in prompt
    assert prompt.startswith("\n\n## Tools\n\nYou have access")
    assert '\n{"name": "get_weather", "description": "", "parameters": {"type"' in prompt
    in_system = text(
        {"role": "system", "content": "", "tools": TOOLS}, USER, assistant("a", "r"), USER
    )
    assert in_system == prompt


def test_no_message_offers_tools_under_tool_choice_none() -> None:
    messages = [{"role": "system", "content": "s", "tools": TOOLS}, USER]
    bare = [{"role": "system", "content": "s"}, USER]
    assert text(*messages) != text(*bare) == text(*without_tools(messages))


@pytest.mark.parametrize("value", [{}, {"thinking": None}, {"enable_thinking": None}])
def test_nothing_said_about_thinking(value: dict[str, Any]) -> None:
    assert thinks(value) is None


@pytest.mark.parametrize("first", [True, False, None])
@pytest.mark.parametrize("second", [True, False, None])
def test_one_name_for_thinking_that_is_false_decides(first: Any, second: Any) -> None:
    if (first, second) != (None, None):
        asked = {"thinking": first, "enable_thinking": second}
        assert thinks(asked) is (first is not False and second is not False)


def test_developer_tools() -> None:
    developer = {"role": "developer", "content": "d", "tools": TOOLS}
    prompt = text(USER, assistant("a", "r"), developer)
    assert prompt.startswith("<｜User｜>hi<｜Assistant｜><think>r</think>a")
    assert "<｜User｜>d\n\n## Tools" in prompt


def test_response_schema() -> None:
    schema = {"type": "object", "title": "é"}
    prompt = text(USER, response_format={"type": "json_schema", "json_schema": {"schema": schema}})
    assert prompt.startswith(
        "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        '{"type": "object", "title": "é"}<｜User｜>'
    )


CALLER = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}
FUNCTION, PROPERTIES = r"tool_calls\[0\].function", r"function.parameters.properties"
REFUSED: list[tuple[list[Any], dict[str, Any], str]] = [
    ([], {}, "messages: must hold at least one message"),
    (["hi"], {}, r"messages\[0\]: must be an object, not 'hi'"),
    ([USER, {"role": "function"}], {}, r"messages\[1\].role: 'function' is not one of system, dev"),
    ([{"role": "user", "content": 1}], {}, r"messages\[0\].content: must be a string, not int"),
    (
        [{"role": "user", "content": ["a", {"type": "image_url"}]}],
        {},
        r"messages\[0\].content\[1\].type: 'image_url' is not one of text, .*reads text only",
    ),
    (
        [{"role": "user", "content": [{"type": "text"}]}],
        {},
        r"messages\[0\].content\[0\].text: must be a string, not NoneType",
    ),
    ([{"role": "user", "content": "\ud800"}], {}, r"messages\[0\].content: not valid Unicode"),
    ([USER | {"task": "x"}], {}, r"messages\[0\].task: 'x' is not one of action, query"),
    ([CALLER], {}, r"messages\[0\].tool_calls\[0\].function.arguments: must be JSON text or an"),
    (
        [{"role": "assistant", "tool_calls": [{"function": {}}]}],
        {},
        r"messages\[0\].tool_calls\[0\].function.name: must be a string",
    ),
    (
        [{"role": "assistant", "tool_calls": [{}]}],
        {},
        r"messages\[0\].tool_calls\[0\].function: must be an object",
    ),
    ([{"role": "assistant", "tool_calls": 1}], {}, r"messages\[0\].tool_calls: must be a list"),
    ([USER], {"continue_final_message": True}, r"messages\[0\].role: .* not 'user'"),
    ([assistant("a", prefix=True), USER], {}, r"messages\[0\].prefix: only the final message"),
    ([USER], {"tools": 1}, "tools: must be a list, not 1"),
    ([USER], {"tools": [1]}, r"tools\[0\]: must be an object of type 'function'"),
    ([USER], {"tools": [{"type": "function"}]}, r"tools\[0\].function.name: must be a non-empty"),
    ([USER], {"tools": [{"function": 1}]}, r"tools\[0\].function: must be an object"),
    (
        [USER],
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {1}}}]},
        r"tools\[0\].function: not JSON",
    ),
    (
        [{"role": "system", "tools": [{"type": "x"}]}],
        {},
        r"messages\[0\].tools\[0\]: must be an object of type 'function'",
    ),
    *(
        ([USER], {"tools": [tool(name)]}, r"tools\[0\].function.name: .* (cannot be a name|non-e)")
        for name in ('a"b', "a>b", "a\nb", "a\rb", "a\ud800", "")
    ),
    *(
        ([USER], {"tools": [TOOLS[0], tool("f", **{name: {}})]}, rf"tools\[1\].{PROPERTIES}: ")
        for name in ('a"b', "a>b", "a\nb", "\ud800", "")
    ),
    *(
        ([assistant(None, tool_calls=[call(name, "{}")])], {}, rf"messages\[0\].{FUNCTION}.name: ")
        for name in ('a"b', "a>b", "a\nb", "\ud800", "")
    ),
    *(
        (
            [assistant(None, tool_calls=[call("f", json.dumps({name: 1}))])],
            {},
            rf"messages\[0\].{FUNCTION}.arguments: ",
        )
        for name in ('a"b', "a>b", "a\nb", "")
    ),
    *(
        ([USER], {"tools": [TOOLS[0], tool("f", x=schema)]}, r"tools\[1\].function: not JSON: ")
        for schema in ({"title": "\ud800"}, {"\udfff": 1}, {"const": math.inf}, [math.nan])
    ),
    (
        [assistant(None, tool_calls=[call("f", {"x": -math.inf})])],  # type: ignore[arg-type]
        {},
        rf"messages\[0\].{FUNCTION}.arguments: not JSON: ",
    ),
    (
        [USER],
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"x": math.inf}}}},
        "response_format: not JSON: ",
    ),
    (
        [assistant(None, function_call={"name": "f"}, tool_calls=[call("f", "{}")])],
        {},
        r"messages\[0\].function_call: must be null beside tool_calls",
    ),
    ([assistant(None, function_call=1)], {}, r"messages\[0\].function_call: must be an object"),
    ([assistant(None, refusal=1)], {}, r"messages\[0\].refusal: must be a string, not int"),
    *(
        ([USER, assistant("a", prefix=value)], {}, r"messages\[1\].prefix: must be true or false")
        for value in ("false", "off", 0, 1, {"type": "disabled"})
    ),
    ([USER], {"response_format": {"type": "xml"}}, "response_format: must be of type text"),
    ([USER], {"effort": "lots"}, f"effort: 'lots' is not one of {', '.join(EFFORTS)}"),
]


@pytest.mark.parametrize(("messages", "options", "error"), REFUSED)
def test_refused(messages: list[Any], options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error) as refused:
        encoder().encode(messages, **options)
    assert str(refused.value).encode()


@pytest.mark.parametrize(
    ("value", "thinks"),
    [
        *((None, None), (True, True), (False, False)),
        *(({"type": "enabled"}, True), ({"type": "disabled"}, False)),
    ],
)
def test_thinking_is_a_boolean_or_the_api_s_object(value: Any, thinks: bool | None) -> None:
    assert read_thinking(value, "thinking") is thinks


@pytest.mark.parametrize("value", ["false", "off", "", 0, 1, {}, {"type": []}, {"type": "off"}])
def test_other_values_of_thinking_are_refused(value: Any) -> None:
    with pytest.raises(
        ValueError, match=r"^thinking: must be true, false, \{.type.: .enabled.\} or"
    ):
        read_thinking(value, "thinking")


@pytest.mark.parametrize("source", ["/nowhere", 7])
def test_tokenizers_that_are_none(source: Any) -> None:
    with pytest.raises(ValueError, match="tokenizer: "):
        Encoder(source)


KEYS = [
    *("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "function", "name"),
    *("arguments", "id", "type", "text", "task", "prefix", "tools", "parameters", "json_schema"),
    *("schema", "response_format", "messages"),
]
any_json = st.recursive(
    st.one_of(
        st.none(),
        st.integers(0, 9),
        st.text(st.characters(codec=None), max_size=3),
        st.sampled_from([*ROLES, *TASKS, "function", "json_schema", "text", "[", "{}"]),
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)
any_message = st.fixed_dictionaries(
    {"role": st.sampled_from(ROLES)}, optional={key: any_json for key in KEYS if key != "role"}
)


@given(st.lists(any_message, max_size=4) | any_json, any_json, any_json, st.booleans())
@settings(
    max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
def test_any_json_is_encoded_or_refused_by_name(
    messages: Any, tools: Any, response_format: Any, continues: bool
) -> None:
    named = r"^(messages|tools|response_format)(\[\d+\])?[.:]"
    refusal = None
    try:
        prompt = encoder().encode(
            messages,
            tools,
            response_format=response_format,
            continue_final_message=continues,
        )
        decoded = encoder().tokenizer.decode(prompt.ids, skip_special_tokens=False)
        assert decoded == prompt.text
    except ValueError as error:
        refusal = str(error)
    assert refusal is None or re.match(named, refusal)


def test_unknown_generation() -> None:
    with pytest.raises(ValueError, match="generation: 'may' is not one of"):
        Encoder(tokenizer_file(), "may")


def test_tokenizer_without_control_tokens() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    bare = Encoder(Tokenizer(BPE()))
    with pytest.raises(ValueError, match="tokenizer: has no token '<｜begin▁of▁sentence｜>'"):
        bare.encode([USER])


def test_cached_texts_give_the_same_ids_within_bounds() -> None:
    texts = TextEncoder(encoder().tokenizer, cached_characters=20)
    inputs = ["twelve chars", "another one", "", "twelve chars", "longer than the whole cache"]
    expected = [encoder().tokenizer.encode(text, add_special_tokens=False).ids for text in inputs]
    for _ in range(3):
        assert texts.encode(inputs) == expected
        assert sum(map(len, texts._cache)) <= 20
    assert texts.encode(["another one"]) == [expected[1]]


def test_render_needs_no_tokenizer() -> None:
    assert render([USER]).text == f"{BOS}<｜User｜>hi<｜Assistant｜><think>"


def test_reasoning_of_finished_turns_can_be_kept():
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "reasoning_content": "because", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert "because" not in render(messages).text
    assert "<think>because</think>b" in render(messages, drop_reasoning=False).text
    assert "because" not in render(messages, thinking=False, drop_reasoning=False).text
