"""Launch parameters as data: what a kernel is launched with on each family of chips.

Picked by architecture alone (and by the shape, where a table is keyed by it): nothing is tuned at
run time, and a result never depends on which machine tuned last. Needs Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TypeVar

import torch
import triton
from triton.runtime.driver import driver

T = TypeVar("T")

FAMILY = {
    "sm80": "a100",
    "sm86": "consumer",
    "sm87": "consumer",
    "sm89": "consumer",
    "sm90": "hopper",
    "sm100": "blackwell",
    "sm103": "blackwell",
    "sm120": "consumer",
    "sm121": "consumer",
    "gfx942": "cdna",
    "gfx950": "cdna",
}
"""Chips that share launch parameters. consumer: 99 KiB of shared memory per block, mma.sync."""


def architecture() -> str:
    """'sm80', ..., 'gfx942', ... of the device Triton would launch on; interpreted: 'sm80'."""
    if triton.knobs.runtime.interpret:
        return "sm80"
    return _architecture(driver.active.get_current_device())


@cache
def _architecture(device: object) -> str:
    target = driver.active.get_current_target()
    return f"sm{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


def require(*tensors: torch.Tensor | None) -> None:
    """A kernel's contract: that it counts on these being contiguous."""
    for tensor in tensors:
        assert tensor is None or tensor.is_contiguous(), (tensor.shape, tensor.stride())


def pick(table: Mapping[str, T]) -> T:
    """The table's entry for this architecture, or else for its family, or for 'any'."""
    name = architecture()
    known = (name, FAMILY.get(name, "any"), "any")
    return table[next(key for key in known if key in table)]
