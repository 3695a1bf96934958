"""`python -m benchmarks.waits [CHIP] [PART OF A CASE ...]`: how often kernels stop for memory.

Every production kernel as compiled for an absent chip (sm_90, if none is named), by the model of
`lab/kit/waits.py`. With --out FILE the rows are written as CSV, with --commit's name in the first
column beside those of other commits that are there.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from triton import knobs

from lab.kernels import production
from lab.kit.binary import sass
from lab.kit.compile import SharedPTX
from lab.kit.targets import TARGETS, FakeGPU
from lab.kit.waits import waits

COLUMNS = ("commit", "chip", "case", "kernel", "launches", "cycles", "stops")
NVIDIA = tuple(t for t in TARGETS if t.startswith("sm"))


def rows(commit: str, chip: str, parts: Sequence[str]) -> Iterator[tuple[object, ...]]:
    """A case's kernels in the order of their launches."""
    for case, launch in production.CASES.items():
        if parts and not any(part in case for part in parts):
            continue
        with FakeGPU(chip) as gpu:
            launch()
        launches = [metadata.hash for _, metadata, _ in gpu.launches]
        for kernel, _ in gpu.compiled():
            found = waits(sass([kernel])[0])
            yield commit, chip, case, kernel.name, launches.count(kernel.hash), *found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("chip", nargs="?", default="sm90", choices=NVIDIA)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="now")
    given = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    knobs.runtime.add_stages_inspection_hook = SharedPTX()
    found = []
    for row in rows(given.commit, given.chip, given.parts):
        found.append([str(value) for value in row])
        _, _, case, kernel, launches, cycles, stops = row
        print(f"{case:45} {kernel:18} x{launches} {cycles:6} cycles, {stops:2} stops", flush=True)
    if given.out:
        old = list(csv.reader(given.out.open()))[1:] if given.out.exists() else []
        kept = [row for row in old if row[:2] != [given.commit, given.chip]]
        with given.out.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *kept, *found])


if __name__ == "__main__":
    main()
