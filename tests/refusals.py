"""What the code says when it refuses something, read from its source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from dsv4_plugin.config import FIELDS
from lab.paths import ROOT

REFUSALS = ("ValueError", "NotImplementedError")
FIELD = re.compile(r"(?<![\w.-])[a-z]+(?:_[a-z]+)+(?!\w)")
"""A name of Python's: what follows a dash or a dot is an option, or a part of one."""


def sentences(*folders: str) -> Iterator[tuple[Path, int, str]]:
    """File, line and text of every refusal, without what is filled in."""
    for path in sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            if getattr(node.exc.func, "id", "") not in REFUSALS:
                continue
            texts = [n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant)]
            yield path, node.lineno, " ".join(text for text in texts if isinstance(text, str))


def named(fields: Iterable[str], *folders: str) -> list[str]:
    """Refusals that name one of an engine's Python fields, where a user typed an option. (Names
    that config.json has too are left out.)"""
    known = {field for field in fields if "_" in field} - set(FIELDS.fields)
    return [
        f"{path.relative_to(ROOT)}:{line}: {', '.join(found)}"
        for path, line, text in sentences(*folders)
        if (found := sorted(known & set(FIELD.findall(text))))
    ]
