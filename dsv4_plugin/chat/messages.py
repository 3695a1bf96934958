"""OpenAI-style messages, read and checked: every error names the message index and the field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import json_text
from .options import read_flag
from .tokens import JSON_FORMAT, SCHEMA_FORMAT, TASKS, Control
from .tools import check_name, schema_lines

ROLES = ("system", "developer", "user", "assistant", "tool", "latest_reminder")
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


@dataclass(frozen=True)
class Call:
    """A tool call of the history; `arguments` is the decoded JSON object."""

    id: str | None
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Turn:
    """One checked message."""

    role: str
    content: str
    reasoning: str
    calls: list[Call]
    call_id: str | None
    task: Control | None
    tools: list[str]
    response_format: str
    prefix: bool


def read_message(message: Mapping[str, Any], index: int) -> Turn:
    """Check one OpenAI-style message; `reasoning` and `reasoning_content` mean the same."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: must be an object, not {message!r:.80}")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"{where}.role: {role!r:.80} is not one of {', '.join(ROLES)}")
    task = message.get("task")
    if task is not None and task not in list(TASKS):
        raise ValueError(f"{where}.task: {task!r:.80} is not one of {', '.join(TASKS)}")
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    carries = role in ("system", "developer")
    return Turn(
        role=role,
        content=_content(message, role, where),
        reasoning=_text(reasoning, f"{where}.reasoning_content") if role == "assistant" else "",
        calls=_calls(message, where) if role == "assistant" else [],
        call_id=_id(message.get("tool_call_id"), f"{where}.tool_call_id"),
        task=TASKS[task] if task else None,
        tools=schema_lines(message.get("tools"), f"{where}.tools") if carries else [],
        response_format=format_text(message.get("response_format"), f"{where}.response_format")
        if carries
        else "",
        prefix="prefix" in message and read_flag(message["prefix"], f"{where}.prefix"),
    )


def _content(message: Mapping[str, Any], role: str, where: str) -> str:
    """The text of a message; a refusal is what the assistant said, too."""
    content = _text(message.get("content"), f"{where}.content")
    if role != "assistant" or message.get("refusal") is None:
        return content
    refusal = read_string(message["refusal"], f"{where}.refusal")
    return f"{content}\n\n{refusal}" if content else refusal


def _text(content: Any, where: str) -> str:
    """The text of a content field: a string, null, or text parts (joined by an empty line)."""
    if content is None:
        return ""
    if isinstance(content, list | tuple):
        return "\n\n".join(_part_text(part, f"{where}[{n}]") for n, part in enumerate(content))
    return read_string(content, where)


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, Mapping):
        return read_string(part, where)
    kind = part.get("type", "text")
    key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        raise ValueError(
            f"{where}.type: {kind!r:.80} is not one of {', '.join(_TEXT_PARTS)}; "
            "DeepSeek-V4 reads text only"
        )
    return read_string(part.get(key), f"{where}.{key}")


def read_string(text: Any, where: str) -> str:
    """Text that UTF-8 can hold; raises ValueError naming `where` for anything else."""
    if not isinstance(text, str):
        raise ValueError(f"{where}: must be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not valid Unicode: {error}") from None
    return text


def _calls(message: Mapping[str, Any], where: str) -> list[Call]:
    """The calls of an assistant message: `tool_calls`, or the one of OpenAI's old API."""
    calls, old = message.get("tool_calls"), message.get("function_call")
    if calls is not None and not isinstance(calls, list | tuple):
        raise ValueError(f"{where}.tool_calls: must be a list, not {calls!r:.80}")
    if old is None:
        return [_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls or ())]
    if calls:
        raise ValueError(f"{where}.function_call: must be null beside tool_calls")
    return [_function(old, None, f"{where}.function_call")]


def _call(call: Any, where: str) -> Call:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(f"{where}.function: must be an object, not {function!r:.80}")
    return _function(function, _id(call.get("id"), f"{where}.id"), f"{where}.function")


def _function(function: Any, call_id: str | None, where: str) -> Call:
    if not isinstance(function, Mapping):
        raise ValueError(f"{where}: must be an object, not {function!r:.80}")
    name = read_string(function.get("name"), f"{where}.name")
    check_name(name, f"{where}.name")
    arguments = function.get("arguments")
    where = f"{where}.arguments"
    if arguments is None or isinstance(arguments, str):
        arguments = _arguments(_text(arguments, where))
    elif isinstance(arguments, Mapping):
        json_text.encode(arguments, where)
    else:
        raise ValueError(f"{where}: must be JSON text or an object, not {arguments!r:.80}")
    for argument in arguments:
        check_name(argument, where)
    return Call(call_id, name, arguments)


def _id(value: Any, where: str) -> str | None:
    return None if value is None else read_string(value, where)


def _arguments(text: str) -> Mapping[str, Any]:
    """Decode JSON text; what is not an object becomes one text parameter, `arguments`."""
    if not text.strip():
        return {}
    try:
        decoded = json_text.decode(text)
        if "\\u" in text:
            json_text.encode(decoded, "")  # an escaped lone surrogate is JSON, but not text
    except ValueError:
        decoded = None
    return decoded if isinstance(decoded, dict) else {"arguments": text}


def format_text(response_format: Mapping[str, Any] | None, field: str) -> str:
    """What the system text says about `response_format`, OpenAI's object."""
    if response_format is None:
        return ""
    kind = response_format.get("type") if isinstance(response_format, Mapping) else None
    if kind in ("text", "regex", "structural_tag"):
        return ""
    if kind == "json_object":
        return JSON_FORMAT
    schema = json_schema(response_format) if kind == "json_schema" else None
    if schema is None:
        raise ValueError(
            f"{field}: must be of type text, json_object, or json_schema with json_schema.schema, "
            f"not {response_format!r:.80}"
        )
    return SCHEMA_FORMAT.replace("{schema}", json_text.encode(schema, field))


def json_schema(response_format: Mapping[str, Any]) -> Any:
    """The schema of a response format of type json_schema, None where it has none."""
    named = response_format.get("json_schema")
    return named.get("schema") if isinstance(named, Mapping) else None
