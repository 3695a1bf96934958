"""How long a warp takes through a kernel's code, and how often it stops for memory: a model.

One warp executes the code once, in order, straight from its first to its last instruction: an
instruction a cycle, each as soon as its operands are there. Loops are gone through once, and what
lies in branches too; other warps are not there. So it is no time of a kernel; but where a launch is
small, as in a decode step, kernels take about as long as this says, since they do little but wait:
on an H200 the index of one row 24 us (22 by the model), both kernels of mHC 11.5 (8.3).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lab.kit.binary import Line

LOAD = 600
"""Cycles until a value comes from global memory, through L2."""
LATENCIES = {
    "LDG": LOAD, "ATOM": LOAD, "ATOMG": LOAD, "LDL": 100, "LDS": 33, "LDSM": 33, "SHFL": 25,
    "LDC": 40, "S2R": 40, "S2UR": 40, "REDUX": 40, "MUFU": 40, "HMMA": 33, "QMMA": 33, "HGMMA": 60,
    "QGMMA": 60, "R2UR": 12,
}  # fmt: skip
"""In cycles, of others 5: about those that are published of sm_80 and sm_90."""
STORES = ("STG", "STS", "STL", "RED", "BRA", "BAR", "LDGSTS")
"""Without a result."""
LONG = 100
"""Cycles of waiting that count as a stop."""


class Waits(NamedTuple):
    """cycles: from first to last; stops: for memory, of LONG cycles or more."""

    cycles: int
    stops: int


def waits(sass: Sequence[Line]) -> Waits:
    """Of a kernel's code as `lab.kit.binary` reads it."""
    ready: dict[str, int] = {}
    now, stops = 0, 0
    for line in sass:
        name = line.name.split(".")[0]
        operands = [list(_registers(o)) for o in line.operands.rstrip(" ;").split(",")]
        results = [] if name in STORES else operands.pop(0)
        begins = max([now + 1, *(ready.get(r, 0) for some in operands for r in some)])
        stops += begins - now > LONG
        now = begins
        for result in results:
            for one in _wide(result, line.name):
                ready[one] = now + LATENCIES.get(name, 5)
    return Waits(now, stops)


def _registers(operand: str) -> Iterator[str]:
    return (found[0] for found in re.finditer(r"\bU?[RP]\d+\b", operand))


def _wide(register: str, name: str) -> list[str]:
    """What an instruction writes beginning with a register."""
    wide = {".128": 4, ".64": 2, ".WIDE": 2}
    count = next((n for part, n in wide.items() if part in name), 1)
    if name.startswith(("HMMA", "QMMA")):
        count = 4
    if not register.startswith("R"):
        return [register]
    first = int(register[1:])
    return [f"R{first + i}" for i in range(count)]
