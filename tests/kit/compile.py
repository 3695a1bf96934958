"""Compile many launches for many absent GPUs, in two processes, and say what came of each."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

WORKERS = 2


@dataclass(frozen=True)
class Built:
    """One kernel of a case on a target; or why the case failed there, with no kernel."""

    target: str
    case: str
    kernel: str
    grid: tuple[int, int, int]
    registers: int
    spill: int
    loop_spills: int
    shared: int
    byte_loads: int
    mma: int
    instructions: dict[str, int]
    error: str = ""


def build(module: str, targets: Sequence[str]) -> list[Built]:
    """module: the name of one whose CASES are functions that launch, by name."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        found = pool.map(_target, targets, [module] * len(targets))
        return [built for some in found for built in some]


def _target(target: str, module: str) -> list[Built]:
    """All cases on one target. Two cases that launch the same kernel list it once."""
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    from triton.runtime.errors import OutOfResources

    from tests.kit.binary import resources
    from tests.kit.targets import FakeGPU

    found: list[Built] = []
    known: set[str] = set()
    for name, launch in importlib.import_module(module).CASES.items():
        with FakeGPU(target) as gpu:
            try:
                launch()
            except OutOfResources as e:
                found.append(_failed(target, name, str(e)))
                continue
        for kernel, grid in gpu.compiled():
            if kernel.hash in known:
                continue
            known.add(kernel.hash)
            r = resources(kernel)
            found.append(
                Built(
                    target, name, kernel.name, grid, r.registers, r.spill, r.loop_spills,
                    r.shared, r.byte_loads, r.mma, dict(r.instructions),
                )
            )  # fmt: skip
    return found


def _failed(target: str, case: str, error: str) -> Built:
    return Built(target, case, "", (0, 0, 0), 0, 0, 0, 0, 0, 0, {}, error)
