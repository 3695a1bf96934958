"""Compile many launches for many absent GPUs, in two processes, and say what came of each."""

from __future__ import annotations

import multiprocessing
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from lab.kernels import production

WORKERS = 2
SIBLINGS = {"sm89": "sm86", "sm103": "sm100", "sm121": "sm120"}
"""Chips for which Triton writes another's PTX, but for its heading: only ptxas tells them apart."""


@dataclass(frozen=True)
class Built:
    """One kernel of a case on a target, see `Resources`; launches: of it in that case. Or why the
    case failed there, with no kernel."""

    target: str
    case: str
    kernel: str
    grid: tuple[int, int, int]
    registers: int
    spill: int
    loop_spills: int
    shared: int
    narrow_loads: int
    mma: int
    instructions: dict[str, int]
    loop: dict[str, int]
    launches: int
    error: str = ""


def build(targets: Sequence[str], only: Collection[str] = tuple(production.CASES)) -> list[Built]:
    """Production launches, all or some."""
    elders = [t for t in targets if SIBLINGS.get(t) not in targets]
    families = [[t, *(s for s in targets if SIBLINGS.get(s) == t)] for t in elders]
    work = [(family, group, only) for family in families for group in production.GROUPS]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(WORKERS, mp_context=context) as pool:
        found = [built for some in pool.map(_family, *zip(*work, strict=True)) for built in some]
    return sorted(found, key=lambda b: targets.index(b.target))


def _family(targets: Sequence[str], group: str, only: Collection[str]) -> list[Built]:
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    from triton import knobs

    knobs.runtime.add_stages_inspection_hook = SharedPTX()
    return [built for target in targets for built in _target(target, group, only)]


def _target(target: str, group: str, only: Collection[str]) -> list[Built]:
    """Cases of a group on one target, each with all its kernels."""
    from triton.runtime.errors import OutOfResources

    from lab.kit.binary import resources
    from lab.kit.targets import FakeGPU

    failed: list[Built] = []
    launched: list[tuple[str, Any, tuple[int, int, int], int]] = []
    for name, launch in getattr(production, group).items():
        if name not in only:
            continue
        with FakeGPU(target) as gpu:
            try:
                launch()
            except OutOfResources as e:
                failed.append(_failed(target, name, str(e)))
                continue
        count = Counter(metadata.hash for _, metadata, _ in gpu.launches)
        launched += [(name, kernel, grid, count[kernel.hash]) for kernel, grid in gpu.compiled()]
    distinct = {kernel.hash: kernel for _, kernel, _, _ in launched}
    taken = dict(zip(distinct, resources(list(distinct.values())), strict=True))
    return failed + [
        Built(
            target, name, kernel.name, grid, r.registers, r.spill, r.loop_spills, r.shared,
            r.narrow_loads, r.mma, dict(r.instructions), dict(r.loop), launches,
        )
        for name, kernel, grid, launches in launched
        for r in [taken[kernel.hash]]
    ]  # fmt: skip


def _failed(target: str, case: str, error: str) -> Built:
    return Built(target, case, "", (0, 0, 0), 0, 0, 0, 0, 0, 0, {}, {}, 0, error)


class SharedPTX:
    """Triton's hook between stages: from TTIR and options on, siblings compile to PTX once."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[str, dict[str, Any]]] = {}

    def __call__(
        self, backend: Any = None, stages: Any = None, options: Any = None,
        language: Any = None, capability: int | None = None,
    ) -> tuple[str, str] | None:  # fmt: skip
        if stages is None:
            return "shared PTX", "shared PTX"
        if capability is None:  # AMD
            return None
        lower = [stages.pop(name) for name in ("ttgir", "llir", "ptx")]
        cubin = stages.pop("cubin")
        own = ("arch", "supported_fp8_dtypes")  # used up where TTIR is made
        key = str({k: v for k, v in vars(options).items() if k not in own})

        def ptx(module: Any, metadata: dict[str, Any]) -> str:
            source = f"{key}\n{module}"
            if source not in self.known:
                before = dict(metadata)
                for stage in lower:
                    module = stage(module, metadata)
                added = {k: v for k, v in metadata.items() if k not in before or before[k] != v}
                self.known[source] = module, added
            text, added = self.known[source]
            metadata.update(added)
            return re.sub(r"\.target sm_\d+", f".target sm_{capability}", text)

        stages.update(ptx=ptx, cubin=cubin)
        return None
