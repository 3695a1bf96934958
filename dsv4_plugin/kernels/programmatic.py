"""Programmatic dependent launch: programs of a launch get on the chip while those before still run.

What is launched is a `kernel` and calls `follow` before it touches memory: the next launch may
come, as soon as all programs of this one are there; then it waits until the launch before has
ended, and what that stored can be read. Every program of every launch waits, so that whoever is
past `follow` has all earlier launches behind it, not just the last: nobody reads any more what it
overwrites. Launches that know nothing of this (torch's, an engine's) wait as ever until the one
before has ended; one of these kernels behind them comes when their programs end, and waits for
their stores. CUDA graphs keep such launches as they are, from CUDA 12.3 on.

Only weights are asked for earlier, by `prefetch`: no launch of a step writes them, so they can come
to L2 while other launches still run. A program asks for what it will read itself; where several
tiles of rows read the same, the first does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait, num_threads
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
    """`triton.jit`, with its options, for what is launched and calls `follow`."""
    if triton.knobs.runtime.interpret:
        jitted: Callable[[Callable[..., Any]], Any] = triton.jit(**options)
        return jitted
    return lambda f: Kernel(f, **options)


def _builtin(f: Callable[..., Any]) -> Callable[..., Any]:
    f.__triton_builtin__ = True  # type: ignore[attr-defined]  # by which Triton knows its own
    return f


@_builtin
def is_programmatic(_semantic: Any = None) -> bool:
    """Not where the launch is of the ordinary kind, nor interpreted."""
    return _semantic is not None and getattr(_semantic.builder.options, "launch_pdl", False)


@_builtin
def follow(_semantic: Any = None) -> None:
    """Nothing, where the launch is not programmatic."""
    if is_programmatic(_semantic=_semantic):
        gdc_launch_dependents(_semantic=_semantic)
        gdc_wait(_semantic=_semantic)


@triton.jit
def prefetch(first, rows, stride, width, MOST: tl.constexpr):
    """Rows of a weight come to L2 while the program still waits. For before `follow`; nothing where
    the launch is not programmatic.

    first: pointer to the first row; rows: how many, none if negative, at most MOST, a power of two;
    stride: values from one to the next; width: values of each, less than 1 MiB. Of a row those 16
    bytes at a time are asked for that lie wholly in it: nothing that is not the weight's. (No value
    comes from here, and L2 is where every SM's stores go: what had been written after all would be
    read as it is.)
    """
    if is_programmatic():
        # One thread asks for a row, the threads that do so evenly among the warps.
        SHARE: tl.constexpr = max(1, num_threads() // MOST)
        i = tl.arange(0, MOST * SHARE)
        row = (i // SHARE).to(tl.int64)
        BYTES: tl.constexpr = first.dtype.element_ty.primitive_bitwidth // 8
        begin = first.to(tl.int64) + row * stride * BYTES
        end = (begin + width * BYTES) & -16
        begin = (begin + 15) & -16
        size = tl.where((i % SHARE == 0) & (row < rows), end - begin, 0).to(tl.int32)
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred some;
            setp.gt.s32 some, $2, 0;
            @some cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.b32 $0, $2;
            }
            """,
            "=r,l,r", [begin, size], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
