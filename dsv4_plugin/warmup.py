"""Compile every kernel that serving will need, before it serves.

Kernels differ by what their launches are made for: few or many rows, decoding or prompts, and how
long requests may be. A warm-up runs one step of padding for each: all launches, no row's work.
First only to see which kernels are needed, which then compile side by side; then to load them.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv4_plugin.batch import allocate
from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.cache.step import Step
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.kernels.dispatch import use_triton
from dsv4_plugin.kernels.step import StepBuilder
from dsv4_plugin.model.block import Block
from dsv4_plugin.model.mtp import MTP
from dsv4_plugin.model.transformer import Network, Transformer

log = logging.getLogger("dsv4_plugin")

OFTEN = 5.0
"""Seconds between two lines about progress."""


Shape = tuple[int, int, int]
"""Of a step: rows, most rows of a request, most tokens of a request."""


def shapes(
    config: ModelConfig, rows: int, requests: int, longest: int, drafts: int = 0
) -> list[Shape]:
    """Of the steps to run: decoding alone and in company, with and without drafts, short
    prompts and long ones, at every length that changes a launch."""
    from dsv4_plugin.kernels.attention import kernel as attention
    from dsv4_plugin.kernels.experts import kernel as experts
    from dsv4_plugin.kernels.index.topk import BLOCKS
    from dsv4_plugin.kernels.launch import pick
    from dsv4_plugin.kernels.packed.fp8 import LINEARS
    from dsv4_plugin.kernels.streams import kernel as streams

    few = (1, 256)  # no compressed rows; some, but not more than are chosen
    scores = *BLOCKS, BLOCKS[-1] + 1
    lengths = sorted({min(n, longest) for n in (*few, *(4 * b for b in scores))} | {longest})
    looked, short = 1 + drafts, min(rows, pick(LINEARS).line)
    # As few as go by attention's next way, and of one token each: keys are not unpacked.
    ways = [min(rows, int(w.below)) for w in pick(attention.LAUNCHES).fp8[:-1]]
    batches = sorted({
        (1, 1), (requests, 1), *((n, 1) for n in ways), (short, short), (rows, rows),
        *((min(n * looked, rows), min(looked, rows)) for n in (1, requests)),
    })  # fmt: skip
    # The first batches whose pairs of tokens and experts are not split, and which mHC does not take
    # as few.
    split = 1 + pick(experts.LAUNCHES).split // config.num_experts_per_tok
    more = sorted({split, 1 + pick(streams.LAUNCHES).few})
    companies = [(n, 1, lengths[0]) for n in more if n < rows]
    return companies + [(n, query, length) for length in lengths for n, query in batches]


def warm_up(
    padding: Callable[[Shape], None],
    device: torch.device,
    needed: Sequence[Shape],
    share: tuple[int, int] = (0, 1),
) -> Counter[str]:
    """Compile for the `needed` steps.

    padding: runs such a step in which no row is a request's (`Padding`, of the network). share:
    this process among those of the machine that compile the same, and their number. Returns how
    many variants of each kernel there are now, and logs it, and how many of them Triton's cache did
    not have; does nothing where kernels are torch's.
    """
    if not use_triton(device):
        return Counter()
    start = time.perf_counter()

    def run() -> None:
        for shape in needed:
            padding(shape)

    with compiled() as found, unknown() as new, torch.inference_mode():
        _compile_together(run, share)
        run()
    log.info(
        "Warm-up: %d kernels in %.1f s (%s), of which %d were compiled and the others found in %s.",
        found.total(),
        time.perf_counter() - start,
        ", ".join(f"{name} {n}" for name, n in sorted(found.items())) or "all known",
        len(new),
        _cache(),
    )
    return found


def _cache() -> str:
    import triton

    return str(triton.knobs.cache.dir)


@dataclass(frozen=True)
class Padding:
    """Steps of padding. caches, tables: laid out as those of serving, because strides and
    alignments are compiled in; nothing in them is read or written."""

    model: Transformer
    steps: StepBuilder
    caches: Sequence[LayerCache]
    tables: BlockTables

    def __call__(self, shape: Shape) -> None:
        model, device = self.model, self.tables.window.device
        step = nobody(self.steps, self.tables, shape)
        ids = torch.zeros(shape[0], dtype=torch.int32, device=device)
        if model.first and model.last:
            model(ids, step, self.caches)
            return
        block = next(iter(model.layers.values()))
        assert isinstance(block, Block)
        size = (shape[0], model.config.hc_mult, model.config.hidden_size)
        h = torch.zeros(size, dtype=block.attn.dtype, device=device)
        model.run(h, ids, step, self.caches)


@dataclass(frozen=True)
class MTPPadding:
    """The same for the MTP layer, with the product that makes hidden states of its streams."""

    model: MTP
    steps: StepBuilder
    caches: Sequence[LayerCache]
    tables: BlockTables

    def __call__(self, shape: Shape) -> None:
        model, device = self.model, self.tables.window.device
        step = nobody(self.steps, self.tables, shape)
        ids = torch.zeros(shape[0], dtype=torch.int32, device=device)
        size = (shape[0], model.config.hc_mult, model.config.hidden_size)
        h = torch.zeros(size, dtype=model.block.attn.dtype, device=device)
        model.collapse(model(h, h[:, 0], ids, step, self.caches[0]))


def nobody(steps: StepBuilder, tables: BlockTables, shape: Shape, together: bool = False) -> Step:
    """A step of no request's rows."""
    ends = torch.zeros(2, dtype=torch.int32, device=tables.window.device)
    return steps.build(tables, ends, ends[:1], *shape, together=together)


def nothing(
    model: Network, layout: CacheLayout, device: torch.device
) -> tuple[list[LayerCache], BlockTables, Tensor]:
    """Caches of one block of each kind, their tables, and query_start int32 [2] of a request
    without rows: a step built of these is all padding."""
    caches, strides = allocate(model.ratios, layout, 1, 1, 1, False, device)
    ends = torch.zeros(2, dtype=torch.int32, device=device)
    return caches, BlockTables.of_nothing(strides, device), ends


@contextmanager
def compiled() -> Iterator[Counter[str]]:
    """What Triton compiles or finds in its cache inside: variants by kernel."""
    import triton

    found: Counter[str] = Counter()
    before = triton.knobs.runtime.jit_post_compile_hook

    def note(*, fn: Any, **_: Any) -> None:
        found[fn.name.rsplit(".", 1)[-1]] += 1

    triton.knobs.runtime.jit_post_compile_hook = note
    try:
        yield found
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before


@contextmanager
def unknown() -> Iterator[list[str]]:
    """Kernels that Triton compiles inside because its cache does not have them, one name for each
    variant."""
    import triton

    found: list[str] = []
    before = triton.knobs.compilation.listener

    def note(*, src: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            found.append(src.name)
        if before is not None:
            before(src=src, cache_hit=cache_hit, **rest)

    triton.knobs.compilation.listener = note
    try:
        yield found
    finally:
        triton.knobs.compilation.listener = before


def _compile_together(run: Callable[[], None], share: tuple[int, int]) -> None:
    """Compile what `run` would launch, in all threads of this process's share of the cores: most of
    it is MLIR's, LLVM's and ptxas's work, which holds no lock of Python's. Nothing is launched, and
    what torch computes in between is from memory that nobody wrote."""
    import triton

    if not hasattr(triton, "AsyncCompileMode"):  # before Triton 3.5
        return
    rank, ranks = share
    work = _Queue()
    with triton.AsyncCompileMode(work):
        try:
            with _not_launching():
                run()
        finally:
            work.start(max(1, len(os.sched_getaffinity(0)) // ranks), rank / ranks)


@contextmanager
def _not_launching() -> Iterator[None]:
    """Launches of kernels inside only compile them."""
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def only_compile(self: JITFunction[Any], *args: Any, warmup: bool, **kwargs: Any) -> Any:
        return launch(self, *args, warmup=True, **kwargs)

    JITFunction.run = only_compile
    try:
        yield
    finally:
        JITFunction.run = launch


class _Queue(Executor):
    """Keeps work until it is all known; then says how far it is."""

    def __init__(self) -> None:
        self.work: list[tuple[Future[Any], Callable[[], Any]]] = []
        self.done, self.said = 0, time.perf_counter()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.work.append((future, functools.partial(fn, *args, **kwargs)))
        return future

    def start(self, threads: int, begin: float) -> None:
        """Do it, from that part of the list on and then what is before it: processes that compile
        the same begin at different places, and find what the others have put in Triton's cache."""
        if not self.work:
            return
        log.info("Warm-up: %d kernels to compile in %d threads.", len(self.work), threads)
        first = int(begin * len(self.work))
        with ThreadPoolExecutor(threads) as pool:
            for future, run in self.work[first:] + self.work[:first]:
                pool.submit(self._do, future, run)

    def _do(self, future: Future[Any], run: Callable[[], Any]) -> None:
        try:
            future.set_result(run())
        except Exception as error:  # noqa: BLE001  (whoever waits for it gets it)
            future.set_exception(error)
        self.done += 1
        if time.perf_counter() - self.said > OFTEN:
            self.said = time.perf_counter()
            log.info("Warm-up: %d of %d kernels compiled.", self.done, len(self.work))
