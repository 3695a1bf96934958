"""`python -m benchmarks.tune OP`: variants of an operation's launch table, on the GPU at hand.

One field of the row is varied at a time, from the row that the chip has now. A variant has to give
what the present row gives, bit for bit where a request's bits may not depend on the launch, and is
timed alone at sizes of production. What is faster over all cases, in the geometric mean, is kept
before the next field is varied. At the end stands the row to paste into the table, with its times
as the reason. `benchmarks/launch_grids.py` says what is tried.

Without a GPU, `--check` compares all variants on small inputs, in Triton's interpreter
(TRITON_INTERPRET=1) or emulated for `--chip`; `--chip` alone compiles them and prints what they
take. Neither is a measurement.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import exp, inf, log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.launch_grids import OPS, Op
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.kernels.launch import FAMILY, architecture, pick
from dsv4_plugin.tools.cli import gpu_check
from dsv4_plugin.tools.kernel_work import FLASH, Work, World

Row = Any
"""A frozen dataclass of a launch table."""
Made = Callable[[], Work]
GAIN = 0.99
"""A variant is kept where it takes at most so much of the time."""
AS_IT_IS, IN_THE_END = "as it is", "in the end"
SMALL = replace(
    FLASH, hidden_size=512, num_attention_heads=16, q_lora_rank=256, o_groups=2, o_lora_rank=128,
    index_n_heads=16, index_topk=64, n_routed_experts=8, moe_intermediate_size=256,
)  # fmt: skip
SMALL_SIZES = {"decode": (3, 1, 700), "prefill": (1, 36, 275), "many": (144, 1, 9)}
"""What is checked without a GPU."""


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


def variants(row: Row, field: str, values: tuple[Any, ...]) -> dict[str, Row]:
    """The row as it is, and those with another value of the field, or of all that stand together;
    the row alone where it has no such part."""
    paths, found = field.split(), {AS_IT_IS: row}
    try:
        now = [value(row, path) for path in paths]
    except (AttributeError, IndexError):
        return found
    for new in values:
        if any(old != new for old in now):
            found[str(new)] = row
            for path in paths:
                found[str(new)] = varied(found[str(new)], path, new)
    return found


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


def cases(
    op: Op,
    device: torch.device,
    sizes: Mapping[str, gpu_check.Size] | None = None,
    config: ModelConfig = FLASH,
) -> dict[str, Made]:
    """By operation and size, of the op's sizes or of others."""
    sizes = sizes or op.sizes

    def make(of: Callable[[World], Work], size: gpu_check.Size) -> Work:
        return of(World.of(device, *size, config=config))

    return {
        f"{name}, {size}": partial(make, of, sizes[size])
        for name, of in op.work.items()
        for size in sizes
    }


@dataclass(frozen=True)
class Found:
    """Of a variant in a case: seconds, or what is wrong; the least bytes that have to be moved."""

    seconds: float = inf
    error: str = ""
    nbytes: int = 0


@dataclass(frozen=True)
class Compiled:
    """What a row launches in a case: hash of each kernel, grid, numbers; or why it cannot. taken:
    instructions, registers, KiB of shared memory, spill instructions in loops."""

    launches: tuple[Any, ...] = ()
    error: str = ""
    taken: str = ""


Trial = dict[str, dict[str, Found]]
"""By case and variant."""
Known = dict[str, dict[str, Compiled]]
"""Likewise."""


def failure(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def wrong(op: Op, field: str, work: Work, present: list[Tensor]) -> str:
    """What is wrong with the outputs of the row that is substituted; '' for nothing."""
    found = work.launch()
    if op.sums is None:
        return gpu_check.compare(found, present)
    if field in (*op.sums, IN_THE_END):
        return gpu_check.compare(found, work.expect())
    return "" if all(map(torch.equal, found, present)) else "other bits than the present row's"


def tried(
    op: Op, field: str, rows: dict[str, Row], work: Work, known: Mapping[str, Compiled],
    seconds: Callable[[Work], float],
) -> dict[str, Found]:  # fmt: skip
    """All rows in one case, the present one first. What launches what the present one does is not
    timed again."""
    found: dict[str, Found] = {}
    present: list[Tensor] = []
    for name, row in rows.items():
        compiled = known.get(name, Compiled())
        if compiled.error:
            found[name] = Found(error=compiled.error)
        elif found and compiled.launches and compiled.launches == known[AS_IT_IS].launches:
            found[name] = found[AS_IT_IS]
        else:
            with substituted(op.table, row):
                try:
                    present = present or work.launch()
                    error = wrong(op, field, work, present) if found else ""
                    found[name] = Found(inf if error else seconds(work), error, work.nbytes)
                except Exception as raised:  # noqa: BLE001  (of whatever kind: the next may do)
                    found[name] = Found(error=failure(raised))
        if found[AS_IT_IS].error:  # nothing to compare with
            return dict.fromkeys(rows, found[AS_IT_IS])
    return found


def ratio(trial: Trial, name: str) -> float:
    """Geometric mean of a variant's times over the present row's, where that runs; inf where the
    variant fails."""
    pairs = [(c[name].seconds, c[AS_IT_IS].seconds) for c in trial.values()]
    logs = [log(mine / present) if mine < inf else inf for mine, present in pairs if present < inf]
    return exp(sum(logs) / len(logs)) if logs else inf


def search(
    op: Op, made: dict[str, Made], compile_all: Callable[[dict[str, Row]], Known],
    seconds: Callable[[Work], float], report: Callable[[str, Trial], None],
) -> Row:  # fmt: skip
    """The best row, field by field. Whether the present row is right, gpu-check says."""
    row = pick(op.table)
    for field, values in op.fields.items():
        rows = variants(row, field, values)
        if len(rows) == 1:
            continue
        known = compile_all(rows)
        trial = {
            case: tried(op, field, rows, make(), known.get(case, {}), seconds)
            for case, make in made.items()
        }
        report(field, trial)
        best = min(rows, key=partial(ratio, trial))
        row = rows[best] if ratio(trial, best) <= GAIN else row
    return row


def compiled(name: str, chip: str, case: str, row: Row, inspect: bool = False) -> Compiled:
    """On a chip that need not be there; where it is, Triton's cache knows the kernels then."""
    from lab.kit.binary import resources
    from lab.kit.targets import FakeGPU

    class Recorder(FakeGPU):
        def launch(self, source: Any, metadata: Any, grid: Any, args: Any) -> None:
            numbers = tuple(a for a in args if isinstance(a, int | float))
            launches.append((metadata.hash, grid, numbers))

    launches: list[Any] = []
    with Recorder(chip) as gpu, substituted(OPS[name].table, row):
        try:
            cases(OPS[name], torch.device("meta"))[case]().launch()
        except Exception as error:  # noqa: BLE001  (of whatever kind: the next may do)
            return Compiled(error=failure(error))
        taken = resources([kernel for kernel, _ in gpu.compiled()]) if inspect else ()
    columns = [
        (sum(r.instructions.values()), r.registers, r.shared >> 10, r.loop_spills) for r in taken
    ]
    return Compiled(tuple(launches), taken="; ".join(" ".join(map(str, c)) for c in columns))


def processes() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))


def shown(field: str, trial: Trial, rate: float | None = None) -> str:
    """A table: a line for each case, a column for each variant, us and the share of a copy's speed
    (bytes/s); no rate: whether they are right. What is wrong stands below."""
    lines, errors = [], []
    for case, found in trial.items():
        lines.append(f"  {case:42}")
        for name, f in found.items():
            timed = (
                f"{1e6 * f.seconds:,.1f} ({f.nbytes / rate / f.seconds:.2f})" if rate else "right"
            )
            lines[-1] += f"{'-' if f.error else timed:>16}"
            errors += [f"  {name}, {case}: {f.error}"] if f.error else []
    head = f"\n{field:44}" + "".join(f"{name:>16}" for name in found)
    return "\n".join([head, *lines, *errors])


def pasted(op: Op, row: Row, reason: str) -> str:
    """The row as the table has it: by the chip's name where it has one, or else its family's."""
    chip = architecture()
    name = chip if chip in op.table else FAMILY.get(chip, "any")
    return f'    # {reason}\n    "{name}": {row},'


def print_compiled(name: str, chip: str, op: Op, only: str) -> None:
    from lab.kit.targets import FakeGPU

    with FakeGPU(chip):
        row = pick(op.table)
    rows = {AS_IT_IS: row}
    for field, values in op.fields.items():
        some = list(variants(row, field, values).items())[1:]
        rows |= {f"{field} = {new}": variant for new, variant in some}
    print("Compiled only; of each kernel instructions, registers, KiB shared, spills in loops:")
    with processes() as pool:
        of = partial(pool.submit, compiled, name, chip, inspect=True)
        made = [case for case in cases(op, torch.device("meta")) if only in case]
        futures = {case: {said: of(case, row) for said, row in rows.items()} for case in made}
        for case, some in futures.items():
            print(case)
            for said, future in some.items():
                print(f"  {said:40} {future.result().error or future.result().taken}", flush=True)


def check(op: Op, only: str, chip: str) -> None:
    """The variants' results on small inputs."""
    from lab.kit import mode  # which repairs the interpreter

    of = cases(op, torch.device("cpu"), SMALL_SIZES, SMALL)
    made = {case: make for case, make in of.items() if only in case}
    how = "in Triton's interpreter" if mode.INTERPRET else f"emulated for {chip}"
    with mode.gpu("interpret" if mode.INTERPRET else chip):
        row = search(op, made, lambda rows: {}, lambda work: 1.0, lambda *x: print(shown(*x)))
        print(f"\nNothing was measured: variants ran {how}, on small inputs. The row as it is:\n")
        print(pasted(op, row, "guessed"))


def measure(name: str, op: Op, only: str, out: Path | None) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    on, rate = gpu_check.machine(device), gpu_check.copy_speed(device)
    made = {case: make for case, make in cases(op, device).items() if only in case}
    lines: list[dict[str, Any]] = []

    def seconds(work: Work) -> float:
        return gpu_check.device_seconds(work.again or work.launch, device)[0]

    def report(field: str, trial: Trial) -> None:
        print(shown(field, trial, rate), flush=True)
        lines.extend(
            {
                "gpu": on["gpu"], "torch": on["torch"], "triton": on["triton"], "op": name,
                "case": case, "field": field, "value": variant, "us": f"{1e6 * f.seconds:.1f}",
                "floor_us": f"{1e6 * f.nbytes / rate:.1f}", "error": f.error,
            }
            for case, found in trial.items() for variant, f in found.items()
        )  # fmt: skip
        if out:
            with out.open("w", newline="") as file:
                writer = csv.DictWriter(file, lines[0])
                writer.writeheader()
                writer.writerows(lines)

    with processes() as pool:

        def compile_all(rows: dict[str, Row]) -> Known:
            of = partial(pool.submit, compiled, name, architecture())
            futures = {case: {n: of(case, row) for n, row in rows.items()} for case in made}
            return {c: {n: f.result() for n, f in some.items()} for c, some in futures.items()}

        row = search(op, made, compile_all, seconds, report)
    rows = {AS_IT_IS: pick(op.table), "the row": row}
    last = {case: tried(op, IN_THE_END, rows, make(), {}, seconds) for case, make in made.items()}
    report(IN_THE_END, last)
    for case in made:
        right = [x for x in lines if x["case"] == case and not x["error"]]
        for x in sorted(right, key=lambda x: float(x["us"]))[:1]:
            print(f"  {case}: at best {x['us']} us, {x['field']} = {x['value']}")
    times = [f"{1e6 * f['the row'].seconds:,.0f} us {case}" for case, f in last.items()]
    reason = f"measured: {on['gpu']}, {'; '.join(times)}"
    print(f"\nThe row to paste:\n\n{pasted(op, row, reason)}\n")
    with substituted(op.table, row):
        for case, make in cases(op, device, gpu_check.CHECKS).items():
            work = make()
            error = gpu_check.compare(work.launch(), work.expect())
            print(f"beside plain torch, {case}: {error or 'right'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--cases", default="", help="only those whose names contain this")
    parser.add_argument("--fields", default="", help="only those whose names contain this")
    parser.add_argument("--check", action="store_true", help="compare small cases, without a GPU")
    parser.add_argument("--chip", help="compile for it, or check as it, instead of measuring")
    parser.add_argument("--out", type=Path, help="a CSV file of every time")
    args = parser.parse_args()
    whole = OPS[args.op]
    op = replace(whole, fields={f: v for f, v in whole.fields.items() if args.fields in f})
    of = cases(op, torch.device("meta"), SMALL_SIZES if args.check else None)
    for option, names, only in (("cases", of, args.cases), ("fields", whole.fields, args.fields)):
        if not any(only in name for name in names):
            parser.error(f"--{option} is {only!r}; allowed are parts of {', '.join(names)}")
    if args.check:
        check(op, args.cases, args.chip or "sm80")
    elif args.chip:
        print_compiled(args.op, args.chip, op, args.cases)
    elif torch.cuda.is_available():
        measure(args.op, op, args.cases, args.out)
    else:
        raise SystemExit("torch.cuda finds no GPU to measure on; --check and --chip need none")


if __name__ == "__main__":
    main()
