"""Generated conversations and generated model outputs."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from dsv4_plugin.chat.tokens import BOS, DSML, END_THINK, EOS, THINK, USER

MARKUP = [
    *(BOS, EOS, USER, THINK, END_THINK, DSML, "<", "</", "｜", "\n", "\n\n", ">", '"', "`", "'"),
    *(f"<{DSML}{name}>" for name in ("tool_calls", "function_calls", "toolcalls", "tool")),
    *(f"</{DSML}{name}>" for name in ("tool_calls", "function_calls", "invoke", "parameter")),
    *(f"<{DSML}invoke{rest}" for rest in (' name="f">\n', ">", ' name="f', " name='g'>")),
    *(f"<{DSML}parameter{rest}" for rest in (' name="x" string="true">', ' name="n">', " x")),
    *("{", "}", '{"x": 1}', "NaN", "12", "[1, 2", "true", "<tool_result>", "é", "漢字", "🙂", " "),
]

unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
text = st.one_of(
    unicode_text,
    st.lists(st.one_of(st.sampled_from(MARKUP), unicode_text), max_size=5).map("".join),
    st.sampled_from(["", " ", "Hello.", "What is 2+2?", "It's 12345 €\n\n\n", "def f():\n    x"]),
)
name = st.from_regex(r"[a-zA-Z0-9_-]{1,12}", fullmatch=True)
argument = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters='">\r\n'), min_size=1
)
"""Names that fit between an attribute's quotes."""
number = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(1e-4, 1e15) | st.floats(-1e15, -1e-4),
)
json_value = st.recursive(
    st.one_of(st.none(), st.booleans(), number, text),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(unicode_text, inner, max_size=3)
    ),
    max_leaves=6,
)
json_object = st.dictionaries(argument, json_value, max_size=4)


leaf_schema = st.fixed_dictionaries(
    {"type": st.sampled_from(["string", "integer", "number", "boolean", "null"])},
    optional={"description": text, "default": json_value, "title": text, "enum": st.just(["a", 1])},
)
schema = st.recursive(
    leaf_schema,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"type": st.just("array"), "items": inner}),
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=2)}),
        st.dictionaries(unicode_text, inner, max_size=3).map(
            lambda properties: {"type": "object", "properties": properties}
        ),
    ),
    max_leaves=4,
)
parameters = st.fixed_dictionaries(
    {"type": st.just("object"), "properties": st.dictionaries(argument, schema, max_size=3)},
    optional={"title": text, "default": json_value, "additionalProperties": st.booleans()},
)


@st.composite
def tools(draw: st.DrawFn) -> list[dict[str, Any]] | None:
    """Tools with nested schemas, all of a kind that `deepseek-recipe` shows as they are."""
    function = st.fixed_dictionaries(
        {"name": name},
        optional={"description": st.none() | text, "parameters": parameters},
    )
    functions = st.lists(function, max_size=3, unique_by=lambda function: function["name"])
    found = [{"type": "function", "function": function} for function in draw(functions)]
    return found or draw(st.sampled_from([None, []]))


def content(draw: st.DrawFn) -> Any:
    parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": text}), max_size=3)
    return draw(st.one_of(text, text, parts))


@st.composite
def assistant_and_results(draw: st.DrawFn, final: bool = False) -> list[dict[str, Any]]:
    """An assistant message and, where it calls tools, their results in any order."""
    message: dict[str, Any] = {"role": "assistant", "content": draw(text)}
    reasoning = draw(st.one_of(st.just("-"), st.none(), text))
    if reasoning != "-":
        message["reasoning_content"] = reasoning
    arguments = draw(st.lists(json_object, max_size=3)) if draw(st.booleans()) else []
    if not arguments:
        return [message]
    if draw(st.booleans()):
        message["content"] = None
    separators = draw(st.sampled_from([(", ", ": "), (",", ":")]))
    ids = [f"call_{index}" for index in range(len(arguments))]
    message["tool_calls"] = [
        {
            "id": call_id,
            "type": "function",
            "function": {
                "name": draw(name),
                "arguments": json.dumps(value, ensure_ascii=False, separators=separators),
            },
        }
        for call_id, value in zip(ids, arguments, strict=True)
    ]
    if final:
        return [message]
    results = [
        {"role": "tool", "tool_call_id": call_id, "content": content(draw)}
        for call_id in draw(st.permutations(ids))
    ]
    return [message, *results]


@st.composite
def conversations(draw: st.DrawFn) -> dict[str, Any]:
    """A Chat Completions request of any mix of roles, tools and empty or null fields."""
    messages: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 6))):
        role = draw(st.sampled_from(["system", "user", "user", "assistant", "latest_reminder"]))
        if role == "assistant":
            messages += draw(assistant_and_results())
        else:
            is_reminder = role == "latest_reminder"
            messages.append({"role": role, "content": draw(text) if is_reminder else content(draw)})
    request: dict[str, Any] = {"messages": messages, "tools": draw(tools())}
    efforts = ["minimal", "low", "medium", "high", "max", "ultra"]
    match draw(st.integers(0, 3)):
        case 0:
            request["reasoning_effort"] = "none"
        case 1:
            request["thinking"] = {"type": "disabled"}
        case 2:
            request["reasoning_effort"] = draw(st.sampled_from(efforts))
    calls = request["tools"] or any(message.get("tool_calls") for message in messages)
    if not calls and draw(st.integers(0, 2)) == 0:
        message = draw(assistant_and_results(final=True))[0]
        message.pop("tool_calls", None)
        messages.append(message | {"prefix": True, "content": message["content"] or ""})
    elif draw(st.integers(0, 3)) == 0:
        messages.insert(0, {"role": "system", "content": "Answer in JSON."})
        schema = {"type": "object", "properties": {"a": {"type": "string", "title": draw(text)}}}
        schema |= {"required": ["a"], "additionalProperties": False}
        request["response_format"] = draw(
            st.sampled_from(
                [
                    {"type": "text"},
                    {"type": "json_object"},
                    {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
                ]
            )
        )
    return request
