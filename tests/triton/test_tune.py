"""`python -m benchmarks.tune`: an operation that torch computes, with times that are told."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

import pytest
import torch

from benchmarks import tune
from dsv4_plugin.kernels.launch import FAMILY, pick
from dsv4_plugin.tools.kernel_work import Work
from lab.kit import mode


@dataclass(frozen=True)
class Inner:
    stages: int


@dataclass(frozen=True)
class Launch:
    warps: int
    inner: tuple[Inner, ...]
    wrong: bool = False


MICROSECONDS = {(4, 2): 10.0, (8, 2): 8.0, (16, 2): 9.0, (8, 3): 7.95, (8, 4): 4.0}
"""By warps and stages."""
FIELDS = {"wrong": (True,), "warps": (4, 8, 16, 32), "inner.0.stages": (2, 3, 4)}


@pytest.fixture
def op(gpu) -> tune.Op:
    table = {"any": Launch(4, (Inner(2),))}

    def launch() -> list[torch.Tensor]:
        row = pick(table)
        if row.warps == 32:
            raise RuntimeError("out of resources")
        return [torch.ones(4) * (1.5 if row.wrong else 1.0)]

    return tune.Op(table, {"ones": lambda world: Work(launch, launch, 16)}, STEPS, FIELDS)


STEPS = ("decode of 1", "decode of 64")


def test_search_finds_the_fastest_right_row(op, monkeypatch):
    def seconds(one: Work) -> float:
        row = pick(op.table)
        return 1e-9 if row.wrong else 1e-6 * MICROSECONDS[row.warps, row.inner[0].stages]

    monkeypatch.setattr(tune, "seconds_of", seconds)
    seen = {}
    made = tune.cases(op, torch.device("meta"))
    row, best = tune.search(op, made, lambda variant, found: seen.update({variant: found}))
    assert row == Launch(8, (Inner(4),))
    assert [f.seconds for f in best.values()] == pytest.approx([4e-6, 4e-6])
    assert list(made) == ["ones, decode of 1", "ones, decode of 64"]
    assert seen["wrong = True"]["ones, decode of 1"].error.startswith("output 0: off by 0.5")
    assert seen["warps = 32"]["ones, decode of 1"].error == "RuntimeError: out of resources"
    assert list(seen) == [
        "as it is", "wrong = True", "warps = 8", "warps = 16", "warps = 32", "inner.0.stages = 3",
        "inner.0.stages = 4",
    ]  # fmt: skip
    assert op.table == {"any": Launch(4, (Inner(2),))}
    assert tune.reason(best) == "ones, decode of 1 4 us; ones, decode of 64 4 us"


def test_other_bits_are_said(op, monkeypatch):
    monkeypatch.setattr(tune, "seconds_of", lambda one: 1e-6)
    make = tune.cases(op, torch.device("meta"))["ones, decode of 1"]
    near = [torch.full((4,), 1.0 + 2.0**-20)]
    found = tune.measure(op, pick(op.table), make, near)
    assert not found.same_bits
    assert not found.error
    assert "other bits" in tune.described(found, 1e-7)


def test_a_row_is_put_back_after_an_error(op):
    def stop() -> None:
        with tune.substituted(op.table, Launch(1, ())):
            assert pick(op.table).warps == 1
            raise KeyError

    with pytest.raises(KeyError):
        stop()
    assert op.table == {"any": Launch(4, (Inner(2),))}


@pytest.mark.parametrize("name", tune.OPS)
def test_every_row_can_be_varied_and_pasted(name):
    """Each field is of some row, another than what it is, and rows print as what they are."""
    op = tune.OPS[name]
    left = set(op.fields)
    for row in op.table.values():
        names = vars(sys.modules[type(row).__module__])
        assert eval(repr(row), {"inf": math.inf} | names) == row
        for field, values in op.fields.items():
            for said, variant in tune.variants(row, field, values):
                assert said.startswith(f"{field} = ")
                assert variant != row
                assert type(variant) is type(row)
                left.discard(field)
    assert not left


def test_every_row_is_some_chips():
    """Where a chip has no row and its family has none, 'any' is taken."""
    known = {"any", *FAMILY, *FAMILY.values()}
    assert not {name for op in tune.OPS.values() for name in op.table} - known


@pytest.mark.thorough
@pytest.mark.skipif(mode.INTERPRET, reason="compiles")
def test_variants_are_compiled_for_a_chip():
    found = tune.compiled("float32", "sm90", "warps", "router, decode of 1")
    assert list(found) == ["as it is", "warps = 8"]
    assert all(taken.count(" / ") == 3 for taken in found.values())
    assert found["as it is"] != found["warps = 8"]
