"""`python -m benchmarks.compiled`: what the compiler made of the kernels, beside an earlier commit.

Writes `results/kernels_compiled.csv` anew, but for the rows of BEFORE, and the tables of
docs/gpu.md from it; `make kernels-report` does that too. Compiled, not measured. The rows of BEFORE
were written by this file in a checkout of that commit, whose cases it knows by their names.

A warp's work on tensor cores is counted in 2,048 multiply-adds, one instruction of m16n8k16.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lab.kit.binary import MMA, multiply_adds
from lab.kit.compile import SIBLINGS, Built, build
from lab.paths import ROOT

CHIPS = ("sm80", "sm86", "sm89", "sm90", "sm120")
BEFORE = "bac3ed2"
UNIT = 2048
RESULT, DOCUMENT = ROOT / "benchmarks/results/kernels_compiled.csv", ROOT / "docs/gpu.md"
BEGIN, END = "<!-- by benchmarks/compiled.py -->\n", "<!-- to here -->\n"
CASES = {
    "FP8 linear, 1 row": "FP8 linear, decode",
    "FP8 linear, prefill": "FP8 linear, prefill",
    "FP8 grouped linear, 64 rows": "FP8 grouped linear, decode of 64",
    "FP8 grouped linear, prefill": "FP8 grouped linear, prefill",
    "mHC, 1 row": "streams, Flash, decode",
    "mHC, prefill": "streams, Pro, prefill",
    "experts, MXFP4, 1 row": "experts, Flash, MXFP4, decode",
    "experts, MXFP4, prefill": "experts, Flash, MXFP4, prefill",
    "experts, FP8, 1 row": "experts, Flash, FP8, decode",
    "experts, FP8, prefill": "experts, Flash, FP8, prefill",
    "attention, SWA, 64 rows": "SWA decode, 64 heads",
    "attention, SWA, prefill": "SWA prefill, 64 heads",
    "attention, CSA, 1 row": "CSA decode of 1, 64 heads",
    "attention, CSA, 1,024 rows": "CSA decode of 1,024, 64 heads",
    "attention, HCA, 1 row": "HCA decode of 1, 64 heads",
    "attention, HCA, 1,024 rows": "HCA decode of 1,024, 64 heads",
    "attention, HCA, prefill": "HCA prefill, 64 heads",
    "index, 1 row at 65,536": "indexer, decode of 1 at 65,536",
    "index, 64 rows at a million": "indexer, decode of 64",
    "index, prefill": "indexer, prefill",
    "router's product, 1 row": "router's product, decode",
    "compressors' product, 64 rows": "compressors' product, CSA, decode",
    "compressors' product, prefill": "compressors' product, CSA, prefill",
}
"""Production's, by their names here."""
ONCE = {
    "FP8 grouped linear, 64 rows": ("FP8 grouped linear, decode",),
    "index, 1 row at 65,536": ("indexer scores, decode of 1", "indexer top-512 of 16,384"),
    "index, 64 rows at a million": (
        "indexer scores, decode of 64", "indexer top-1024 of 262,144",
    ),
    "index, prefill": ("indexer scores, prefill", "indexer top-1024 of 262,144"),
}  # fmt: skip
"""Those of BEFORE with other names, taken together."""
INPUTS = {"FP8 linear": "round_blocks", "index": "index_queries"}
"""Kernels that make the inputs of such cases, and are no part of them."""


@dataclass(frozen=True)
class Row:
    """One kernel of a case. loop_*: of its main loop, see `Resources`; a warp's multiply-adds."""

    commit: str
    chip: str
    case: str
    kernel: str
    launches: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    instructions: int
    loop_instructions: int
    loop_spills: int
    loop_tensor: int
    loop_multiply_adds: int

    @classmethod
    def of(cls, commit: str, case: str, b: Built) -> Row:
        tensor = sum(n for name, n in b.loop.items() if name.startswith(MMA))
        return cls(
            commit, b.target, case, b.kernel, b.launches, b.registers, b.spill, b.shared,
            sum(b.instructions.values()), sum(b.loop.values()), b.loop_spills, tensor,
            multiply_adds(b.loop),
        )  # fmt: skip

    @property
    def each(self) -> float:
        """Instructions of the main loop for UNIT multiply-adds; 0: it has none."""
        if not self.loop_multiply_adds:
            return 0.0
        return self.loop_instructions * UNIT / self.loop_multiply_adds


def commit() -> str:
    """Of the checkout."""
    head = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    return subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()


def names(case: str, of: str) -> tuple[str, ...]:
    return (CASES[case],) if of != BEFORE else ONCE.get(case, (CASES[case],))


def rows_of(built: list[Built], of: str | None = None) -> list[Row]:
    of = of or commit()
    return [
        Row.of(of, case, b)
        for case in CASES
        for b in built
        if b.case in names(case, of) and b.target in CHIPS and not b.error
        if not any(case.startswith(kind) and b.kernel == k for kind, k in INPUTS.items())
    ]


def read(path: Path = RESULT) -> list[Row]:
    kinds = {"commit": str, "chip": str, "case": str, "kernel": str}
    with path.open(newline="") as file:
        return [
            Row(**{k: kinds.get(k, int)(v) for k, v in x.items()}) for x in csv.DictReader(file)
        ]


def write(rows: Iterable[Row], path: Path = RESULT) -> None:
    """In the order of chips and cases, BEFORE first."""
    places = {name: i for i, name in enumerate((*CHIPS, *CASES))}
    order = sorted(rows, key=lambda r: (r.commit != BEFORE, places[r.chip], places[r.case]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(order[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(asdict, order))


def update(rows: Sequence[Row], path: Path = RESULT) -> None:
    """Instead of the present ones of the same chips; BEFORE's and other chips' stay."""
    chips = {r.chip for r in rows}
    write([*(r for r in read(path) if r.commit == BEFORE or r.chip not in chips), *rows], path)


def main_kernel(rows: list[Row]) -> Row | None:
    """The first whose main loop multiplies, or else the largest."""
    return next((r for r in rows if r.each), max(rows, key=lambda r: r.instructions, default=None))


def arrow(before: object, after: object) -> str:
    return f"{after}" if before is None else f"{before} → {after}"


def cells(rows: list[Row], case: str, chip: str) -> tuple[Row | None, Row]:
    """The main kernels of a case on a chip, before (if there was one) and now."""
    mine = [r for r in rows if (r.case, r.chip) == (case, chip)]
    before, now = (
        main_kernel([r for r in mine if (r.commit == BEFORE) == b]) for b in (True, False)
    )
    assert now, f"{case} on {chip}: not compiled"
    return before, now


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def documented() -> str:
    """The tables of docs/gpu.md."""
    rows = read()

    def each(case: str, chip: str) -> str:
        before, now = cells(rows, case, chip)
        if not now.each:
            return "-"
        return arrow(f"{before.each:.1f}" if before and before.each else None, f"{now.each:.1f}")

    def taken(case: str, chip: str) -> str:
        def said(r: Row) -> str:
            return f"{r.registers}, {r.shared_bytes >> 10}, {r.spill_bytes}"

        before, now = cells(rows, case, chip)
        return arrow(said(before) if before else None, said(now))

    def launches(case: str) -> str:
        def of(now: bool) -> int:
            mine = [r for r in rows if (r.case, r.chip) == (case, CHIPS[0])]
            return sum(r.launches for r in mine if (r.commit != BEFORE) == now)

        return arrow(of(False) or None, of(True))

    first = table(
        ("operation", *CHIPS), ((case, *(each(case, chip) for chip in CHIPS)) for case in CASES)
    )
    some = ("sm80", "sm86", "sm90", "sm120")
    second = table(
        ("operation", "launches", *some),
        ((case, launches(case), *(taken(case, chip) for chip in some)) for case in CASES),
    )
    return f"{FIRST}\n{first}\n{SECOND}\n{second}"


FIRST = f"""\
Instructions that a warp executes in the main loop for {UNIT:,} multiply-adds on tensor cores:
"""
SECOND = """\
Launches; then registers of a thread, KiB of shared memory and bytes spilled, of the kernel that
multiplies, or else is largest:
"""


def document(path: Path = DOCUMENT) -> None:
    """Put the tables between their marks."""
    before, rest = path.read_text().split(BEGIN)
    path.write_text(before + BEGIN + documented() + END + rest.split(END)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chips", default=",".join(CHIPS), help="rows of others stay as they are")
    chips = parser.parse_args().chips.split(",")
    families = [[c for c in chips if SIBLINGS.get(c, c) == elder] for elder in CHIPS]
    for some in filter(None, families):  # what is done stays done
        update(rows_of(build(some, set(CASES.values()))))
    document()


if __name__ == "__main__":
    main()
