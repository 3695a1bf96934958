"""OpenAI-style messages, read and checked: every error names the message index and the field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .tokens import JSON_FORMAT, SCHEMA_FORMAT, TASKS, Control
from .tools import functions

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
    tools: list[Mapping[str, Any]]
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
    calls = message.get("tool_calls") if role == "assistant" else None
    if calls is not None and not isinstance(calls, list | tuple):
        raise ValueError(f"{where}.tool_calls: must be a list, not {calls!r:.80}")
    carries = role in ("system", "developer")
    return Turn(
        role=role,
        content=_text(message.get("content"), f"{where}.content"),
        reasoning=_text(reasoning, f"{where}.reasoning_content") if role == "assistant" else "",
        calls=[_call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls or ())],
        call_id=_id(message.get("tool_call_id"), f"{where}.tool_call_id"),
        task=TASKS[task] if task else None,
        tools=functions(message.get("tools"), f"{where}.tools") if carries else [],
        response_format=format_text(message.get("response_format"), f"{where}.response_format")
        if carries
        else "",
        prefix=bool(message.get("prefix")),
    )


def _text(content: Any, where: str) -> str:
    """The text of a content field: a string, null, or text parts (joined by an empty line)."""
    if content is None:
        return ""
    if isinstance(content, list | tuple):
        return "\n\n".join(_part_text(part, f"{where}[{n}]") for n, part in enumerate(content))
    return _string(content, where)


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, Mapping):
        return _string(part, where)
    kind = part.get("type", "text")
    key = _TEXT_PARTS.get(kind) if isinstance(kind, str) else None
    if key is None:
        raise ValueError(
            f"{where}.type: {kind!r:.80} is not one of {', '.join(_TEXT_PARTS)}; "
            "DeepSeek-V4 reads text only"
        )
    return _string(part.get(key), f"{where}.{key}")


def _string(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where}: must be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not valid Unicode: {error}") from None
    return text


def _call(call: Any, where: str) -> Call:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise ValueError(f"{where}.function: must be an object, not {function!r:.80}")
    call_id = _id(call.get("id"), f"{where}.id")
    name = _string(function.get("name"), f"{where}.function.name")
    arguments = function.get("arguments")
    where = f"{where}.function.arguments"
    if arguments is None or isinstance(arguments, str):
        arguments = _arguments(_text(arguments, where))
    elif isinstance(arguments, Mapping):
        to_json(arguments, where)
    else:
        raise ValueError(f"{where}: must be JSON text or an object, not {arguments!r:.80}")
    return Call(call_id, name, arguments)


def _id(value: Any, where: str) -> str | None:
    return None if value is None else _string(value, where)


def _arguments(text: str) -> Mapping[str, Any]:
    """Decode JSON text; what is not an object becomes one text parameter, `arguments`."""
    if not text.strip():
        return {}
    try:
        decoded = json.loads(text, parse_constant=_reject)
        if "\\u" in text:
            to_json(decoded)  # an escaped lone surrogate is JSON, but not text
    except (ValueError, RecursionError):
        decoded = None
    return decoded if isinstance(decoded, dict) else {"arguments": text}


def _reject(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


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
    return SCHEMA_FORMAT.replace("{schema}", to_json(schema, field))


def json_schema(response_format: Mapping[str, Any]) -> Any:
    """The schema of a response format of type json_schema, None where it has none."""
    named = response_format.get("json_schema")
    return named.get("schema") if isinstance(named, Mapping) else None


def to_json(value: Any, where: str = "arguments") -> str:
    """JSON as the authors write it into prompts: ", " and ": ", text unescaped."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    return _string(text, where)
