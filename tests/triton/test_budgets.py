"""Every kernel compiles for every chip at production shapes, within its budget.

Shared memory beyond the chip's limit is an error of the build itself. Compiled code is kept in
Triton's cache: the second run takes a minute at most.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path

import pytest

from lab.kernels.production import CASES
from lab.kit import mode
from lab.kit.compile import SIBLINGS, Built, build
from lab.kit.targets import SHARED_LIMIT, TARGETS, FakeGPU

BUDGETS = tomllib.loads((Path(__file__).parent / "budgets.toml").read_text())
SHORT = "sm86"
"""The chip of the short set: it has the least shared memory."""

pytestmark = [
    pytest.mark.skipif(mode.INTERPRET, reason="compiles"),
    pytest.mark.skipif("sm80" not in mode.NAMES, reason="once per run of all modes"),
]


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest) -> list[Built]:
    thorough = request.config.getoption("--thorough")
    return build(list(TARGETS) if thorough else [SHORT])


def budget(b: Built) -> dict[str, int]:
    table = BUDGETS[b.kernel]
    return {"mma": 0, "narrow": 0, "loop_spills": 0, "copies": 0} | table | table.get(b.target, {})


@pytest.mark.parametrize(
    "target", [t if t == SHORT else pytest.param(t, marks=pytest.mark.thorough) for t in TARGETS]
)
def test_budgets(built: list[Built], target: str):
    mine = [b for b in built if b.target == target]
    assert not [f"{b.case}: {b.error}" for b in mine if b.error]
    over = []
    for b in mine:
        allowed = budget(b)
        if b.spill > allowed["spill"] or b.loop_spills > allowed["loop_spills"]:
            over.append(f"{b.kernel} ({b.case}) spills {b.spill} bytes, {b.loop_spills} in loops")
        if b.narrow_loads > allowed["narrow"]:
            over.append(f"{b.kernel} ({b.case}) has {b.narrow_loads} loads of fewer than 4 bytes")
        if b.mma < allowed["mma"]:
            over.append(f"{b.kernel} ({b.case}) has {b.mma} tensor-core instructions")
        if b.shared > SHARED_LIMIT[target]:
            over.append(f"{b.kernel} ({b.case}) takes {b.shared} bytes of shared memory")
    copies = Counter[str]()
    for b in mine:
        found = sum(n for name, n in b.instructions.items() if name.startswith("LDGSTS"))
        copies[b.kernel] = max(copies[b.kernel], found)
    few = {b.kernel for b in mine if copies[b.kernel] < budget(b)["copies"]}
    assert not few, "without asynchronous copies"
    assert not over
    assert {b.kernel for b in mine} == set(BUDGETS)


@pytest.mark.thorough
@pytest.mark.parametrize(("sibling", "elder"), SIBLINGS.items())
def test_siblings_have_the_same_ptx(sibling: str, elder: str):
    """As Triton writes it for each of them, up to the names of source files: what Triton's cache
    holds may come from a copy of the sources in another folder."""
    found = []
    for target in (sibling, elder):
        with FakeGPU(target) as gpu:
            CASES["indexer, prefill"]()
        (kernel, _), *_ = gpu.compiled()
        heading, body = kernel.asm["ptx"].split(".address_size", 1)
        assert f".target {target.replace('sm', 'sm_')}" in heading
        code, _ = body.split("\t.file\t", 1)
        assert "ret;" in code
        found.append(code)
    assert found[0] == found[1]
