"""Check every Triton kernel on this machine's GPU, time it, and write one JSON file.

Correctness first: each kernel against plain torch, caches byte for byte; then a stack of layers,
as a step and as a CUDA graph, which have to give the same bits. Then the device's own times at
sizes of production, beside what moving the bytes takes at the speed of a plain copy. What fails is
a row of the table, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4_plugin.tools.cli import gpu_model
from dsv4_plugin.tools.kernel_work import FLASH, WORK, Work, World

Size = tuple[int, int, int]
"""Requests, tokens of each in the step, and tokens they then have."""
CHECKS = {
    "decode": (3, 1, 700),
    "decode, closing windows": (2, 1, 512),
    "prefill": (2, 18, 275),
}
QUICK_CHECKS = {"decode": CHECKS["decode"]}
TIMES = {
    "decode of 1 at 65,536": (1, 1, 1 << 16),
    "decode of 64 at 8,192": (64, 1, 1 << 13),
    "decode of 1 at 1,048,576": (1, 1, 1 << 20),
    "prefill of 4,096 at 8,192": (1, 4096, 1 << 13),
}
QUICK_TIMES = {"decode of 1 at 65,536": TIMES["decode of 1 at 65,536"]}
CONFIG, EXPERTS = FLASH, 64
"""Experts of a layer: fewer than Flash's 256, so that bfloat16 ones fit everywhere."""
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-4}
REPEATS = 20
BEYOND_L2 = 256 << 20
"""Bytes, more than any chip's L2, that are written between two launches of a kernel."""
TORCH = ("at::", "void at", "elementwise", "vectorized", "Memcpy", "Memset", "cub::", "fill")
"""What torch's own kernels have in their names."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="gpu-check.json", help="the result (default: %(default)s)")
    parser.add_argument("--no-times", action="store_true", help="correctness only")
    parser.add_argument("--quick", action="store_true", help="one size of each, under a minute")
    parser.add_argument("--model", action="store_true", help="time whole steps, too")
    gpu_model.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Exit code 1 where something is wrong. Raises ValueError without a GPU."""
    if not torch.cuda.is_available():
        raise ValueError("gpu-check needs a GPU that torch can use; torch.cuda finds none")
    device = torch.device("cuda", torch.cuda.current_device())
    result: dict[str, Any] = {"machine": machine(device), "rows": []}
    rows: list[dict[str, Any]] = result["rows"]

    def add(found: Sequence[dict[str, Any]]) -> None:
        rows.extend(found)
        Path(args.out).write_text(json.dumps(result, indent=1))

    add(check(device, QUICK_CHECKS if args.quick else CHECKS))
    add(gpu_model.check(device, gpu_model.QUICK if args.quick else gpu_model.CHECKED))
    wrong = [row["name"] for row in rows if row["error"]]
    if not args.no_times:
        result["copy_bytes_per_second"] = rate = copy_speed(device)
        add(times(device, rate, QUICK_TIMES if args.quick else TIMES))
        if args.model:
            add(gpu_model.times(device, rate, args))
    print(table(rows))
    checks = sum(row["kind"] == "check" for row in rows)
    print(f"{checks - len(wrong)} of {checks} checks passed; all of it is in {args.out}")
    return int(bool(wrong))


def machine(device: torch.device) -> dict[str, Any]:
    """What the result was measured on."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": list(torch.cuda.get_device_capability(device)),
        "memory": properties.total_memory,
        "processors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "dsv4_plugin": version("dsv4-plugin"),
    }


def row(kind: str, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row of the result: what `make` finds, or why it could not."""
    entry: dict[str, Any] = {"kind": kind, "name": name, "error": ""}
    try:
        entry |= make()
    except Exception as error:  # noqa: BLE001  (of whatever kind: the next row may tell more)
        entry["error"] = f"{type(error).__name__}: {error}"[:1000]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return entry


def check(device: torch.device, sizes: dict[str, Size] = CHECKS) -> list[dict[str, Any]]:
    """Every kernel at every size: its name and what is wrong, '' for nothing."""

    def one(make: Callable[[World], Work], shape: Size) -> dict[str, Any]:
        work = make(World.of(device, *shape, config=CONFIG, experts=EXPERTS))
        return {"error": compare(work.launch(), work.expect())}

    return [
        row("check", f"{name}, {size}", lambda make=make, shape=shape: one(make, shape))  # type: ignore[misc]
        for size, shape in sizes.items()
        for name, make in WORK.items()
    ]


def compare(found: list[Tensor], expected: list[Tensor]) -> str:
    """'' where integers, and so the words of caches, are equal and floats close."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        if not a.is_floating_point():
            different = int((a != b).sum())
            if different:
                return f"output {i}: {different} of {a.numel()} words differ"
            continue
        error = float((a.float() - b.float()).abs().max())
        allowed = TOLERANCE[a.dtype] * max(1.0, float(b.float().abs().max()))
        if not error <= allowed:  # NaN too
            return f"output {i}: off by {error:.3g}; {allowed:.3g} is allowed"
    return ""


def times(
    device: torch.device, copy_rate: float, sizes: dict[str, Size] = TIMES
) -> list[dict[str, Any]]:
    """Seconds of a kernel, beside what moving its bytes at a copy's speed would take."""

    def one(make: Callable[[World], Work], shape: Size) -> dict[str, Any]:
        work = make(World.of(device, *shape, config=CONFIG, experts=EXPERTS))
        seconds, by = device_seconds(work.again or work.launch, device)
        floor = work.nbytes / copy_rate
        found = {"seconds": seconds, "by": by, "bytes": work.nbytes}
        return found | {"floor_seconds": floor, "share": floor / seconds}

    return [
        row("kernel", f"{name}, {size}", lambda make=make, shape=shape: one(make, shape))  # type: ignore[misc]
        for size, shape in sizes.items()
        for name, make in WORK.items()
    ]


def device_seconds(launch: Callable[[], object], device: torch.device) -> tuple[float, str]:
    """Of the Triton kernels of one call, and how it was measured.

    By the profiler, which times each kernel on the device, with L2 full of other bytes. Where it
    sees none (some containers forbid it), by a graph of many calls, which leaves L2 as they do.
    """
    from torch.profiler import ProfilerActivity, profile

    flush = torch.empty(BEYOND_L2, dtype=torch.uint8, device=device)
    for _ in range(3):
        launch()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(REPEATS):
            flush.zero_()
            launch()
        torch.cuda.synchronize(device)
    spent = kernel_microseconds(profiled.events())
    if spent:
        return sum(spent.values()) / REPEATS / 1e6, "profiler"
    graph, _ = gpu_model.captured(lambda: [launch() for _ in range(REPEATS)], device)
    return median_seconds(graph.replay) / REPEATS, "graph"


def kernel_microseconds(events: Any) -> dict[str, float]:
    """By kernel on the device, torch's own left out."""
    found: dict[str, float] = {}
    for event in events or ():
        if event.device_type.name == "CPU":
            continue
        if not any(part in event.name for part in TORCH):
            found[event.name] = found.get(event.name, 0.0) + event.device_time
    return found


def copy_speed(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.zeros(1 << 28, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))


def median_seconds(launch: Callable[[], object]) -> float:
    """On the device, after warming up: of what takes longer than Python needs to launch it."""
    for _ in range(3):
        launch()
    spans = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end) / 1e3)
    return float(statistics.median(spans))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text: what is wrong, then times with their share of the floor."""
    lines = [f"wrong: {r['name']}: {r['error']}" for r in rows if r["error"]]
    timed = [r for r in rows if r.get("seconds")]
    if timed:
        lines.append(f"{'':56} {'us':>10} {'floor, us':>10} {'share':>6}")
    for r in timed:
        times_of = f"{1e6 * r['seconds']:10,.1f} {1e6 * r['floor_seconds']:10,.1f}"
        rest = f"  {r['tokens_per_second']:,.0f} tok/s" if "tokens_per_second" in r else ""
        lines.append(f"{r['name']:56.56} {times_of} {r['share']:6.2f}{rest}")
    return "\n".join(lines)
