"""`make kernels-report`: what the compiled kernels take, move and could reach, without a GPU.

Three sources: the compiler's output for every chip; counters of the sm_80 code as executed on the
CPU; and the chips' data sheets. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.launches import per_kind
from dsv4_plugin.cache.paged import Paged
from dsv4_plugin.kernels.attention import kernel as attention
from dsv4_plugin.kernels.index import kernel as index
from dsv4_plugin.kernels.index.topk import topk
from lab.kernels.cases import key_codec, kv_codec, step_of_rows
from lab.kernels.production import MODULES
from lab.kit.compile import Built, build
from lab.kit.gpu import EmulatedGPU
from lab.kit.memory import Counters
from lab.kit.targets import SHARED_LIMIT, TARGETS

PAGE = 256


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
class Work:
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


def zeros(words: int) -> Tensor:
    """int32, backed by memory only where touched."""
    return torch.from_numpy(np.zeros(words, np.int32))


def pages(codec: Any, rows: int, count: int, requests: int) -> Paged:
    blocks = -(-count // rows)
    table = torch.randperm(requests * blocks).view(requests, blocks).int()
    storage = zeros(requests * blocks * rows * codec.words)
    pool: Any = SimpleNamespace(codec=codec, storage=storage)
    return Paged(pool, table, rows * codec.words, 0, rows)


def count(name: str, least: int, run: Callable[[], Iterable[Tensor]]) -> Work:
    """Execute with counters; run returns the scratch tensors it used."""
    with EmulatedGPU("sm80", count=True) as gpu:
        scratch = list(run())
    return Work(name, gpu.counted, least, scratch)


def attention_work(context: int, ratio: int, many: bool, heads: int = 64) -> Work:
    """One decode step's attention of a layer, for one request `context` tokens long; many: by the
    launch that serves it in company."""
    batch = 1
    codec, k = kv_codec("fp8"), 512 if ratio == 4 else 0
    seen = min(k, context // ratio) if k else context // ratio
    position = torch.full((batch,), context - 1, dtype=torch.int32)
    q = torch.zeros(batch, heads, 512, dtype=torch.bfloat16)
    cis, step = torch.zeros(batch, 64), step_of_rows(position, torch.arange(batch).int(), context)
    window = pages(codec, 32, context, batch)
    entries = pages(codec, PAGE // ratio, context // ratio, batch)
    chosen = None
    if k:
        some = [torch.randperm(context // ratio)[:k].sort().values for _ in range(batch)]
        chosen = torch.stack(some).int()
    rows = 128 + seen
    least = batch * (rows * 4 * codec.words + 2 * 2 * heads * 512)
    scratch: list[Tensor] = []

    def run() -> list[Tensor]:
        stock = torch.empty

        def empty(*args: Any, **kwargs: Any) -> Tensor:
            made = stock(*args, **kwargs)
            scratch.append(made)
            return made

        torch.empty = empty  # type: ignore[assignment]
        table = attention.LAUNCHES
        of_many = {k: replace(v, ways=v.ways[-1:]) for k, v in table.items()}
        attention.LAUNCHES = of_many if many else table
        try:
            sink = torch.zeros(heads)
            attention.attention(q, sink, cis, step, window, 128, entries, ratio, chosen)
        finally:
            torch.empty = stock
            attention.LAUNCHES = table
        return scratch

    kind = "CSA" if k else "HCA"
    how = "in company" if many else "alone"
    return count(f"{kind} attention, {context >> 10}K, {how}", least, run)


def index_work(context: int, kind: str = "fp8", heads: int = 64) -> Work:
    """Scores and choice of one decoded row."""
    codec, n = key_codec(kind), context // 4
    keys = pages(codec, PAGE // 4, n, 1)
    position, request = torch.tensor([context - 1]).int(), torch.zeros(1).int()
    q, weight = torch.zeros(1, heads, 128, dtype=torch.float16), torch.zeros(1, heads)

    def run() -> list[Tensor]:
        score = index.scores(q, weight, keys, position, request, 4, n)
        topk(score, position, 4, 512)
        return []

    least = n * 4 * codec.words + 2 * heads * 128
    return count(f"indexer, {kind} keys, {context >> 10}K", least, run)


def works() -> list[Work]:
    long, million = 1 << 16, 1 << 20
    return [
        attention_work(long, 4, many=False),
        attention_work(long, 4, many=True),
        attention_work(long, 128, many=False),
        attention_work(long, 128, many=True),
        attention_work(million, 128, many=False),
        attention_work(million, 128, many=True),
        index_work(long),
        index_work(million),
        index_work(million, "fp4"),
    ]


def table(head: list[str], rows: Iterable[list[object]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(c) for c in row) + " |" for row in rows] + [""]


def traffic(found: list[Work]) -> list[str]:
    def row(w: Work) -> list[object]:
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


def roofline(found: list[Work]) -> list[str]:
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
        compiling = beside.submit(build, MODULES, args.targets.split(","))
        found = works()
        counted = launches()
        built = compiling.result()
    lines = [HEAD, "## Bytes of a decode step, 64 heads, fp8 rows", "", *traffic(found)]
    lines += [LAUNCHES, *counted]
    lines += ["## Lower bounds (modelled)", "", *roofline(found)]
    lines += ["## What the compiler made", ""]
    lines += ["Of production launches; equal compiled code is listed once per chip.", ""]
    lines += resources(built)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
