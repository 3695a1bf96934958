"""`python -m benchmarks.tune`: an operation that torch computes, with times that are told."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass

import pytest
import torch

from benchmarks import tune
from benchmarks.launch_grids import OPS, Op
from dsv4_plugin.kernels.launch import pick
from dsv4_plugin.tools.kernel_work import Work
from lab.kit import mode
from tests.triton.test_tables import tables


@dataclass(frozen=True)
class Inner:
    stages: int


@dataclass(frozen=True)
class Launch:
    warps: int
    inner: tuple[Inner, ...]
    off: float = 0.0


MICROSECONDS = {(4, 2): 10.0, (8, 2): 8.0, (16, 2): 9.0, (8, 3): 7.95, (8, 4): 4.0}
"""By warps and stages."""
FIELDS = {"off": (0.5, 2.0**-20), "warps": (4, 8, 16, 32), "inner.0.stages": (2, 3, 4)}
SIZES = {"decode of 1": (1, 1, 64), "decode of 64": (64, 1, 64)}


def made(op: Op) -> dict[str, tune.Made]:
    return tune.cases(op, torch.device("meta"))


@pytest.fixture
def op(gpu) -> Op:
    """Whose bits may differ from launch to launch."""
    table = {"any": Launch(4, (Inner(2),))}

    def launch() -> list[torch.Tensor]:
        row = pick(table)
        if row.warps == 32:
            raise RuntimeError("out of resources\nand more")
        return [torch.ones(4, device=mode.DEVICE) + row.off]

    return Op(
        table,
        {"ones": lambda _: Work(launch, lambda: [torch.ones(4, device=mode.DEVICE)], 16)},
        SIZES,
        FIELDS,
    )


def seconds(op: Op, work: Work) -> float:
    row = pick(op.table)
    return 1e-9 if row.off else 1e-6 * MICROSECONDS[row.warps, row.inner[0].stages]


def searched(op: Op, known: tune.Known | None = None) -> tuple[Launch, dict[str, tune.Trial]]:
    trials: dict[str, tune.Trial] = {}
    row = tune.search(
        op, made(op), lambda rows: known or {}, lambda work: seconds(op, work),
        lambda field, trial: trials.update({field: trial}),
    )  # fmt: skip
    return row, trials


def test_search_finds_the_fastest_right_row(op):
    exact = tune.replace(op, sums=())
    row, trials = searched(exact)
    assert row == Launch(8, (Inner(4),))
    assert list(made(op)) == ["ones, decode of 1", "ones, decode of 64"]
    assert list(trials) == ["off", "warps", "inner.0.stages"]
    of_one = {field: trial["ones, decode of 1"] for field, trial in trials.items()}
    times = [f.seconds for f in of_one["warps"].values()]
    assert times == pytest.approx([1e-5, 8e-6, 9e-6, math.inf])
    assert of_one["warps"]["32"].error == "RuntimeError: out of resources"
    assert of_one["off"]["0.5"].error == "other bits than the present row's"
    assert op.table == {"any": Launch(4, (Inner(2),))}
    text = tune.shown("warps", trials["warps"], 4e6)
    assert re.search(r"warps +as it is +8 +16 +32\n +ones, decode of 1 +10.0 \(0.40\) ", text)
    assert text.endswith("32, ones, decode of 64: RuntimeError: out of resources")


def test_bits_matter_where_they_have_to_be_the_same(op):
    for sums, error, near in (
        (None, "output 0: off by 0.5; 0.0001 is allowed", ""),
        ((), "other bits than the present row's", "other bits than the present row's"),
        (("off",), "output 0: off by 0.5; 0.0001 is allowed", ""),
    ):
        _, trials = searched(tune.replace(op, sums=sums))
        found = trials["off"]["ones, decode of 64"]
        assert (found["0.5"].error, found[str(2.0**-20)].error) == (error, near)


def test_what_launches_the_same_is_not_timed_and_what_does_not_compile_not_launched(op):
    only = tune.replace(op, fields={"warps": (4, 8, 16)})
    same, other = tune.Compiled(launches=(1,)), tune.Compiled(launches=(2,))
    of_case = {tune.AS_IT_IS: same, "8": same, "16": other}
    row, trials = searched(only, dict.fromkeys(made(only), of_case))
    found = trials["warps"]["ones, decode of 64"]
    assert found["8"] is found[tune.AS_IT_IS]
    assert row.warps == 16
    failing = of_case | {"16": tune.Compiled(error="too much shared memory")}
    row, trials = searched(only, dict.fromkeys(made(only), failing))
    assert row.warps == 4
    assert trials["warps"]["ones, decode of 64"]["16"].error == "too much shared memory"


def test_a_row_is_put_back_after_an_error(op):
    def stop() -> None:
        with tune.substituted(op.table, Launch(1, ())):
            assert pick(op.table).warps == 1
            raise KeyError

    with pytest.raises(KeyError):
        stop()
    assert op.table == {"any": Launch(4, (Inner(2),))}


@pytest.mark.parametrize("name", OPS)
def test_every_row_can_be_varied_and_pasted(gpu, name):
    """Each field is of some row, another than what it is, and rows print as what they are."""
    op = OPS[name]
    left = set(op.fields)
    assert left >= set(op.sums or ())
    for row in op.table.values():
        names = vars(sys.modules[type(row).__module__])
        text = "{" + tune.pasted(op, row, "guessed").split("\n")[1] + "}"
        assert list(eval(text, {"inf": math.inf} | names).values()) == [row]
        for field, values in op.fields.items():
            as_it_is, *others = tune.variants(row, field, values).items()
            assert as_it_is == (tune.AS_IT_IS, row)
            for _, variant in others:
                assert variant != row
                assert type(variant) is type(row)
                left.discard(field)
    assert not left


def test_every_table_has_an_entry_here():
    varied = {id(op.table) for op in OPS.values()}
    assert [name for name, table in tables().items() if id(table) not in varied] == []


@pytest.mark.thorough
@pytest.mark.skipif(mode.INTERPRET, reason="compiles")
def test_variants_are_compiled_for_a_chip():
    case = "router, decode of 1"
    row = OPS["float32"].table["any"]
    warps = tune.varied(row, "warps", 8)
    few, many = (tune.compiled("float32", "sm90", case, r, inspect=True) for r in (row, warps))
    assert few.launches != many.launches
    assert few.taken.count(" ") == 3
    wide = tune.compiled("float32", "sm90", case, tune.varied(row, "many", 128))
    assert wide.launches == few.launches  # One row takes the tile of few.
    error = tune.compiled("float32", "sm86", case, tune.varied(row, "depth", 256)).error
    assert error.startswith("OutOfResources")


def test_check_runs_variants_without_a_gpu(capsys):
    """The smallest: the choice among index scores, with fewer scores a lane."""
    op = tune.replace(OPS["topk"], fields={"values": (8,)})
    tune.check(op, "decode", "sm80")
    said = capsys.readouterr().out
    assert "-" not in said.split("Nothing was measured")[0]
    assert re.search(r"scores and choice, decode +right +right\n", said)


@pytest.mark.parametrize("option", ["cases", "fields"])
def test_a_filter_that_leaves_nothing_is_refused(option, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["tune", "float32", f"--{option}", "nothing", "--chip", "sm90"]
    )
    with pytest.raises(SystemExit):
        tune.main()
    assert f"--{option} is 'nothing'; allowed are parts of " in capsys.readouterr().err
