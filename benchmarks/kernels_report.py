"""`make kernels-report`: what the compiled kernels take, move and could reach, without a GPU.

Three sources: the compiler's output for every chip; counters of the sm_80 code as executed on the
CPU; and the chips' data sheets. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import compiled
from benchmarks.launches import per_kind
from dsv4_plugin.config import CSA, HCA
from dsv4_plugin.kernels.attention import kernel as attention
from dsv4_plugin.tools import kernel_work
from dsv4_plugin.tools.kernel_work import Work, World
from lab.kit.compile import Built, build
from lab.kit.gpu import EmulatedGPU
from lab.kit.memory import Counters
from lab.kit.targets import SHARED_LIMIT, TARGETS


@dataclass(frozen=True)
class Chip:
    """Data-sheet figures: memory bytes/s; dense bf16 FLOP/s with float32 sums; SMs; boost Hz."""

    memory: float
    mma: float
    sms: int
    clock: float


CHIPS = {
    "A100 80 GB (sm_80)": Chip(2.04e12, 312e12, 108, 1.41e9),
    "RTX 3090 (sm_86)": Chip(0.936e12, 71e12, 82, 1.70e9),
    "RTX 4090 (sm_89)": Chip(1.008e12, 165e12, 128, 2.52e9),
}
WARPS_PER_CYCLE = 4
"""Instructions an SM issues per cycle."""


@dataclass(frozen=True)
class Counted:
    """One operation's launches in the emulator, and the bytes it cannot do without."""

    name: str
    launches: list[tuple[str, tuple[int, int, int], Counters]]
    least: int
    scratch: list[Tensor]

    def moved(self) -> tuple[int, int]:
        """Bytes of distinct sectors: of everything but scratch, and of scratch."""
        total = sum(c.distinct(k) for _, _, c in self.launches for k in ("load", "store"))
        scratch = sum(
            c.distinct(k, self.scratch) for _, _, c in self.launches for k in ("load", "store")
        )
        return total - scratch, scratch

    def bounds(self, chip: Chip) -> dict[str, float]:
        """Seconds at least, by resource."""
        issue = 0.0
        for _, grid, c in self.launches:
            busy = min(chip.sms, grid[0] * grid[1] * grid[2])
            issue += c.warp_instructions / (WARPS_PER_CYCLE * busy * chip.clock)
        flop = sum(c.mma_flop for _, _, c in self.launches)
        moved = self.moved()[0]
        return {"memory": moved / chip.memory, "mma": flop / chip.mma, "issue": issue}


def count(name: str, work: Work, chip: str = "sm80") -> Counted:
    """Execute with counters, as compiled for a chip: once, on what `work` brings along."""
    scratch: list[Tensor] = []
    stock = torch.empty

    def empty(*args: Any, **kwargs: Any) -> Tensor:
        made = stock(*args, **kwargs)
        scratch.append(made)
        return made

    with EmulatedGPU(chip, count=True) as gpu:
        torch.empty = empty  # type: ignore[assignment]
        try:
            (work.again or work.launch)()
        finally:
            torch.empty = stock
    return Counted(name, gpu.counted, work.nbytes, scratch)


def one_request(context: int, index_dtype: str = "auto") -> World:
    """A decode step of a request that is `context` tokens long."""
    cpu = torch.device("cpu")
    return World.of(cpu, 1, 1, context, index_dtype=index_dtype, written=False)


def attention_work(context: int, ratio: int, many: bool) -> Counted:
    """many: by the launch that serves the request in company."""
    kind = "CSA" if ratio == CSA else "HCA"
    how = "in company" if many else "alone"
    table = attention.LAUNCHES
    of_many = {family: replace(row, fp8=row.fp8[-1:]) for family, row in table.items()}
    attention.LAUNCHES = of_many if many else table
    try:
        work = kernel_work.attention(one_request(context), ratio)
        return count(f"{kind} attention, {context >> 10}K, {how}", work)
    finally:
        attention.LAUNCHES = table


def index_work(context: int, kind: str = "fp8") -> Counted:
    """Scores and choice of one decoded row, queries left out."""
    with EmulatedGPU("sm80"):
        work = kernel_work.index(one_request(context, kind))
    return count(f"indexer, {kind} keys, {context >> 10}K", work)


def works() -> list[Counted]:
    long, million = 1 << 16, 1 << 20
    return [
        attention_work(long, CSA, many=False),
        attention_work(long, CSA, many=True),
        attention_work(long, HCA, many=False),
        attention_work(long, HCA, many=True),
        attention_work(million, HCA, many=False),
        attention_work(million, HCA, many=True),
        index_work(long),
        index_work(million),
        index_work(million, "fp4"),
    ]


def table(head: list[str], rows: Iterable[list[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows] + [""]


def traffic(found: list[Counted]) -> list[str]:
    def row(w: Counted) -> list[object]:
        moved, scratch = w.moved()
        sectors = sum(c.load_sectors + c.store_sectors for _, _, c in w.launches)
        share = f"{moved / w.least:.2f}"
        return [
            w.name, f"{w.least / 1e6:.2f}", f"{moved / 1e6:.2f}", share,
            f"{scratch / 1e6:.2f}", f"{32 * sectors / 1e6:.1f}", len(w.launches),
        ]  # fmt: skip

    head = [
        "operation",
        "least MB",
        "moved MB",
        "ratio",
        "scratch MB",
        "L1 requests MB",
        "launches",
    ]
    return table(head, map(row, found))


def roofline(found: list[Counted]) -> list[str]:
    def rows() -> Iterable[list[object]]:
        for w in found:
            for name, chip in CHIPS.items():
                bounds = w.bounds(chip)
                limit = max(bounds, key=lambda k: bounds[k])
                times = [f"{1e6 * t:.1f}" for t in bounds.values()]
                share = w.least / chip.memory / bounds[limit]
                yield [w.name, name, *times, limit, f"{share:.0%}"]

    head = ["operation", "chip", "memory us", "mma us", "issue us", "bound by", "of the roofline"]
    return table(head, rows())


def launches() -> list[str]:
    def row(name: str, kernels: Counter[str], operations: Counter[str]) -> list[object]:
        named = ", ".join(f"{k} {n}" if n > 1 else k for k, n in kernels.items())
        others = ", ".join(f"{k} {n}" if n > 1 else k for k, n in operations.items())
        return [name, kernels.total(), named, operations.total(), others]

    head = ["layer kind", "kernels", "which", "torch operations", "which"]
    return table(head, (row(name, *found) for name, found in per_kind().items()))


def resources(built: list[Built]) -> list[str]:
    lines = []
    for kernel in dict.fromkeys(b.kernel for b in built):
        mine = [b for b in built if b.kernel == kernel]
        lines += [f"### `{kernel}`", ""]
        lines += table(
            ["case", "chip", "registers", "spill B", "shared", "instructions", "tensor core",
             "global loads", "stores", "shared ops", "barriers"],
            (
                [
                    b.case, b.target, b.registers, b.spill,
                    f"{b.shared} ({b.shared / SHARED_LIMIT[b.target]:.0%})",
                    sum(b.instructions.values()), b.mma,
                    *(mix(b, names) for names in MIX),
                ]
                for b in mine
            ),
        )  # fmt: skip
    return lines


MIX = (
    ("LDG", "global_load", "buffer_load"),
    ("STG", "global_store", "buffer_store"),
    ("LDS", "STS", "LDSM", "ds_"),
    ("BAR", "s_barrier"),
)


def mix(b: Built, names: tuple[str, ...]) -> int:
    return sum(n for name, n in b.instructions.items() if name.startswith(names))


HEAD = """# Kernels, modelled

Written by `make kernels-report`; nothing in it was measured on a GPU. Registers, spills, shared
memory and instructions are the compiler's. Bytes and instructions executed are counted in the
compiled sm_80 code as it runs in the emulator (`lab/kit`): "moved" are distinct 32-byte sectors
per launch, the least a perfect cache would leave; "scratch" are partial sums between the programs
of a split, a few MB that stay in L2; "L1 requests" know no cache at all. The bounds take data-sheet
peaks: no kernel is faster than the largest of them, every real one is slower. A single request
keeps few SMs busy: its bound is the instructions of the busy ones. "In company" is one request's
share of the launch that serves many; there the bounds of issue fall with the SMs that work.
"""


LAUNCHES = """## Launches of a decode step, per layer

Besides products and experts; counted by running models of the tiny preset in the emulator. What
the host does for a step (one launch and the angles) does not depend on the number of layers; it
launches each layer's kernels, as long as no graph is captured.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(".cache/kernels-report.md"))
    parser.add_argument("--targets", default=",".join(TARGETS))
    args = parser.parse_args()
    torch.manual_seed(0)
    with ThreadPoolExecutor(1) as beside:
        compiling = beside.submit(build, args.targets.split(","))
        found = works()
        counted = launches()
        built = compiling.result()
    lines = [HEAD, "## Bytes of a decode step, 64 heads, fp8 rows", "", *traffic(found)]
    lines += [LAUNCHES, *counted]
    lines += ["## Lower bounds (modelled)", "", *roofline(found)]
    lines += ["## What the compiler made", ""]
    lines += ["Of production launches, each with all its kernels.", ""]
    lines += resources(built)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines).rstrip() + "\n")
    compiled.update(compiled.rows_of(built))
    compiled.document()


if __name__ == "__main__":
    main()
