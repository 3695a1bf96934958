"""The arguments of one streamed call: parameters in, pieces of one JSON object out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from json.encoder import encode_basestring
from typing import Any

from . import json_text
from .tools import properties, required

WRAPPERS = ("arguments", "input")
"""Parameter names under which models wrap all arguments: as one object, or the only one alone."""

NAMELESS = WRAPPERS[0]
"""What a parameter without a name is called: the format cannot hold an empty one in the history."""

_WRAPPED = re.compile(rf'\{{\s*"(?:{"|".join(WRAPPERS)})"\s*:')


class Arguments:
    """Writes a JSON object piece by piece; every method returns the text to append.

    Text values stream. JSON values wait until they are whole: only then it is known whether
    they are JSON, or text that must become a string. `function` is the tool that is called, empty
    where unknown.
    """

    def __init__(self, function: Mapping[str, Any]) -> None:
        self._schemas = properties(function)
        self._required = required(function)
        self._names: set[str] = set()
        self._name = ""
        self._types: set[str] = set()
        self._held: list[str] | None = None
        self._is_whole: bool | None = None
        self._wrapped: tuple[str, str] | None = None
        self._separator = ""

    @property
    def empty(self) -> bool:
        """Whether no parameter and no object came so far."""
        return not self._separator and not self._names

    @property
    def needs_none(self) -> bool:
        """Whether a call without arguments is what the tool expects, as far as is known."""
        return not self._required

    def expects(self, name: str | None) -> bool:
        """Whether `name` is a declared parameter that has not come yet."""
        return name in self._schemas and name not in self._names

    def open(self, name: str, string: str | None) -> str:
        """Begin a parameter; `string` is its attribute, None where the model left it out."""
        out = self._plain(self._wrapped[0]) if self._wrapped is not None else ""
        self._wrapped = None
        declared = declared_types(self._schemas.get(name))
        self._types = {"true": {"string"}, "false": set[str]()}.get(
            (string or "").lower(), declared
        )
        self._name, self._is_whole = name, None
        self._names.add(name)
        if self._types == {"string"} and not self._may_wrap():
            self._held = None
            return out + self._key() + '"'
        self._held = []
        return out

    def value(self, text: str) -> str:
        if self._held is None:
            return encode_basestring(text)[1:-1]
        self._held.append(text)
        return ""

    def is_whole(self) -> bool:
        """Whether the value so far is JSON, so that what comes next is not part of it. Its first
        closing tag decides, or a long value would be decoded again and again."""
        if self._is_whole is None:
            may_be = self._held is not None and self._types != {"string"}
            self._is_whole = may_be and _decode("".join(self._held or ())) is not _INVALID
        return self._is_whole

    def close(self) -> str:
        """End the parameter."""
        if self._held is None:
            return '"'
        raw, self._held = "".join(self._held), None
        if self._may_wrap() and (members := self._unwrapped(raw)) is not None:
            self._wrapped = raw, members
            return ""
        return self._plain(raw)

    def merge(self, raw: str) -> tuple[str, str] | None:
        """Take a JSON object written in place of parameters: the text to append, and what follows
        the object; None where `raw` does not begin with one."""
        raw = raw.lstrip()
        try:
            decoded, end = json_text.decode_start(raw)
        except ValueError:
            return None
        if not self.empty or not isinstance(decoded, dict):
            return None
        members, rest = raw[1 : end - 1], raw[end:]
        if wrapped := _WRAPPED.match(raw):
            (self._name, *_) = decoded
            inner = self._unwrapped(raw[wrapped.end() : end - 1]) if self._may_wrap(True) else None
            members = members if inner is None else inner
        self._names.update(decoded)
        self._separator = ", " if members.strip() else ""
        return members, rest

    def finish(self) -> str:
        """End the object, after the last parameter."""
        return ("" if self._wrapped is None else self._wrapped[1]) + "}"

    def cut(self) -> str:
        """What is known of a value, or of a body, that the output broke off in."""
        if self._wrapped is not None:
            return self._wrapped[1]
        if self._held is None:
            return ""
        raw = "".join(self._held)
        if self._types == {"string"}:
            return self._key() + encode_basestring(raw)[:-1]
        return self._key() + raw.lstrip()

    def _key(self) -> str:
        key = _key(self._name, self._separator)
        self._separator = ", "
        return key

    def _plain(self, raw: str) -> str:
        decoded = _decode(raw)
        if decoded is not _INVALID and self._admits(decoded):
            return self._key() + raw.strip()
        return self._key() + encode_basestring(raw)

    def _admits(self, value: Any) -> bool:
        """Whether JSON is what the parameter wants: text such as 12 may be meant as a string."""
        return "string" not in self._types or bool(_JSON_TYPES[type(value)] & self._types)

    def _may_wrap(self, first: bool = False) -> bool:
        alone = first or (self._names == {self._name} and not self._separator)
        undeclared = bool(self._schemas) and self._name not in self._schemas
        return alone and undeclared and self._name in WRAPPERS

    def _unwrapped(self, raw: str) -> str | None:
        """The members that a wrapper's value stands for: those of an object of declared names, or
        the tool's only required text. None where it is neither."""
        decoded = _decode(raw)
        if isinstance(decoded, dict):
            return _inside(raw) if decoded.keys() <= self._schemas.keys() else None
        only = self._required[0] if len(self._required) == 1 else ""
        if declared_types(self._schemas.get(only)) != {"string"}:
            return None
        if decoded is None or raw.lstrip().startswith(("{", "[")):
            return None
        quoted = isinstance(decoded, str) and self._types != {"string"}
        return _key(only, "") + (raw.strip() if quoted else encode_basestring(raw))


def _key(name: str, separator: str) -> str:
    return f"{separator}{encode_basestring(name)}: "


_INVALID = object()
_JSON_TYPES: dict[type, set[str]] = {
    str: set(),  # a quoted string where text is expected: the quotes are part of the text
    int: {"integer", "number"},
    float: {"number"},
    bool: {"boolean"},
    list: {"array"},
    dict: {"object"},
    type(None): {"null"},
}


def declared_types(schema: Any) -> set[str]:
    """The JSON types a parameter's schema allows; empty where it does not tell."""
    if not isinstance(schema, Mapping):
        return set()
    declared = schema.get("type")
    if isinstance(declared, str):
        return {declared}
    if isinstance(declared, list):
        return {name for name in declared if isinstance(name, str)}
    types: set[str] = set()
    for choice in _listed(schema, "enum"):
        types |= {"string"} if isinstance(choice, str) else _JSON_TYPES.get(type(choice), set())
    for option in [*_listed(schema, "anyOf"), *_listed(schema, "oneOf")]:
        types |= declared_types(option)
    return types


def _listed(schema: Mapping[str, Any], keyword: str) -> list[Any]:
    found = schema.get(keyword)
    return found if isinstance(found, list) else []


def _decode(raw: str) -> Any:
    """The value of strict JSON text, `_INVALID` for anything else (NaN, too deep, not JSON)."""
    try:
        return json_text.decode(raw)
    except ValueError:
        return _INVALID


def _inside(raw: str) -> str:
    """The members of a JSON object, without its braces."""
    return raw.strip()[1:-1]
