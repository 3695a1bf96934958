"""The arguments of one streamed call: parameters in, pieces of one JSON object out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from json.encoder import encode_basestring
from typing import Any

WRAPPERS = ("arguments", "input")
"""Parameter names under which models wrap all arguments as one object."""


class Arguments:
    """Writes a JSON object piece by piece; every method returns the text to append.

    Text values stream. JSON values wait until they are whole: only then it is known whether
    they are JSON, or text that must become a string. `schemas` are the declared parameters by
    name, empty where unknown.
    """

    def __init__(self, schemas: Mapping[str, Any]) -> None:
        self._schemas = schemas
        self._names: set[str] = set()
        self._name = ""
        self._types: set[str] = set()
        self._held: list[str] | None = None
        self._wrapped: str | None = None
        self._separator = ""

    def expects(self, name: str | None) -> bool:
        """Whether `name` is a declared parameter that has not come yet."""
        return name in self._schemas and name not in self._names

    def open(self, name: str, string: str | None) -> str:
        """Begin a parameter; `string` is its attribute, None where the model left it out."""
        out = self._plain(self._wrapped) if self._wrapped is not None else ""
        self._wrapped = None
        if string is None:
            self._types = declared_types(self._schemas.get(name))
        else:
            self._types = {"string"} if string == "true" else set()
        self._name = name
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

    def close(self) -> str:
        """End the parameter."""
        if self._held is None:
            return '"'
        raw, self._held = "".join(self._held), None
        if self._may_wrap() and self._unwraps(_decode(raw)):
            self._wrapped = raw
            return ""
        return self._plain(raw)

    def merge(self, raw: str) -> str | None:
        """Take a JSON object written in place of parameters; None where `raw` is none."""
        decoded = _decode(raw)
        if self._names or not isinstance(decoded, dict):
            return None
        if len(decoded) == 1:
            self._name, inner = next(iter(decoded.items()))
            if self._may_wrap(first=True) and self._unwraps(inner):
                decoded, raw = inner, json.dumps(inner, ensure_ascii=False)
        if decoded:
            self._names.update(decoded)
            self._separator = ", "
        return _inside(raw)

    def finish(self) -> str:
        """End the object, after the last parameter."""
        return ("" if self._wrapped is None else _inside(self._wrapped)) + "}"

    def cut(self) -> str:
        """What is known of a value, or of a body, that the output broke off in."""
        if self._wrapped is not None:
            return _inside(self._wrapped)
        if self._held is None:
            return ""
        raw = "".join(self._held)
        if self._types == {"string"}:
            return self._key() + encode_basestring(raw)[:-1]
        return self._key() + raw.lstrip()

    def cut_body(self, raw: str) -> str | None:
        """As `merge`, for an object that the output broke off in."""
        raw = raw.lstrip()
        return raw[1:] if raw.startswith("{") and not self._names else None

    def _key(self) -> str:
        key = f"{self._separator}{encode_basestring(self._name)}: "
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
        alone = first or self._names == {self._name}
        undeclared = bool(self._schemas) and self._name not in self._schemas
        return alone and undeclared and self._name in WRAPPERS

    def _unwraps(self, value: Any) -> bool:
        return isinstance(value, dict) and value.keys() <= self._schemas.keys()


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
        return json.loads(raw, parse_constant=_reject)
    except (ValueError, RecursionError):
        return _INVALID


def _reject(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _inside(raw: str) -> str:
    """The members of a JSON object, without its braces."""
    return raw.strip()[1:-1]
