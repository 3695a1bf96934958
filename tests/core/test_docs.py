"""Tables of commands, variables and options in the documents against the code."""

from __future__ import annotations

import argparse
import re

from dsv4_plugin import env
from dsv4_plugin.tools.bench.datasets import GENERATED, INPUT
from dsv4_plugin.tools.bench.measures import BUSY, LATE
from dsv4_plugin.tools.cli import COMMANDS, bench
from dsv4_plugin.tools.convert import CONVERSIONS
from dsv4_plugin.tools.formats import FORMATS
from dsv4_plugin.tools.plan import GPUS
from lab.paths import ROOT


def text(name):
    return (ROOT / name).read_text()


def quoted(words):
    return re.findall(r"`([^`]+)`", words)


def test_variables():
    """README has each, with its values, and the documents speak of no other."""
    rows = re.findall(r"^\| `(DSV4_\w+)` \| ([^|]+) \|", text("README.md"), re.M)
    assert {name: tuple(quoted(values)) for name, values in rows} == {
        variable.name: variable.allowed for variable in env.VARIABLES
    }
    for variable in env.VARIABLES:
        if variable is not env.EFFORT:  # as README says
            assert variable.default == variable.allowed[0]
    assert env.EFFORT.default == "high"
    documents = [text("README.md"), *(path.read_text() for path in ROOT.glob("docs/*.md"))]
    named = set(re.findall(r"\bDSV4_[A-Z_]+", " ".join(documents)))
    of_tests = {"DSV4_TEST_GPU", "DSV4_TESTING"}
    assert named - of_tests == {variable.name for variable in env.VARIABLES}


def test_every_variable_is_in_the_list():
    assert set(env.VARIABLES) == {v for v in vars(env).values() if isinstance(v, env.Choice)}


def test_commands():
    rows = re.findall(r"^\| (.*`dsv4 [^|]*(?:\\\|[^|]*)*) \|", text("README.md"), re.M)
    named = {quoted(row)[0].split()[1] for row in rows}
    assert named == set(COMMANDS)


def test_options_of_bench():
    rows = re.findall(r"^\| `(--[a-z-]+)` \|", text("docs/bench.md"), re.M)
    parser = argparse.ArgumentParser(add_help=False)
    bench.add_arguments(parser)
    known = [option for action in parser._actions for option in action.option_strings]
    assert sorted(rows) == sorted(known)
    assert f"`{bench.CONCURRENCY}`" in text("docs/bench.md")


def test_datasets_of_bench():
    document = text("docs/bench.md")
    rows = re.findall(r"^\| `(\w+)` \| .*?(\d+)? \|$", document, re.M)
    found = {name: tokens for name, tokens in rows if name in GENERATED}
    assert found == {name: str(INPUT.get(name, "")) for name in GENERATED}
    marks = re.search(r"in one of 20 looks by more than (\d+) ms", document)
    assert int(marks[1]) == LATE * 1000
    assert f"more than {BUSY * 100:.0f} %" in document


def test_formats():
    document = text("docs/checkpoints.md")
    found = re.search(r"make --preset tiny --format (\S+) .*# or (.*)", document)
    assert {found[1], *found[2].split(", ")} == set(FORMATS)
    found = re.search(r"convert DIR --format (\S+) .*# or (.*); from bfloat16", document)
    assert {found[1], *found[2].split(", ")} == set(CONVERSIONS)


def test_gpus():
    found = re.search(r"known GPUs: ([^;]*), in any spelling", text("docs/parallel.md"))
    assert quoted(found[1]) == list(GPUS)
