"""What fields of config.json may be: tables of names and allowed values, and their check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv4_plugin.json_file import as_object, printable, shown


@dataclass(frozen=True)
class Only:
    """One of a few values, of their type; what may have a fraction may be written without one."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)

    def permits(self, value: Any) -> bool:
        return any(
            value == v and (type(value) is type(v) or (type(value) is int and type(v) is float))
            for v in self.values
        )

    def __str__(self) -> str:
        if not self.values:
            return "it must be left out"
        *others, last = map(repr, self.values)
        return f"allowed are {', '.join(others)} and {last}" if others else f"allowed is {last}"


@dataclass(frozen=True)
class Whole:
    """An integer from low to high, a multiple of `unit`."""

    low: int
    high: int
    unit: int = 1

    def permits(self, value: Any) -> bool:
        return type(value) is int and self.low <= value <= self.high and value % self.unit == 0

    def __str__(self) -> str:
        kind = "integers" if self.unit == 1 else f"multiples of {self.unit}"
        return f"allowed are {kind} from {self.low:,} to {self.high:,}"


@dataclass(frozen=True)
class Number:
    """Any number from low to high."""

    low: float
    high: float

    def permits(self, value: Any) -> bool:
        return type(value) in (int, float) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"allowed are numbers from {self.low:g} to {self.high:g}"


@dataclass(frozen=True)
class Each:
    """A list of which every entry is allowed."""

    entry: Only | Whole
    longest: int

    def permits(self, value: Any) -> bool:
        return isinstance(value, list) and len(value) <= self.longest

    def __str__(self) -> str:
        return f"it must be a list of at most {self.longest:,} entries"


@dataclass(frozen=True)
class Unread:
    """Any value: nothing here depends on it."""


@dataclass(frozen=True)
class Table:
    """An object with fields of its own."""

    fields: Mapping[str, Any]
    """Name -> Allowed."""


Allowed = Only | Whole | Each | Unread | Table


def check_fields(found: Mapping[str, Any], table: Table, where: str = "") -> None:
    """Raise ValueError, naming the field, where one is unknown or not what the table allows.

    null says nothing: such a field counts as left out. Names that begin with `_` are notes of the
    program that wrote the file.
    """
    for name, value in found.items():
        if value is None or name.startswith("_"):
            continue
        allowed = table.fields.get(name)
        if allowed is None:
            raise ValueError(
                f"{where}{printable(name)} is {shown(value)}; this version knows no such field of "
                "config.json, and it may ask for another network: remove it if it is harmless"
            )
        _check(f"{where}{name}", value, allowed)


def _check(name: str, value: Any, allowed: Allowed) -> None:
    match allowed:
        case Unread():
            return
        case Table():
            check_fields(as_object(value, name), allowed, f"{name}.")
            return
    if not allowed.permits(value):
        raise ValueError(f"{name} is {shown(value)}; {allowed}")
    if isinstance(allowed, Each):
        for i, entry in enumerate(value):
            _check(f"{name}[{i}]", entry, allowed.entry)
