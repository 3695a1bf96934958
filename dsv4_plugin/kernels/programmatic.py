"""Programmatic dependent launch: programs of a launch get on the chip while those before still run.

What is launched is a `kernel` and calls `follow` before all else: the next launch may come, as soon
as all programs of this one are there; then it waits until the launch before has ended, and what
that stored can be read. Every program of every launch waits, so that whoever is past `follow` has
all earlier launches behind it, not just the last: nobody reads any more what it overwrites.
Launches that know nothing of this (torch's, an engine's) wait as ever until the one before has
ended; one of these kernels behind them comes when their programs end, and waits for their stores.
CUDA graphs keep such launches as they are, from CUDA 12.3 on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.jit import JITFunction

from dsv4_plugin.kernels.launch import pick

PROGRAMMATIC = {
    # guessed: what it would save between the launches of a decode step has not been measured.
    # Chips before sm_90 and AMD's have no such launches.
    "hopper": False,
    "blackwell": False,
    "sm120": False,
    "sm121": False,
    "any": False,
}


class Kernel(JITFunction[Any]):  # type: ignore[misc]  # Triton ships no types
    """What `triton.jit` makes, launched as the table says."""

    def run(self, *args: Any, **options: Any) -> Any:
        if pick(PROGRAMMATIC):
            options["launch_pdl"] = True
        return super().run(*args, **options)


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit`, with its options, for what is launched and calls `follow` first."""
    if triton.knobs.runtime.interpret:
        jitted: Callable[[Callable[..., Any]], Any] = triton.jit(**options)
        return jitted
    return lambda f: Kernel(f, **options)


def follow(_semantic: Any = None) -> None:
    """Nothing, where the launch is of the ordinary kind, and interpreted."""
    if _semantic is not None and getattr(_semantic.builder.options, "launch_pdl", False):
        gdc_launch_dependents(_semantic=_semantic)
        gdc_wait(_semantic=_semantic)


follow.__triton_builtin__ = True  # type: ignore[attr-defined]  # by which Triton knows its own
