"""`python -m benchmarks.waits [CHIP] [PART OF A CASE ...]`: how often kernels stop for memory.

Every production kernel as compiled for an absent chip (sm_90, if none is named), by the model of
`lab/kit/waits.py`; with --steps, all launches of decode steps instead, for a layer of each kind.
With --out FILE the rows are written as CSV, with --commit's name in the first column beside those
of other commits that are there.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from triton import knobs

from benchmarks.launches import KINDS
from dsv4_plugin.tools.cli.gpu_model import Requests, Stack, network
from lab.kernels import production
from lab.kit.binary import sass
from lab.kit.compile import SharedPTX
from lab.kit.targets import TARGETS, FakeGPU
from lab.kit.waits import waits

COLUMNS = ("commit", "chip", "case", "kernel", "launches", "cycles", "stops")
NVIDIA = tuple(t for t in TARGETS if t.startswith("sm"))
EXPERTS, VOCABULARY = 32, 1024
"""Of a step's layer: fewer than Flash's, which nothing but `prepare` and the head sees."""
CPU = torch.device("cpu")
Row = tuple[str, str, int, int, int]
"""Case, kernel, launches, cycles, stops."""


def rows(parts: Sequence[str], gpu: FakeGPU) -> Iterator[Row]:
    """Production's cases in whose names one of `parts` is."""
    for case, launch in production.CASES.items():
        if not parts or any(part in case for part in parts):
            gpu.launches.clear()
            with gpu:
                launch()
            yield from kernels(case, gpu)


def steps(sizes: Sequence[str], gpu: FakeGPU) -> Iterator[Row]:
    """A decode step of one of Flash's layers of each kind; sizes: REQUESTSxTOKENS."""
    for kind, ratio in KINDS.items():
        stack = Stack("slice", [ratio], EXPERTS, "fp8-fp4", [], vocab_size=VOCABULARY)
        with gpu:
            model, layout = network(stack, CPU)
        for size in sizes:
            count, length = map(int, size.split("x"))
            with gpu, torch.inference_mode():
                requests = Requests.of(model, layout, count, length, CPU, filled=False)
                gpu.launches.clear()
                requests.decode()
            yield from kernels(f"{kind} layer, decode of {count} at {length:,}", gpu)


def kernels(case: str, gpu: FakeGPU) -> Iterator[Row]:
    """What was launched, in the order of first launches."""
    launches = [metadata.hash for _, metadata, _ in gpu.launches]
    for kernel, _ in gpu.compiled():
        yield case, kernel.name, launches.count(kernel.hash), *waits(sass([kernel])[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("chip", nargs="?", default="sm90", choices=NVIDIA)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="now")
    parser.add_argument("--steps", help="REQUESTSxTOKENS,..., instead of cases")
    given = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    os.environ.setdefault("DSV4_KERNELS", "triton")
    knobs.runtime.add_stages_inspection_hook = SharedPTX()
    gpu = FakeGPU(given.chip)
    found = []
    for row in steps(given.steps.split(","), gpu) if given.steps else rows(given.parts, gpu):
        found.append([given.commit, given.chip, *map(str, row)])
        case, kernel, launches, cycles, stops = row
        print(f"{case:45} {kernel:18} x{launches} {cycles:6} cycles, {stops:2} stops", flush=True)
    if given.out:
        old = list(csv.reader(given.out.open()))[1:] if given.out.exists() else []
        anew = {tuple(row[:3]) for row in found}
        kept = [row for row in old if tuple(row[:3]) not in anew]
        with given.out.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *kept, *found])


if __name__ == "__main__":
    main()
