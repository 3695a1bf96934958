"""Prefill and decode of real Flash layers with packed weights, and where the time goes.

The checkpoint holds three full-width layers (SWA, CSA, HCA) with all 256 experts in FP8 and FP4.
Times are wall-clock seconds of one run; a part's time is what its modules took, without the parts
inside it. Rows are appended to benchmarks/results/slice.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from dsv4_plugin import load
from dsv4_plugin.batch import Batch
from dsv4_plugin.engine import LocalModel
from dsv4_plugin.model import block as block_module
from dsv4_plugin.model.attention import Attention
from dsv4_plugin.model.compressor import Compressors
from dsv4_plugin.model.indexer import Indexer
from dsv4_plugin.model.moe import Expert, MoE
from dsv4_plugin.model.quantised import QuantisedExperts

RESULTS = Path(__file__).parent / "results" / "slice.csv"
PARTS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "attention": (Attention, ("forward",)),
    "indexer": (Indexer, ("forward",)),
    "compressor": (Compressors, ("forward",)),
    "experts": (QuantisedExperts, ("forward",)),
    "shared expert": (Expert, ("forward",)),
    "gate and sum": (MoE, ("forward",)),
}
MHC = "mHC"
"""The part that is an operation of blocks and no module of its own."""
GIB = 2**30


@dataclass
class Clock:
    """Seconds by part; a part's time stops while one inside it runs."""

    seconds: dict[str, float] = field(default_factory=dict)
    running: list[tuple[str, float]] = field(default_factory=list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        now = time.perf_counter()
        if self.running:
            self._add(self.running[-1][0], now - self.running[-1][1])
        self.running.append((name, now))
        yield
        now = time.perf_counter()
        self._add(name, now - self.running.pop()[1])
        if self.running:
            self.running[-1] = (self.running[-1][0], now)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def time_parts(model: nn.Module, clock: Clock) -> None:
    """Make the methods of PARTS, and mHC's operation, report to the clock."""
    block_module.streams = _timed(block_module.streams, MHC, clock)
    for module in model.modules():
        for name, (kind, methods) in PARTS.items():
            if isinstance(module, kind):
                for method in methods:
                    setattr(module, method, _timed(getattr(module, method), name, clock))


def _timed(function, name, clock):  # type: ignore[no-untyped-def]
    def timed(*args, **kwargs):  # type: ignore[no-untyped-def]
        with clock.part(name):
            return function(*args, **kwargs)

    return timed


class Memory:
    """The process's own memory (not file pages), and its peak while `watching`."""

    peak = 0

    @staticmethod
    def now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise NotImplementedError("/proc/self/status has no RssAnon: memory is measured on Linux")

    @contextmanager
    def watching(self) -> Iterator[None]:
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.02):
                self.peak = max(self.peak, self.now())

        thread = threading.Thread(target=watch)
        thread.start()
        yield
        done.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompts", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--decode", type=int, nargs="+", default=[1, 8], help="requests at once")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    memory = Memory()
    before, start = memory.now(), time.perf_counter()
    with memory.watching():
        local = load(args.checkpoint, kv_dtype="fp8")
    files = sum(f.stat().st_size for f in args.checkpoint.glob("*.safetensors"))
    print(
        f"files {files / GIB:.2f} GiB, loaded in {time.perf_counter() - start:.0f} s; memory "
        f"{(memory.now() - before) / GIB:.2f} GiB, peak {(memory.peak - before) / GIB:.2f} GiB",
        flush=True,
    )
    clock = Clock()
    time_parts(local.model, clock)
    names = [*PARTS, MHC, "rest"]
    print(f"{'case':14}{'tokens/s':>10}" + "".join(f"{name:>15}" for name in names))
    for n in args.prompts:
        _report(_prefill(local, n, clock))
    for n in args.decode:
        _report(_decode(local, n, args.steps, clock))


@dataclass(frozen=True)
class Row:
    """tokens in `seconds`, of which each part took its share."""

    case: str
    tokens: int
    seconds: float
    parts: dict[str, float]


def _measure(case: str, tokens: int, clock: Clock, run) -> Row:  # type: ignore[no-untyped-def]
    clock.seconds.clear()
    start = time.perf_counter()
    run()
    return Row(case, tokens, time.perf_counter() - start, dict(clock.seconds))


def _ids(n: int) -> Tensor:
    return torch.randint(0, 100000, (n,), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def _prefill(local: LocalModel, n: int, clock: Clock) -> Row:
    batch = Batch(local.model, local.layout, [n], 2048)
    return _measure(f"prefill {n}", n, clock, lambda: batch.prefill([_ids(n)]))


@torch.inference_mode()
def _decode(local: LocalModel, requests: int, steps: int, clock: Clock) -> Row:
    """After a prompt of 64 tokens each."""
    batch = Batch(local.model, local.layout, [64 + steps + 1] * requests, 2048)
    batch.prefill(list(_ids(64 * requests).view(requests, 64)))
    everyone, token = list(range(requests)), _ids(requests)
    batch.decode(everyone, token)

    def run() -> None:
        for _ in range(steps):
            local.model.head(batch.decode(everyone, token))

    return _measure(f"decode {requests}", requests * steps, clock, run)


def _report(row: Row) -> None:
    parts = [row.parts.get(name, 0.0) for name in (*PARTS, MHC)]
    shares = [p / row.seconds for p in [*parts, row.seconds - sum(parts)]]
    speed = row.tokens / row.seconds
    print(f"{row.case:14}{speed:>10.2f}" + "".join(f"{s:>15.1%}" for s in shares), flush=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        out = csv.writer(file)
        if new:
            out.writerow(["time", "machine", "case", "tokens_per_s", *PARTS, MHC, "rest"])
        machine = f"{platform.machine()} {os.cpu_count()} cores"
        values = [round(v, 4) for v in (speed, *shares)]
        out.writerow([time.strftime("%Y-%m-%dT%H:%M:%S"), machine, row.case, *values])


if __name__ == "__main__":
    main()
