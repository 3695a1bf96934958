"""`python -m benchmarks.counted`: what every operation executes, without a GPU.

Each is launched once, as compiled for a chip, in the emulator, which counts launches, warps'
instructions, products on tensor cores, and the bytes of distinct memory sectors. From the chip's
data sheet follows what each of these takes at least: no kernel is faster than the largest bound,
every real one is slower. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.kernels_report import CHIPS, Chip, count
from dsv4_plugin.tools.kernel_work import WORK, World
from lab.kit.gpu import EmulatedGPU

COUNTED = CHIPS | {"RTX 5090 (sm_120)": Chip(1.792e12, 210e12, 170, 2.41e9)}
RESULTS = Path(__file__).parent / "results" / "counted.csv"
SIZES = {
    "decode of 1": (1, 1, 1 << 13),
    "decode of 16": (16, 1, 1 << 11),
    "prompt of 160": (1, 160, 1 << 11),
}
"""Requests, tokens of each in the step, and tokens they then have; prompts take the tiles of many
rows."""
EXPERTS = 8
"""Of a layer: few, so that emulating them takes minutes. Each is chosen in every size."""
LONG = ("experts", "queries", "groups", "gated", "compressors' product")
"""Operations that are not emulated for prompts: their tiles of many rows take an hour."""


def rows(commit: str, chips: list[str], only: str) -> Iterator[dict[str, object]]:
    for name, chip in COUNTED.items():
        architecture = name.split("(")[1].rstrip(")").replace("_", "")
        if architecture not in chips:
            continue
        for size, shape in SIZES.items():
            for operation, make in WORK.items():
                long = any(part in operation for part in LONG) and shape[1] > 1
                if only not in operation or long:
                    continue
                with EmulatedGPU(architecture):
                    work = make(World.of(torch.device("cpu"), *shape, experts=EXPERTS))
                found = count(operation, work, architecture)
                bounds = {k: 1e6 * seconds for k, seconds in found.bounds(chip).items()}
                yield {
                    "commit": commit,
                    "chip": name,
                    "size": size,
                    "operation": operation,
                    "launches": len(found.launches),
                    "warp_instructions": sum(c.warp_instructions for *_, c in found.launches),
                    "mma_mflop": round(sum(c.mma_flop for *_, c in found.launches) / 1e6, 1),
                    "moved_kb": round(found.moved()[0] / 1e3, 1),
                    **{f"{k}_us": f"{us:.2f}" for k, us in bounds.items()},
                    "bound_by": max(bounds, key=lambda k: bounds[k]),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commit", help="what the rows are of")
    parser.add_argument("--chips", default="sm80", help="of sm80, sm86, sm89, sm120")
    parser.add_argument("--only", default="", help="operations whose names contain this")
    args = parser.parse_args()
    with RESULTS.open("a", newline="") as file:
        writer = None
        for row in rows(args.commit, args.chips.split(","), args.only):
            if writer is None:
                writer = csv.DictWriter(file, row)
                if not file.tell():
                    writer.writeheader()
            writer.writerow(row)
            file.flush()
            print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
