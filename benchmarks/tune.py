"""`python -m benchmarks.tune OP`: variants of an operation's launch table, on the GPU at hand.

One field of the row is varied at a time, from the row that the chip has now. Each variant has to
give what the present row gives, and is timed alone, at sizes of production. What is faster over all
cases, in the geometric mean, is kept before the next field is varied. At the end stands the row to
paste into the table, with its times as the reason.

Without a GPU, `--chip sm90` compiles the variants for that chip and prints what they take: a table
to choose from, not a measurement.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4_plugin.config import CSA, HCA, SWA
from dsv4_plugin.kernels.attention import kernel as attention
from dsv4_plugin.kernels.experts import kernel as experts
from dsv4_plugin.kernels.index import kernel as index
from dsv4_plugin.kernels.index import topk
from dsv4_plugin.kernels.launch import architecture, pick
from dsv4_plugin.kernels.linear import kernel as linear
from dsv4_plugin.kernels.packed import fp8
from dsv4_plugin.kernels.packed import kernel as int4
from dsv4_plugin.kernels.streams import kernel as streams
from dsv4_plugin.tools import kernel_work as work
from dsv4_plugin.tools.cli.gpu_check import compare, copy_speed, device_seconds, machine
from dsv4_plugin.tools.kernel_work import Work, World

Row = Any
"""A frozen dataclass of a launch table."""
GAIN = 0.99
"""A variant is kept where it takes at most so much of the time."""
SIZES = {
    "decode of 1": (1, 1, 1 << 16),
    "decode of 1 at a million": (1, 1, 1 << 20),
    "decode of 16": (16, 1, 1 << 13),
    "decode of 64": (64, 1, 1 << 13),
    "decode of 256": (256, 1, 1 << 11),
    "prefill of 4,096": (1, 4096, 1 << 13),
}
"""Requests, tokens of each in the step, and tokens they then have."""
STEPS = tuple(name for name in SIZES if "million" not in name)
LONG = tuple(SIZES)


@dataclass(frozen=True)
class Op:
    """table: the launch table whose row is varied. work: what it launches, at `sizes`. fields:
    values to try of each field; 'few.warps' lies in the row's `few`, 'ways.0.columns' in the first
    of its `ways`; fields that have to be equal stand together."""

    table: dict[str, Row]
    work: dict[str, Callable[[World], Work]]
    sizes: tuple[str, ...]
    fields: dict[str, tuple[Any, ...]]


def _tile(name: str, **values: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    return {f"{name}.{field}": some for field, some in values.items()}


_WARPS, _STAGES = (4, 8), (2, 3, 4)
LATENT = partial(work.fp8_linear, n_in="hidden_size", n_out="q_lora_rank")
QUERIES = partial(work.fp8_linear, n_in="q_lora_rank", n_out="num_attention_heads", factor=512)
OPS = {
    "attention": Op(
        attention.LAUNCHES,
        {
            name: partial(work.attention, ratio=ratio)
            for name, ratio in (("SWA", SWA), ("CSA", CSA), ("HCA", HCA))
        },
        LONG,
        {
            "heads": (16, 32, 64),
            "fp8.0.below": (16, 32, 64, 128),
            **_tile("fp8.0", columns=(1, 2, 4), warps=_WARPS, deal=(0, 4, math.inf)),
            **_tile("fp8.1", columns=(1, 2, 4), warps=_WARPS, unpack=(2, 4, 16, math.inf)),
            "bfloat16.0.below": (16, 32, 64, 128),
            **_tile("bfloat16.0", columns=(1, 2, 4), warps=_WARPS, stages=(1, 2, 3)),
            **_tile("bfloat16.1", columns=(1, 2, 4), warps=_WARPS, stages=(1, 2, 3)),
        },
    ),
    "index": Op(
        index.LAUNCHES,
        {"scores and choice": work.index},
        LONG,
        {
            "entries": (32, 64, 128),
            "paged.warps flat.warps": (2, 4, 8),
            "paged.stages": (1, 2),
            "flat.stages": (2, 3, 4),
            "programs": (432, 864, 1728),
            "blocks": (8, 16, 32, 64),
        },
    ),
    "topk": Op(
        topk.LAUNCHES,
        {"scores and choice": work.index},
        LONG,
        {
            "rows": (8, 32, 64),
            "least": (2048, 4096, 8192),
            "small_chunk": (512, 1024),
            "chunk": (1024, 2048, 4096),
            "warps": (4, 8),
        },
    ),
    "experts": Op(
        experts.LAUNCHES,
        {
            "MXFP4": partial(work.packed_experts, kind="fp4"),
            "FP8": partial(work.packed_experts, kind="fp8"),
        },
        STEPS,
        {
            "split": (0, 8, 16, 48, 96),
            "piece": (512, 1024, 2048),
            "limit": (4, 8, 16, 32),
            **_tile("few", columns=(64, 128), depth=(128, 256), warps=_WARPS, stages=_STAGES),
            **_tile("many", rows=(32, 64, 128), columns=(64, 128, 256), warps=_WARPS),
            **_tile("many", stages=_STAGES, turned=(False, True)),
            **_tile("many_fp8", rows=(32, 64, 128), warps=_WARPS, turned=(False, True)),
        },
    ),
    "experts-bfloat16": Op(
        experts.LAUNCHES,
        {"bfloat16": work.plain_experts},
        STEPS,
        {
            **_tile("plain_few", columns=(32, 64), depth=(64, 128), warps=_WARPS, stages=_STAGES),
            **_tile("plain_many", rows=(32, 64, 128), columns=(64, 128), warps=_WARPS),
        },
    ),
    "fp8": Op(
        fp8.LINEARS,
        {
            "latent": LATENT,
            "queries": QUERIES,
            "gated": partial(work.gated_linear, rounded=False),
        },
        STEPS,
        {
            "codes": (None, fp8.EIGHT),
            "programs": (96, 128, 192, 256, 384),
            "least": (256, 512, 1024),
            "line": (32, 64, 128, 256),
            "group": (1, 4, 8),
            **_tile("codes.plain.few", warps=_WARPS, stages=_STAGES, outputs=(32, 64, 128)),
            **_tile("codes.plain.some", rows=(32, 64, 128), warps=_WARPS, stages=_STAGES),
            **_tile(
                "codes.plain.many", outputs=(64, 128, 256), rows=(64, 128), turned=(False, True)
            ),
            **_tile("codes.gated.few", warps=_WARPS, stages=_STAGES),
            **_tile("codes.gated.some", rows=(16, 32, 64), warps=_WARPS),
            **_tile("codes.gated.many", rows=(32, 64, 128), stages=_STAGES),
        },
    ),
    "fp8-by-bits": Op(
        fp8.LINEARS,
        {
            "latent": partial(LATENT, rounded=False),
            "queries": partial(QUERIES, rounded=False),
            "groups of heads": work.grouped_linear,
        },
        STEPS,
        {
            "programs": (96, 128, 192, 256, 384),
            "least": (256, 512, 1024),
            "line": (32, 64, 128, 256),
            **_tile("bits.plain.few", warps=_WARPS, stages=_STAGES, outputs=(32, 64, 128)),
            **_tile("bits.plain.some", rows=(16, 32, 64), warps=_WARPS, stages=_STAGES),
            **_tile("bits.plain.many", outputs=(64, 128), rows=(64, 128), stages=_STAGES),
        },
    ),
    "int4": Op(
        int4.TILES,
        {"latent": work.int4_linear},
        STEPS,
        {
            **_tile("few", columns=(32, 64), warps=_WARPS, stages=_STAGES),
            **_tile("many", rows=(16, 32, 64, 128), columns=(32, 64, 128), warps=_WARPS),
        },
    ),
    "float32": Op(
        linear.LAUNCHES,
        {
            "router": partial(work.float32_linear, outputs=256),
            "compressors": partial(work.float32_linear, outputs=2560),
        },
        STEPS,
        {
            "split": (32, 128, 512),
            "piece": (256, 512, 1024),
            "many": (32, 64, 128),
            "columns": (32, 64, 128),
            "depth": (32, 64, 128),
            "warps": _WARPS,
            "stages": _STAGES,
        },
    ),
    "streams": Op(
        streams.LAUNCHES,
        {"before a sublayer": work.residual_streams},
        STEPS,
        {
            "block": (32, 64),
            "few": (16, 64, 128),
            "parts": (2, 4, 8),
            "stages": _STAGES,
            "slab": (1024, 4096),
            "warps": _WARPS,
            "end_warps": (4, 8, 16),
        },
    ),
}
Made = Callable[[], Work]


def value(row: Row, path: str) -> Any:
    for part in path.split("."):
        row = row[int(part)] if isinstance(row, tuple) else getattr(row, part)
    return row


def varied(row: Row, path: str, new: Any) -> Row:
    """The row with another value where the path leads."""
    first, _, rest = path.partition(".")
    inner = varied(value(row, first), rest, new) if rest else new
    if isinstance(row, tuple):
        i = int(first)
        return (*row[:i], inner, *row[i + 1 :])
    return replace(row, **{first: inner})


def variants(row: Row, field: str, values: tuple[Any, ...]) -> Iterator[tuple[str, Row]]:
    """Other values of the field, or of those that stand together, and the rows with them."""
    paths = field.split()
    try:
        now = [value(row, path) for path in paths]
    except AttributeError:  # of a part that this row does not have
        return
    for new in values:
        if any(old != new for old in now):
            found = row
            for path in paths:
                found = varied(found, path, new)
            yield f"{field} = {new}", found


@contextmanager
def substituted(table: dict[str, Row], row: Row) -> Iterator[None]:
    """Launch by this row."""
    before = dict(table)
    table[architecture()] = row
    try:
        yield
    finally:
        table.clear()
        table.update(before)


def cases(op: Op, device: torch.device) -> dict[str, Made]:
    def make(of: Callable[[World], Work], size: tuple[int, int, int]) -> Work:
        return of(World.of(device, *size))

    return {
        f"{name}, {size}": partial(make, of, SIZES[size])
        for name, of in op.work.items()
        for size in op.sizes
    }


@dataclass(frozen=True)
class Found:
    """Of one case: seconds, or what is wrong; whether the bits are the present row's; the least
    bytes that have to be moved."""

    seconds: float = math.inf
    error: str = ""
    same_bits: bool = True
    nbytes: int = 0


def measure(op: Op, row: Row, make: Made, present: list[Tensor]) -> Found:
    """Compare with the present row's outputs, then time. A variant that cannot be launched, or is
    wrong, has an error instead."""
    with substituted(op.table, row):
        try:
            one = make()
            found = one.launch()
            error = compare(found, present)
            same = all(map(torch.equal, found, present))
            if error:
                return Found(error=error, same_bits=same)
            return Found(seconds_of(one), same_bits=same, nbytes=one.nbytes)
        except Exception as error:  # noqa: BLE001  (of whatever kind: the next variant may do)
            return Found(error=f"{type(error).__name__}: {error}".splitlines()[0][:120])


def seconds_of(one: Work) -> float:
    return device_seconds(one.again or one.launch, torch.device("cuda"))[0]


def ratio(found: dict[str, Found], best: dict[str, Found]) -> float:
    """Geometric mean of a variant's times over the best row's; inf where it fails in any case."""
    if any(f.error for f in found.values()):
        return math.inf
    logs = [math.log(f.seconds / best[name].seconds) for name, f in found.items()]
    return math.exp(sum(logs) / len(logs))


Report = Callable[[str, dict[str, Found]], None]


def search(op: Op, made: dict[str, Made], report: Report) -> tuple[Row, dict[str, Found]]:
    """The best row and its times, field by field. Whether the present row is right, gpu-check
    says."""
    row = pick(op.table)
    outputs = {name: make().launch() for name, make in made.items()}
    best = {name: measure(op, row, make, outputs[name]) for name, make in made.items()}
    report("as it is", best)
    for field, values in op.fields.items():
        candidates = [(row, best)]
        for name, variant in variants(row, field, values):
            found = {c: measure(op, variant, make, outputs[c]) for c, make in made.items()}
            report(name, found)
            if ratio(found, best) < GAIN:
                candidates.append((variant, found))
        row, best = min(candidates, key=lambda c: ratio(c[1], best))
    return row, best


def compile_all(name: str, chip: str, only: str, fields: str) -> dict[str, dict[str, str]]:
    """What single variants take on a chip, by case and variant, compiled by as many processes as
    there are cores; on the machine that has the chip, Triton's cache knows them afterwards."""
    of = [case for case in cases(OPS[name], torch.device("meta")) if only in case]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        return dict(zip(of, pool.map(partial(compiled, name, chip, fields), of), strict=True))


def compiled(op_name: str, chip: str, fields: str, case: str) -> dict[str, str]:
    """By variant: instructions / registers / KiB of shared memory / spills in loops."""
    from lab.kit.binary import resources
    from lab.kit.targets import FakeGPU

    op, found = OPS[op_name], {}
    make = cases(op, torch.device("meta"))[case]
    with FakeGPU(chip):
        row = pick(op.table)
        rows = [("as it is", row)]
        for field, values in op.fields.items():
            rows += variants(row, field, values) if fields in field else ()
    for name, variant in rows:
        with FakeGPU(chip) as gpu, substituted(op.table, variant):
            try:
                make().launch()
            except Exception as error:  # noqa: BLE001  (of whatever kind: the next variant may do)
                found[name] = f"{type(error).__name__}: {error}".splitlines()[0][:60]
                continue
        taken = resources([kernel for kernel, _ in gpu.compiled()])
        instructions = sum(sum(r.instructions.values()) for r in taken)
        shared, spills = max(r.shared for r in taken) >> 10, sum(r.loop_spills for r in taken)
        registers = max(r.registers for r in taken)
        found[name] = f"{instructions:,} / {registers} / {shared} / {spills}"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--cases", default="", help="only those whose names contain this")
    parser.add_argument("--fields", default="", help="only those whose names contain this")
    parser.add_argument("--chip", help="compile for it instead of measuring")
    parser.add_argument("--out", type=Path, help="a CSV file of every time")
    args = parser.parse_args()
    op = OPS[args.op]
    if args.chip:
        print("instructions / registers / KiB of shared memory / spills in loops, compiled only")
        for case, found in compile_all(args.op, args.chip, args.cases, args.fields).items():
            print(case, *(f"  {variant:40} {taken}" for variant, taken in found.items()), sep="\n")
        return
    if not torch.cuda.is_available():
        raise SystemExit("torch.cuda finds no GPU to measure on; --chip compiles without one")
    op = replace(op, fields={f: v for f, v in op.fields.items() if args.fields in f})
    device = torch.device("cuda", torch.cuda.current_device())
    on, rate, lines = machine(device), copy_speed(device), []
    made = {name: make for name, make in cases(op, device).items() if args.cases in name}
    compile_all(args.op, architecture(), args.cases, args.fields)

    def report(variant: str, found: dict[str, Found]) -> None:
        print(variant)
        for case, f in found.items():
            floor = f.nbytes / rate
            print(f"  {case:40} {f.error or described(f, floor)}", flush=True)
            lines.append(
                {
                    "gpu": on["gpu"], "torch": on["torch"], "triton": on["triton"], "op": args.op,
                    "case": case, "variant": variant, "us": f"{1e6 * f.seconds:.1f}",
                    "floor_us": f"{1e6 * floor:.1f}", "same_bits": f.same_bits, "error": f.error,
                }
            )  # fmt: skip

    row, best = search(op, made, report)
    print("\nThe row to paste:\n")
    print(f"    # measured: {on['gpu']}: {reason(best)}")
    print(f"    {architecture()!r}: {row},")
    if args.out:
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, lines[0])
            writer.writeheader()
            writer.writerows(lines)


def described(f: Found, floor: float) -> str:
    bits = "" if f.same_bits else ", other bits"
    return f"{1e6 * f.seconds:10,.1f} us, {floor / f.seconds:.2f} of a copy's speed{bits}"


def reason(best: dict[str, Found]) -> str:
    return "; ".join(f"{case} {1e6 * f.seconds:,.0f} us" for case, f in best.items() if not f.error)


if __name__ == "__main__":
    main()
