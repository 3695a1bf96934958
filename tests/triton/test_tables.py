"""Launch tables: rows for chips that there are, each with its reason."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
from dataclasses import is_dataclass

from dsv4_plugin import kernels
from dsv4_plugin.kernels import launch as launches
from dsv4_plugin.kernels.launch import FAMILY, pick


def tables() -> dict[str, dict[str, object]]:
    """Every launch table of the kernels: dicts of frozen dataclasses by chip."""
    known = {"any", *FAMILY, *FAMILY.values()}
    found = {}
    for module in pkgutil.walk_packages(kernels.__path__, "dsv4_plugin.kernels."):
        for name, table in vars(importlib.import_module(module.name)).items():
            if isinstance(table, dict) and table and all(map(is_dataclass, table.values())):
                assert set(table) <= known, f"{module.name}.{name} names chips that there are not"
                found[f"{module.name}.{name}"] = table
    return found


def test_every_row_is_some_chips(monkeypatch):
    """And every chip has one: 'any' for those that no table names."""
    chips = (*FAMILY, "sm75")
    for name, table in tables().items():
        picked = []
        for chip in chips:
            monkeypatch.setattr(launches, "architecture", lambda chip=chip: chip)
            picked.append(pick(table))
        assert {id(row) for row in picked} >= {id(row) for row in table.values()}, name


def reasons(source: str, variable: str) -> dict[str, str]:
    """By row of a table: the comments on its lines and right above."""
    lines, found = source.split("\n"), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == variable:
            for key, row in zip(node.value.keys, node.value.values, strict=True):
                first = key.lineno - 1
                while lines[first - 1].lstrip().startswith("#"):
                    first -= 1
                text = "\n".join(lines[first : row.end_lineno])
                found[ast.literal_eval(key)] = " ".join(re.findall("#.*", text))
    return found


def test_every_row_has_its_reason():
    for name, table in tables().items():
        module, variable = name.rsplit(".", 1)
        said = reasons(inspect.getsource(importlib.import_module(module)), variable)
        assert list(said) == list(table)
        for row, reason in said.items():
            assert re.search("measured|compiled|guessed", reason), f"{name}: {row}"
