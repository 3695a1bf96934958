"""Structured output as structural tags: plain dicts in xgrammar's JSON form, for any engine.

vLLM takes them as `StructuredOutputsParams(structural_tag=json.dumps(tag))`, SGLang as
`response_format=tag`. `reasoning=True` makes the grammar cover the reasoning too, from the first
generated token on; leave it out where the engine itself waits for `</think>`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import json_text
from .messages import json_schema
from .render import V4, Form
from .tokens import DSML, END_THINK, INVOKE, THINK
from .tools import functions

Format = dict[str, Any]

MAX_WHITESPACE = 2
"""Longest run of optional white space, so that a model cannot pad without end."""

_STYLES = {"": "deepseek_xml", " ": "deepseek_v4_1_xml"}
"""xgrammar's names of the parameters' form, by what follows DSML in tags."""
_NO_THINKING = [str(THINK), str(END_THINK)]


def tool_tag(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] = "auto",
    *,
    reasoning: bool = False,
    parallel: bool = True,
    envelope: bool = False,
    compile_schema: Callable[[str], object] | None = None,
    form: Form = V4,
) -> Format | None:
    """The structural tag for OpenAI's `tools` and `tool_choice`; None where all text is free.

    auto: the arguments of tools with `strict: true` follow their schemas; with `envelope`, calls
    are well-formed even where no tool is strict. required, or a named
    function: one block of calls and nothing else, all by schema. none: no DSML at all. Without
    `parallel` a block holds one call. `compile_schema` is the engine's (xgrammar's
    `Grammar.from_json_schema`): it tries each schema that is to be followed. `form`: whose tags.
    Raises ValueError for
    a choice that `tools` cannot meet, and for a schema that cannot be compiled, naming the tool.
    """
    offered = functions(tools)
    opening, closing = (f"{start}{DSML}{form.space}{form.block}>" for start in ("<", "</"))
    if tool_choice == "none":
        return _tag({"type": "any_text", "excludes": [*_NO_THINKING, str(DSML)]}, reasoning)
    if tool_choice == "auto":
        if not envelope and not any(function.get("strict") for function in offered):
            return None
        _check_schemas(offered, [f for f in offered if f.get("strict")], compile_schema)
        calls = _calls([(f, bool(f.get("strict"))) for f in offered], parallel, form)
        block = {"type": "tag", "begin": f"{opening}\n", "content": calls, "end": closing}
        text = {
            "type": "triggered_tags",
            "triggers": [opening],
            "tags": [block],
            "excludes": _NO_THINKING,
            "stop_after_first": not parallel,
        }
        return _tag(text, reasoning)
    chosen = _chosen(offered, tool_choice)
    _check_schemas(offered, chosen, compile_schema)
    calls = _calls([(f, True) for f in chosen], parallel and tool_choice == "required", form)
    return _tag(_sequence(_constant(f"\n\n{opening}\n"), calls, _constant(closing)), reasoning)


def response_tag(
    response_format: Mapping[str, Any] | None, *, reasoning: bool = False
) -> Format | None:
    """The structural tag for OpenAI's `response_format`; None where it asks for plain text."""
    if response_format is None or response_format.get("type") == "text":
        return None
    kind = response_format.get("type")
    schema = json_schema(response_format) if kind == "json_schema" else {"type": "object"}
    if kind not in ("json_object", "json_schema") or not isinstance(schema, Mapping | bool):
        raise ValueError(
            "response_format: must be of type text, json_object, or json_schema with "
            f"json_schema.schema, not {response_format!r:.80}"
        )
    return _tag({"type": "json_schema", "json_schema": schema}, reasoning)


_SOURCE_LINE = re.compile(r"^\[[\d:]+\] \S+:\d+: ")
"""What xgrammar's messages begin with: time, file and line of its own source."""


def _check_schemas(
    offered: Sequence[Mapping[str, Any]],
    followed: Sequence[Mapping[str, Any]],
    compile_schema: Callable[[str], object] | None,
) -> None:
    if compile_schema is None:
        return
    for index, function in enumerate(offered):
        if function not in followed:
            continue
        where = f"tools[{index}].function.parameters"
        schema = json_text.encode(_parameters(function), where)
        try:
            compile_schema(schema)
        except (RuntimeError, ValueError) as error:
            reason = _SOURCE_LINE.sub("", str(error)).strip()
            raise ValueError(
                f"{where}: no grammar can be made of the schema of {function['name']!r}: {reason}"
            ) from None


def _parameters(function: Mapping[str, Any]) -> Any:
    return function.get("parameters") or {"type": "object"}


def _chosen(
    offered: Sequence[Mapping[str, Any]], tool_choice: str | Mapping[str, Any]
) -> Sequence[Mapping[str, Any]]:
    names = [function["name"] for function in offered]
    if tool_choice == "required" and offered:
        return offered
    if isinstance(tool_choice, Mapping):
        named = tool_choice.get("function", tool_choice)
        name = named.get("name") if isinstance(named, Mapping) else None
        if name in names:
            return [offered[names.index(name)]]
    raise ValueError(
        f"tool_choice: {tool_choice!r:.80} is not auto, none, required, or a function of tools "
        f"({', '.join(names) or 'there are none'})"
    )


def _calls(offered: Sequence[tuple[Mapping[str, Any], bool]], parallel: bool, form: Form) -> Format:
    return {
        "type": "tags_with_separator",
        "tags": [_call(function, by_schema, form) for function, by_schema in offered],
        "separator": "",
        "at_least_one": True,
        "stop_after_first": not parallel,
    }


def _call(function: Mapping[str, Any], by_schema: bool, form: Form) -> Format:
    arguments: Format = {"type": "any_text"}
    if by_schema:
        arguments = {
            "type": "json_schema",
            "json_schema": _parameters(function),
            "style": _STYLES[form.space],
            "max_whitespace_cnt": MAX_WHITESPACE,
        }
    return {
        "type": "tag",
        "begin": f'<{DSML}{form.space}{INVOKE} name="{function["name"]}">\n',
        "content": arguments,
        "end": f"</{DSML}{form.space}{INVOKE}>\n",
    }


def _tag(content: Format, reasoning: bool) -> Format:
    if reasoning:
        text = {"type": "any_text", "excludes": _NO_THINKING}
        thought = {"type": "tag", "begin": "", "content": text, "end": str(END_THINK)}
        content = _sequence(thought, content)
    return {"type": "structural_tag", "format": content}


def _sequence(*elements: Format) -> Format:
    return {"type": "sequence", "elements": list(elements)}


def _constant(value: str) -> Format:
    return {"type": "const_string", "value": value}
