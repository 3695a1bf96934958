"""OpenAI tool lists, read and checked in one place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from . import json_text

_UNFIT = re.compile(r"[\">\r\n\ud800-\udfff]")


def functions(
    tools: Sequence[Mapping[str, Any]] | None, field: str = "tools"
) -> list[Mapping[str, Any]]:
    """The `function` objects of an OpenAI tool list (nested, or flat as in the Responses API).

    Raises ValueError, naming the index and field, for anything that is not a named function.
    """
    if not isinstance(tools, list | tuple | None):
        raise ValueError(f"{field}: must be a list, not {tools!r:.80}")
    found = []
    for index, tool in enumerate(tools or ()):
        where = f"{field}[{index}]"
        if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
            raise ValueError(f"{where}: must be an object of type 'function', not {tool!r:.80}")
        function = tool.get("function", tool)
        if not isinstance(function, Mapping):
            raise ValueError(f"{where}.function: must be an object, not {function!r:.80}")
        name = function.get("name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where}.function.name: must be a non-empty string, not {name!r:.80}")
        found.append(function)
    return found


def schema_lines(tools: Sequence[Mapping[str, Any]] | None, field: str = "tools") -> list[str]:
    """What a prompt says of each tool; raises as `functions` does, and for what neither JSON nor
    an attribute can hold."""
    return [
        _schema_line(function, f"{field}[{index}].function")
        for index, function in enumerate(functions(tools, field))
    ]


def _schema_line(function: Mapping[str, Any], where: str) -> str:
    declared = properties(function)
    if not _fit([function["name"], *declared]):
        check_name(function["name"], f"{where}.name")
        for name in declared:
            check_name(name, f"{where}.parameters.properties")
    schema = {
        "name": function["name"],
        "description": function.get("description") or "",
        "parameters": function.get("parameters") or {},
    }
    return json_text.encode(schema, where)


def _fit(names: Sequence[Any]) -> bool:
    """Whether all names pass `check_name`, asked at once."""
    try:
        return all(names) and not _UNFIT.search(" ".join(names))
    except TypeError:
        return False


def check_name(name: Any, where: str) -> None:
    """Raise ValueError for a name of a tool or argument that does not fit into an attribute."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: must be a non-empty string, not {name!r:.80}")
    if not _fit([name]):
        raise ValueError(
            f"{where}: {name!a:.80} cannot be a name in DeepSeek-V4's format: "
            "no quote, >, line break or lone surrogate may be in it"
        )


def without_tools(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages for tool_choice none: system and developer messages carry no tools either."""
    return [
        {key: value for key, value in message.items() if key != "tools"}
        if isinstance(message, Mapping)
        else message
        for message in messages
    ]


def properties(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schemas of a function's parameters by name; empty where it declares none."""
    parameters = function.get("parameters")
    found = parameters.get("properties") if isinstance(parameters, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def required(function: Mapping[str, Any]) -> list[str]:
    """The names of the parameters that a function cannot do without."""
    parameters = function.get("parameters")
    found = parameters.get("required") if isinstance(parameters, Mapping) else None
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []
