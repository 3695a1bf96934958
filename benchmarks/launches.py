"""How many launches a layer of each kind takes in a decode step, counted in the emulator.

A model with one layer more of a kind launches that much more: Triton's kernels, and torch's own
operations besides. Not counted are products, experts, and views.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsv4_plugin import load
from dsv4_plugin.batch import allocate
from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.config import CSA, HCA, SWA
from dsv4_plugin.kernels import arrival, dispatch
from dsv4_plugin.kernels.step import StepBuilder
from dsv4_plugin.tools.make import make_checkpoint
from lab.kit.gpu import EmulatedGPU

KINDS = {"SWA": SWA, "CSA": CSA, "HCA": HCA}
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided")
PRODUCTS = ("mm", "bmm", "addmm", "linear", "_linear", "embedding", "_embedding")


class Operations(TorchDispatchMode):
    """Counts torch's operations that would launch something on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        view = any(r.alias_info is not None and not r.alias_info.is_write
                   for r in func._schema.returns)  # fmt: skip
        works = not name.startswith((*ALLOCATIONS, *PRODUCTS)) and not view
        if works and not self.paused:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class CountingGPU(EmulatedGPU):
    """Whose own use of torch is not counted, nor what a paused module launches."""

    def __init__(self, operations: Operations) -> None:
        super().__init__("sm80")
        self.operations = operations

    def launch(self, *args: Any) -> None:
        before, self.operations.paused = self.operations.paused, True
        super().launch(*args)
        self.operations.paused = before
        if before:
            self.launches.pop()


class Paused(nn.Module):
    """A module whose operations are not counted."""

    def __init__(self, module: nn.Module, operations: Operations) -> None:
        super().__init__()
        self.module, self.operations = module, operations

    def forward(self, *args: Any) -> Any:
        self.operations.paused = True
        try:
            return self.module(*args)
        finally:
            self.operations.paused = False


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    before = os.environ.get("DSV4_KERNELS")
    os.environ["DSV4_KERNELS"] = choice
    dispatch.choose_again()
    try:
        yield
    finally:
        del os.environ["DSV4_KERNELS"]
        if before is not None:
            os.environ["DSV4_KERNELS"] = before
        dispatch.choose_again()


def decode(ratios: list[int], directory: Path) -> tuple[Counter[str], Counter[str]]:
    """Launches by kernel, and operations by name, of one decoded token of a tiny model."""
    overrides = {"vocab_size": 64, "compress_ratios": ratios, "num_hidden_layers": len(ratios)}
    make_checkpoint(directory, "tiny", overrides=overrides, tokenizer=False)
    model = load(directory, dtype="bfloat16").model
    layout = CacheLayout.of(model.config, "fp8")
    caches, strides = allocate(ratios, layout, 64, 8, 1, False)
    tables = BlockTables(
        torch.arange(64).view(1, -1).int(), torch.arange(8).view(1, -1).int(),
        torch.zeros(1).int(), *strides,
    )  # fmt: skip
    operations = Operations()
    for layer in model.layers.values():
        layer.ffn.experts = Paused(layer.ffn.experts, operations)
    for kernel in arrival.KERNELS:  # made once, before any step
        arrival.counters(kernel, torch.device("cpu"), 0)
    with kernels("triton"), CountingGPU(operations) as gpu, torch.inference_mode():
        builder = StepBuilder(model.config, layout, 1, "cpu")
        start, lengths = torch.tensor([0, 1]).int(), torch.tensor([1]).int()
        with operations:
            step = builder.build(tables, start, lengths, 1, 1, 2048)
            model(torch.zeros(1, dtype=torch.int64), step, caches)
    return Counter(md.name for _, md, _ in gpu.launches), operations.found


def per_kind() -> dict[str, tuple[Counter[str], Counter[str]]]:
    """By layer kind, and for the rest of a step: launches by kernel, operations by name."""
    with tempfile.TemporaryDirectory() as directory:
        base = [SWA, CSA, HCA]
        kernels_of, operations_of = decode(base, Path(directory) / "base")
        found = {}
        for name, ratio in KINDS.items():
            more_kernels, more_operations = decode([*base, ratio], Path(directory) / name)
            found[name] = (more_kernels - kernels_of, more_operations - operations_of)
    rest_kernels, rest_operations = Counter(kernels_of), Counter(operations_of)
    for launched, operations in found.values():
        rest_kernels -= launched
        rest_operations -= operations
    return found | {"the rest of a step": (rest_kernels, rest_operations)}


def main() -> None:
    for name, (launched, operations) in per_kind().items():
        print(name, launched.total(), dict(launched), operations.total(), dict(operations))


if __name__ == "__main__":
    main()
