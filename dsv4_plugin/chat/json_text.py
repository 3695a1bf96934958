"""JSON as RFC 8259 has it, read and written: no NaN, no number that only infinity can hold."""

from __future__ import annotations

import json
from math import isinf
from typing import Any


def _reject(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _float(text: str) -> float:
    number = float(text)
    if isinf(number):
        _reject(text)
    return number


_DECODER = json.JSONDecoder(parse_constant=_reject, parse_float=_float)


def decode(text: str) -> Any:
    """The value of JSON text. Raises ValueError for anything else, too deep nesting included."""
    text = text.strip(" \t\r\n")
    value, end = decode_start(text)
    if end < len(text):
        raise ValueError(f"not JSON after character {end}")
    return value


def decode_start(text: str) -> tuple[Any, int]:
    """The value that JSON text begins with, and where it ends; raises as `decode` does."""
    try:
        return _DECODER.raw_decode(text)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def encode(value: Any, where: str) -> str:
    """JSON as the authors write it into prompts: ", " and ": ", text unescaped.

    Raises ValueError naming `where` for what JSON cannot hold, or UTF-8.
    """
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    return text
