"""Whole steps of real layers on a GPU: right, and how long they take.

Weights are random codes made on the device, caches are filled by a prompt whose pages are then
copied to all pages. A step repeated on the same caches is another step, since pooling sums go on in
place: they are put back before each that is compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from dsv4_plugin.batch import allocate
from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.checkpoint.files import DTYPES
from dsv4_plugin.checkpoint.load import load_weights
from dsv4_plugin.checkpoint.names import EXPERT, Stored, stored_tensors
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.kernels.step import StepBuilder
from dsv4_plugin.model.parallel import LocalParallel
from dsv4_plugin.model.transformer import Transformer
from dsv4_plugin.tools.formats import format_fields
from dsv4_plugin.tools.make import preset_fields

FLASH = [0, 0] + [4, 128] * 20 + [4]
"""The kinds of Flash's layers."""
CHUNK = 2048
"""Tokens of the prompt that fills caches, at most."""


@dataclass(frozen=True)
class Stack:
    """Layers of a preset's width, with so many experts each, and the decode steps to check:
    requests, and tokens that each has. vocab_size: None, the preset's."""

    preset: str
    ratios: list[int]
    experts: int
    fmt: str
    steps: list[tuple[int, int]]
    vocab_size: int | None = None


CHECKED = Stack("slice", [0, 4, 128], 16, "fp8-fp4", [(1, 700), (4, 3000)])
QUICK = Stack("slice", [0, 4, 128], 8, "fp8-fp4", [(2, 700)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    of = "of --model"
    parser.add_argument("--layers", type=int, default=10, help=f"{of} (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=256, help=f"of a layer {of}")
    parser.add_argument("--format", default="fp8-fp4", help=f"{of} (default: %(default)s)")
    parser.add_argument("--kv-dtype", default="fp8", choices=("fp8", "bfloat16"), help=of)
    parser.add_argument(
        "--decode", default="1x4096,1x65536,1x1048576,16x8192,64x8192,256x2048",
        help=f"steps {of}: requests x tokens that each has",
    )  # fmt: skip
    parser.add_argument(
        "--prefill", default="4096+0,4096+61440", help=f"chunks {of}: new tokens + earlier ones"
    )


def check(device: torch.device, stack: Stack) -> list[dict[str, Any]]:
    """Each step as it is and as a graph: hidden states and caches have to be equal."""
    from dsv4_plugin.tools.cli.gpu_check import row

    @torch.inference_mode()
    def one(model: Transformer, layout: CacheLayout, n: int, length: int) -> dict[str, Any]:
        requests = Requests.of(model, layout, n, length, device)
        saved = requests.save()
        graph, out = captured(requests.decode, device)
        saved.restore()
        expected, after = requests.decode().clone(), requests.save()
        if not expected.isfinite().all():
            return {"error": "hidden states are not finite"}
        saved.restore()
        graph.replay()
        same = torch.equal(out, expected)
        if not same:
            return {"error": "a graph's hidden states are not the step's"}
        return {"error": "" if after.equal() else "a graph's caches are not the step's"}

    made: list[tuple[Transformer, CacheLayout]] = []
    rows = [row("check", "a stack of layers", lambda: made.append(network(stack, device)) or {})]  # type: ignore[func-returns-value]
    if rows[0]["error"]:
        return rows
    model, layout = made[0]
    return rows + [
        row("check", f"layers {stack.ratios} as step and graph, decode of {n} at {length:,}",
            lambda n=n, length=length: one(model, layout, n, length))  # type: ignore[misc]
        for n, length in stack.steps
    ]  # fmt: skip


def times(device: torch.device, copy_rate: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Steps of the asked sizes: as they are, as graphs, and what reading their weights takes."""
    from dsv4_plugin.tools.cli.gpu_check import median_seconds, row

    ratios = (FLASH * 2)[: args.layers]
    stack = Stack("slice", ratios, args.experts, args.format, [])
    model, layout = network(stack, device, args.kv_dtype)
    share = len(FLASH) / len(ratios)

    def figures(requests: Requests, seconds: float, rows: int) -> dict[str, Any]:
        floor = weight_bytes(model.config, rows) / copy_rate
        shape = requests.count, model.config.hidden_size
        hidden = torch.zeros(shape, dtype=torch.bfloat16, device=device)
        head = median_seconds(lambda: model.head(hidden))
        found = {"seconds": seconds, "floor_seconds": floor, "share": floor / seconds}
        return found | {"tokens_per_second": rows / (share * seconds + head)}

    @torch.inference_mode()
    def decode(n: int, length: int) -> dict[str, Any]:
        requests = Requests.of(model, layout, n, length, device)
        eager = median_seconds(requests.decode)
        graph, _ = captured(requests.decode, device)
        return {"eager_seconds": eager} | figures(requests, median_seconds(graph.replay), n)

    @torch.inference_mode()
    def prefill(new: int, old: int) -> dict[str, Any]:
        requests = Requests.of(model, layout, 1, new + old, device)
        return figures(requests, median_seconds(lambda: requests.prompt(new)), new)

    what = f"{len(ratios)} layers"
    sizes = [c for c in args.decode.split(",") if c]
    found = [
        row("step", f"{what}, decode of {case}",
            lambda case=case: decode(*map(int, case.split("x"))))  # type: ignore[misc]
        for case in sizes
    ]  # fmt: skip
    return found + [
        row("step", f"{what}, prefill of {case}",
            lambda case=case: prefill(*map(int, case.split("+"))))  # type: ignore[misc]
        for case in args.prefill.split(",") if case
    ]  # fmt: skip


def network(
    stack: Stack, device: torch.device, kv_dtype: str = "fp8"
) -> tuple[Transformer, CacheLayout]:
    """The stack with random weights, and the layout of its caches."""
    hf = preset_fields(stack.preset)
    hf |= {"num_hidden_layers": len(stack.ratios), "compress_ratios": stack.ratios}
    hf |= {"n_routed_experts": stack.experts, "num_hash_layers": min(3, len(stack.ratios))}
    hf |= {"vocab_size": stack.vocab_size or hf["vocab_size"]}
    config = ModelConfig.from_hf(hf | format_fields(stack.fmt, hf))
    with torch.device(device):
        model = Transformer(config, LocalParallel(config, torch.bfloat16))
    load_weights(model, random_tensors(config, device))
    return model, CacheLayout.of(config, kv_dtype)


def random_tensors(config: ModelConfig, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint, of a size that keeps activations near 1."""
    generator = torch.Generator(device).manual_seed(0)
    for name, stored in stored_tensors(config).items():
        yield name, _random(config, name, stored, generator, device)


def _random(
    config: ModelConfig, name: str, stored: Stored, generator: torch.Generator, device: torch.device
) -> Tensor:
    kind, shape = stored.dtypes[0], stored.shape
    leaf = name.rsplit(".", 1)[-1]

    def codes(low: int, high: int) -> Tensor:
        return torch.randint(
            low, high, shape, generator=generator, device=device, dtype=torch.uint8
        )

    if leaf == "tid2eid":
        scores = torch.rand(shape[0], config.n_routed_experts, generator=generator, device=device)
        return scores.topk(shape[1]).indices
    if kind in ("I8", "U8"):
        return codes(0, 256)
    if kind == "F8_E8M0":  # a power of two over a row's or a block's length
        return codes(119, 121) if EXPERT.fullmatch(name) else codes(120, 122)
    if leaf == "weight_scale":
        return codes(0x60, 0x70)
    if leaf == "weight_scale_2":
        return torch.tensor(1 / (64 * 64 * 2.9), device=device)
    if leaf == "input_scale":
        return torch.ones((), device=device)
    x = torch.randn(shape, generator=generator, device=device)
    if kind == "F8_E4M3":
        return x.to(torch.float8_e4m3fn)
    if "norm." in name or leaf.endswith("_scale"):
        x = 1 + 0.1 * x
    elif leaf.endswith("_base") or leaf in ("ape", "attn_sink", "bias"):
        x = 0.5 * x
    elif len(shape) > 1 and name != "embed.weight":
        x = x * shape[-1] ** -0.5
    return x if kind == "F32" else x.to(torch.bfloat16)


def weight_bytes(config: ModelConfig, rows: int) -> int:
    """Least bytes of the layers' weights that a step of so many rows reads: of the experts those
    that the rows choose, at most."""
    total, chosen = 0, min(config.n_routed_experts, rows * config.num_experts_per_tok)
    for name, stored in stored_tensors(config).items():
        if name.startswith(("embed.", "head.")) or name.endswith("tid2eid"):
            continue
        n = DTYPES[stored.dtypes[0]].itemsize * prod(stored.shape)
        total += n * chosen // config.n_routed_experts if EXPERT.fullmatch(name) else n
    return total


@dataclass(frozen=True)
class Requests:
    """`count` requests of `length` tokens each, with pages of their own."""

    model: Transformer
    caches: list[Any]
    tables: BlockTables
    steps: StepBuilder
    ids: Tensor
    count: int
    length: int

    @classmethod
    def of(
        cls, model: Transformer, layout: CacheLayout, count: int, length: int,
        device: torch.device, filled: bool = True,
    ) -> Requests:  # fmt: skip
        """filled: caches hold a prompt, many times over."""
        pages = -(-length // layout.page_size)
        reach = model.config.sliding_window + min(length, 2 * CHUNK)
        turns = -(-reach // layout.window_block) + 1
        blocks = torch.arange(-(-length // layout.window_block), device=device)
        n = count
        caches, strides = allocate(model.ratios, layout, n * turns, n * pages, n, False, device)
        request = torch.arange(n, dtype=torch.int32, device=device)[:, None]
        tables = BlockTables(
            (request * turns + blocks % turns).int(),
            (request * pages + torch.arange(pages, device=device)).int(), request[:, 0], *strides,
        )  # fmt: skip
        rows = max(count, min(length, 2 * CHUNK))
        generator = torch.Generator(device).manual_seed(0)
        ids = torch.randint(
            0, model.config.vocab_size, (rows,), generator=generator, device=device,
            dtype=torch.int32,
        )  # fmt: skip
        steps = StepBuilder(model.config, layout, rows, device)
        found = cls(model, caches, tables, steps, ids, count, length)
        if filled:
            found._fill(min(CHUNK, length - 1), layout.page_size)
        return found

    def _fill(self, tokens: int, page_size: int) -> None:
        """A prompt of the first request; its pages are then everyone's."""
        self._run(1, tokens, tokens)
        whole = max(1, tokens // page_size)
        for cache in self.caches[:]:
            if cache.kv is None:
                continue
            words = _memory(cache.kv.storage).view(-1, self.tables.page_stride)
            for first in range(whole, len(words), whole):
                words[first : first + whole] = words[: len(words[first : first + whole])]
            return  # all layers lie in these pages

    def _run(self, count: int, tokens: int, length: int) -> Tensor:
        t, device = self.tables, self.ids.device
        tables = BlockTables(
            t.window[:count], t.page[:count], t.ring[:count],
            t.window_stride, t.page_stride, t.ring_stride,
        )  # fmt: skip
        start = torch.arange(count + 1, dtype=torch.int32, device=device) * tokens
        lengths = torch.full((count,), length, dtype=torch.int32, device=device)
        rows = count * tokens
        step = self.steps.build(tables, start, lengths, rows, tokens, length)
        hidden: Tensor = self.model(self.ids[:rows], step, self.caches)
        return hidden

    def decode(self) -> Tensor:
        """The last token of every request: hidden states [count, D]."""
        return self._run(self.count, 1, self.length)

    def prompt(self, tokens: int) -> Tensor:
        """The last tokens of the first request."""
        return self._run(1, tokens, self.length)

    def save(self) -> Saved:
        return Saved.of(self.caches)


@dataclass(frozen=True)
class Saved:
    """What caches held, to be put back or compared."""

    now: list[Tensor]
    then: list[Tensor]

    @classmethod
    def of(cls, caches: list[Any]) -> Saved:
        found = {}
        for cache in caches:
            for pool in (cache.window, cache.kv, cache.sums):
                if pool is not None:
                    memory = _memory(pool.storage)
                    found[memory.data_ptr()] = memory
        now = list(found.values())
        return cls(now, [t.clone() for t in now])

    def restore(self) -> None:
        for now, then in zip(self.now, self.then, strict=True):
            now.copy_(then)

    def equal(self) -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.now, self.then, strict=True))


def _memory(storage: Tensor) -> Tensor:
    """All of the buffer that a layer's part lies in, as int32 words."""
    whole = storage.untyped_storage()
    return torch.empty(0, dtype=torch.int32, device=storage.device).set_(whole)


def captured(run: Callable[[], Any], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `run`, and what it returned: the memory that a replay fills."""
    graph = torch.cuda.CUDAGraph()
    on_card = device.type == "cuda"
    side = torch.cuda.Stream(device) if on_card else None
    if on_card:
        torch.cuda.synchronize(device)
    with torch.cuda.stream(side) if on_card else nullcontext():
        run()  # compiles and loads whatever it needs
        if on_card:
            torch.cuda.synchronize(device)
        graph.capture_begin()
        out = run()
        graph.capture_end()
    return graph, out
