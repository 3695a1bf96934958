"""JSON as users hand it over: what is wrong with a file is said in one sentence that names it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

LARGEST = 100 << 20
"""Bytes; the largest header of a safetensors file, and more than any other file here needs."""


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises ValueError, and OSError as reading a file does."""
    path = Path(path)
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; allowed are {LARGEST:,}")
    return parse_json(path.read_bytes(), str(path))


def read_object(path: str | Path) -> dict[str, Any]:
    """The same where it must be an object."""
    return as_object(read_json(path), str(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """JSON in which no object names a key twice: one of the two would be lost in silence."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not JSON: it is not text in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON that can be read: {error}") from None


def as_object(value: Any, where: str) -> dict[str, Any]:
    """The value, if it is a JSON object. Raises ValueError naming where it stands."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {shown(value)}; it must be a JSON object")
    return value


def shown(value: Any) -> str:
    """A value for a message: as Python writes it, cut where it is long."""
    return _cut(ascii(value) if not repr(value).isprintable() else repr(value))


def printable(name: str) -> str:
    """A name for a message: as it is, if it can be printed on a line."""
    return _cut(name if name.isprintable() else ascii(name))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{shown(twice)} stands in it twice")
    return found
