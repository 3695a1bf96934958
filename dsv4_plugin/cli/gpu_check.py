"""Check every Triton kernel on this machine's GPU, time it, and write one JSON file.

Correctness first: each kernel against plain torch, caches byte for byte. Then times at sizes of
production, beside the bandwidth that a plain copy reaches here.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsv4_plugin.cli.gpu_work import WORK, Work, World

CHECKS = {
    "decode": (3, 1, 700),
    "decode, closing windows": (2, 1, 512),
    "prefill": (2, 18, 275),
}
"""Requests, tokens of each, and tokens they then have."""
TIMES = {
    "decode of 1 at 65,536": (1, 1, 1 << 16),
    "decode of 64 at 8,192": (64, 1, 1 << 13),
    "decode of 1 at 1,048,576": (1, 1, 1 << 20),
    "prefill of 4,096 at 8,192": (1, 4096, 1 << 13),
}
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
REPEATS = 50


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="gpu-check.json", help="the result (default: %(default)s)")
    parser.add_argument("--no-times", action="store_true", help="correctness only")


def run(args: argparse.Namespace) -> int:
    """Exit code 1 where a kernel is wrong. Raises ValueError without a GPU."""
    if not torch.cuda.is_available():
        raise ValueError("gpu-check needs a GPU that torch can use; torch.cuda finds none")
    device = torch.device("cuda", torch.cuda.current_device())
    result: dict[str, Any] = {"machine": machine(device), "checks": check(device)}
    wrong = [c["name"] for c in result["checks"] if c["error"]]
    if not args.no_times and not wrong:
        result["copy_bytes_per_second"] = copy_speed(device)
        result["times"] = times(device, result["copy_bytes_per_second"])
    Path(args.out).write_text(json.dumps(result, indent=2))
    print(f"{len(result['checks']) - len(wrong)} of {len(result['checks'])} checks passed")
    for name in wrong:
        print(f"wrong: {name}")
    print(f"written to {args.out}; please attach it to an issue")
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


def check(
    device: torch.device, sizes: dict[str, tuple[int, int, int]] = CHECKS
) -> list[dict[str, str]]:
    """Every kernel at every size: its name and what is wrong, '' for nothing."""
    found = []
    for size, shape in sizes.items():
        for name, make in WORK.items():
            error = _check(lambda make=make, shape=shape: make(World.of(device, *shape)))  # type: ignore[misc]
            found.append({"name": f"{name}, {size}", "error": error})
    return found


def _check(make: Callable[[], Work]) -> str:
    """A kernel that does not compile or launch is a finding like a wrong number."""
    try:
        work = make()
        return compare(work.launch(), work.expect())
    except (RuntimeError, AssertionError, ValueError) as error:
        return f"{type(error).__name__}: {error}"[:1000]


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


def times(device: torch.device, copy_rate: float) -> list[dict[str, Any]]:
    """Seconds per launch, beside what moving its bytes at a copy's speed would take."""
    found = []
    for size, shape in TIMES.items():
        for name, make in WORK.items():
            work = make(World.of(device, *shape))
            seconds = median_seconds(work.launch)
            floor = work.nbytes / copy_rate
            entry = {"name": f"{name}, {size}", "seconds": seconds, "bytes": work.nbytes}
            found.append(entry | {"roofline_seconds": floor, "share": floor / seconds})
            torch.cuda.empty_cache()
    return found


def copy_speed(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy of 256 MiB."""
    source = torch.zeros(1 << 26, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source))


def median_seconds(launch: Callable[[], object]) -> float:
    """On the device, after warming up."""
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
