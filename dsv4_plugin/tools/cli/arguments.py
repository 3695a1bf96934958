"""What several commands ask of their arguments."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsv4_plugin.fields import Number, Whole
from dsv4_plugin.json_file import parse_json, read_json


def check_numbers(args: argparse.Namespace, limits: Mapping[str, Whole | Number]) -> None:
    """Raise ValueError, naming the option as it is typed, where one is outside its limits."""
    for name, allowed in limits.items():
        value = getattr(args, name)
        if value is not None and not allowed.permits(value):
            raise ValueError(f"--{name.replace('_', '-')} is {value}; {allowed}")


def checkpoint_path(text: str, what: str = "a checkpoint folder") -> Path:
    """A path that exists. Raises ValueError, which says what to do with a name of the hub."""
    path = Path(text)
    if not path.exists():
        raise ValueError(
            f"{text} does not exist; give {what} (names of the hub are not looked up: "
            "`hf download NAME --local-dir DIR` fetches one)"
        )
    return path


def read_text(file: str) -> str:
    """A file's text, or what comes on standard input for `-`. Raises ValueError or OSError."""
    try:
        return sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{_named(file)} is not text in UTF-8") from None


def json_of(file: str) -> Any:
    """The JSON of a file, or of standard input for `-`. Raises ValueError or OSError."""
    return parse_json(read_text(file), _named(file)) if file == "-" else read_json(file)


def _named(file: str) -> str:
    return "standard input" if file == "-" else file
