"""Every kernel's launch on inputs of a given size: the one list that `dsv4 gpu-check`, the budgets
of compiled code and the kernels' report take theirs from.

On the device `meta` inputs have shapes and no values: launches can be compiled, not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy
import torch
from torch import Tensor

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.layout import BlockLayout, CacheLayout
from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.cache.rows import RowFormat, RowPool
from dsv4_plugin.cache.step import Step
from dsv4_plugin.config import CSA, FP8_BLOCK, HCA, SWA, ModelConfig
from dsv4_plugin.kernels.compress import of_cache
from dsv4_plugin.kernels.packed import (
    Both,
    FP4Matrix,
    FP8Matrix,
    Inputs,
    Int4Matrix,
    Matrix,
    NVFP4Matrix,
    Rounded,
    plain,
)
from dsv4_plugin.kernels.step import Rows
from dsv4_plugin.kernels.streams import Mixer, Spread

Outputs = list[Tensor]


def flash(ratios: Sequence[int]) -> ModelConfig:
    """Flash with layers of these kinds."""
    return ModelConfig(
        vocab_size=129280, hidden_size=4096, num_hidden_layers=len(ratios), num_attention_heads=64,
        head_dim=512, qk_rope_head_dim=64, q_lora_rank=1024, o_groups=8, o_lora_rank=1024,
        sliding_window=128, compress_ratios=tuple(ratios), index_n_heads=64, index_head_dim=128,
        index_topk=512, n_routed_experts=256, num_experts_per_tok=6, moe_intermediate_size=2048,
        num_hash_layers=0, routed_scaling_factor=1.5, max_position_embeddings=1 << 20, yarn=None,
    )  # fmt: skip


FLASH = flash([SWA, CSA, HCA])
PRO = replace(
    FLASH, hidden_size=7168, num_attention_heads=128, q_lora_rank=1536, o_groups=16,
    index_topk=1024, n_routed_experts=384, moe_intermediate_size=3072, routed_scaling_factor=2.5,
)  # fmt: skip
"""A layer of each kind as Flash and Pro have them."""


@dataclass(frozen=True)
class Work:
    """launch and expect return the same outputs, of the kernel and of plain torch; words of a cache
    (int32) have to be equal, others close. nbytes: the least that has to be moved. again: the
    launches alone, on the same memory every time, where `launch` copies a cache before."""

    launch: Callable[[], Outputs]
    expect: Callable[[], Outputs]
    nbytes: int
    again: Callable[[], object] | None = None


@dataclass(frozen=True)
class World:
    """One layer of each kind with its caches, `requests` requests of `length` tokens each, which
    bring `tokens` tokens each in this step.

    experts: how many of a layer's are there. layers: so many parts of blocks lie side by side, of
    which these are the first. written: caches have random rows; else zeros that take no memory
    until they are read.
    """

    device: torch.device
    config: ModelConfig
    layout: CacheLayout
    requests: int
    tokens: int
    length: int
    experts: int
    layers: int = 1
    written: bool = True

    @classmethod
    def of(
        cls,
        device: torch.device,
        requests: int,
        tokens: int,
        length: int,
        kv_dtype: str = "fp8",
        index_dtype: str = "auto",
        config: ModelConfig = FLASH,
        experts: int | None = None,
        layers: int = 1,
        written: bool = True,
    ) -> World:
        layout = CacheLayout.of(config, kv_dtype, index_dtype=index_dtype)
        experts = experts or config.n_routed_experts
        return cls(device, config, layout, requests, tokens, length, experts, layers, written)

    @property
    def rows(self) -> int:
        return self.requests * self.tokens

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        if self.device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=self.device)
        generator = torch.Generator(self.device).manual_seed(len(shape) + sum(shape))
        return torch.randn(shape, device=self.device, generator=generator).to(dtype)

    def bytes(self, low: int, high: int, *shape: int) -> Tensor:
        """uint8 from low to high - 1."""
        if self.device.type == "meta":
            return torch.empty(shape, dtype=torch.uint8, device=self.device)
        generator = torch.Generator(self.device).manual_seed(sum(shape))
        return torch.randint(
            low, high, shape, device=self.device, generator=generator, dtype=torch.uint8
        )

    def packed(self, kind: str, *shape: int) -> Matrix:
        """Random codes of weights [..., out, in]."""
        *e, n_out, n_in = shape
        if kind == "fp8":
            codes = self.bytes(0, 256, *shape)
            codes.masked_fill_(codes & 0x7F == 0x7F, 0)  # NaN
            scale = self.random(*e, -(-n_out // 128), -(-n_in // 128)).abs() * 2.0**-12
            return FP8Matrix(codes, scale)
        data = self.bytes(0, 256, *e, n_out, n_in // 2)
        if kind == "fp4":
            return FP4Matrix(data, self.bytes(116, 122, *e, n_out, n_in // 32))
        scale, top = self.bytes(0, 0x7F, *e, n_out, n_in // 16), self.random(*e).abs() * 2.0**-12
        return NVFP4Matrix(data, scale, top)

    def routed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of the experts, the choices of each row and their weights."""
        c = self.config
        ids = self.random(self.rows, self.experts).topk(c.num_experts_per_tok).indices
        x = self.random(self.rows, c.hidden_size, dtype=torch.bfloat16)
        return x, ids, self.random(self.rows, c.num_experts_per_tok).sigmoid()

    def blocks(self, tokens: int) -> Tensor:
        """Block numbers int32 [B, n], the last block first."""
        n = -(-self.length // tokens)
        total = self.requests * n
        order = torch.arange(total - 1, -1, -1, dtype=torch.int32, device=self.device)
        return order.view(self.requests, n)

    def tables(self, ratio: int) -> BlockTables:
        page = self.layout.page[ratio].words if ratio else 0
        ring = self.layout.ring[ratio].words if ratio else 0
        numbers = torch.arange(self.requests, dtype=torch.int32, device=self.device)
        window = self.blocks(self.layout.window_block)
        pages = self.blocks(self.layout.page_size)
        words = (n * self.layers for n in (self.layout.window.words, page, ring))
        return BlockTables(window, pages, numbers, *words)

    def start(self) -> Tensor:
        return torch.arange(self.requests + 1, dtype=torch.int32, device=self.device) * self.tokens

    def lengths(self) -> Tensor:
        return torch.full((self.requests,), self.length, dtype=torch.int32, device=self.device)

    def places(self) -> Rows:
        int32 = partial(torch.empty, dtype=torch.int32, device=self.device)
        address = torch.empty(self.rows, dtype=torch.int64, device=self.device)
        return Rows(int32(self.rows), int32(self.rows), address, int32(4, self.rows))

    def grains(self) -> Tensor:
        return torch.tensor((1, 1, 4, 128), dtype=torch.int32, device=self.device)

    def step(self, ratio: int) -> Step:
        from dsv4_plugin.kernels.step.reference import place

        rows, tables = self.places(), self.tables(ratio)
        words, block = self.layout.window.parts["kv"].codec.words, self.layout.window_block
        if self.device.type != "meta":
            place(tables, self.start(), self.lengths(), block, words, self.grains(), rows)
        angle = self.random(self.rows, self.config.qk_rope_head_dim // 2)
        cis = torch.stack([angle.cos(), angle.sin()], -1).flatten(1)
        return Step(
            self.layout, tables, self.start(), self.lengths(), rows.position, rows.request,
            rows.window_write, {SWA: cis, CSA: cis, HCA: cis}, {CSA: cis, HCA: cis},
            self.tokens, self.length,
        )  # fmt: skip

    def window(self) -> Tensor:
        return self._filled(self.layout.window, self.layout.window_block)

    def cache(self, ratio: int) -> LayerCache:
        """A layer's caches, every row written."""
        page = ring = None
        if ratio:
            page = self._filled(self.layout.page[ratio], self.layout.page_size)
            ring = self._filled(self.layout.ring[ratio], self.length)
        return LayerCache.bind(self.layout, ratio, self.window(), page, ring)

    def _filled(self, layout: BlockLayout, tokens: int) -> Tensor:
        """Blocks of `tokens` tokens, their rows random."""
        blocks, stride = self.requests * -(-self.length // tokens), layout.words * self.layers
        if not self.written:
            return torch.from_numpy(numpy.zeros(blocks * stride, numpy.int32))
        storage = torch.zeros(blocks * stride, dtype=torch.int32, device=self.device)
        if self.device.type == "meta":
            return storage
        first = torch.arange(blocks, device=self.device)[:, None] * stride
        for part in layout.parts.values():
            inside = torch.arange(part.rows, device=self.device) * part.codec.words
            pool = RowPool(storage, part.codec)
            for address in (first + part.offset + inside).flatten().split(1 << 16):
                x = self.random(len(address), part.codec.width)
                # States hold sums of exponentials, which are positive.
                pool.write(address, x.abs() + 0.1 if part.codec.format == RowFormat.FLOAT32 else x)
        return storage


def place(world: World) -> Work:
    from dsv4_plugin.kernels.step import kernel, reference

    words, block = world.layout.window.parts["kv"].codec.words, world.layout.window_block
    given = world.tables(SWA), world.start(), world.lengths(), block, words, world.grains()
    same = world.places()

    def run(op: Callable[..., None]) -> Outputs:
        rows = world.places()
        op(*given, rows)
        return [rows.position, rows.request, rows.window_write, rows.angles_at]

    return Work(
        lambda: run(kernel.place),
        lambda: run(reference.place),
        36 * world.rows,
        lambda: kernel.place(*given, same),
    )


def latent_norm(world: World, rounded: bool = False) -> Work:
    """rounded: not to be compared, because another last bit may be rounded to another value."""
    from dsv4_plugin.kernels.norm import kernel, reference

    op = "rounded_norm" if rounded else "rms_norm"
    n, eps = world.config.q_lora_rank, world.config.rms_norm_eps
    x, weight = world.random(world.rows, n, dtype=torch.bfloat16), world.random(n)
    return Work(
        lambda: [_values(getattr(kernel, op)(x, weight, eps))],
        lambda: [_values(getattr(reference, op)(x, weight, eps))],
        2 * x.nbytes,
    )


def queries_and_window(world: World) -> Work:
    from dsv4_plugin.kernels.qkv import kernel, reference

    s, c = world.step(SWA), world.config
    q = world.random(world.rows, c.num_attention_heads, c.head_dim, dtype=torch.bfloat16)
    kv = world.random(world.rows, c.head_dim, dtype=torch.bfloat16)
    weight, eps = world.random(c.head_dim), c.rms_norm_eps
    empty = world.window()
    codec = world.layout.window.parts["kv"].codec
    same = RowPool(empty, codec)

    def run(op: Callable[..., Tensor]) -> Outputs:
        pool = RowPool(empty.clone(), codec)
        return [op(q, kv, weight, eps, s.cis[SWA], s.window_write, pool), pool.storage]

    nbytes = 2 * q.nbytes + kv.nbytes + 4 * codec.words * world.rows
    again = partial(kernel.qkv, q, kv, weight, eps, s.cis[SWA], s.window_write, same)
    return Work(lambda: run(kernel.qkv), lambda: run(reference.qkv), nbytes, again)


def compressor(world: World, ratio: int) -> Work:
    from dsv4_plugin.kernels.compress import kernel, reference

    s, cache = world.step(ratio), world.cache(ratio)
    assert cache.kv is not None
    assert cache.sums is not None
    c = world.config
    halves, channels = (2, c.head_dim + c.index_head_dim) if ratio == CSA else (1, c.head_dim)
    y = world.random(world.rows, 2, halves, channels)
    ape = world.random(ratio, halves, channels)
    weights = world.random(c.head_dim), world.random(c.index_head_dim)
    page, ring = cache.kv.storage, cache.sums.storage

    def on(op: Callable[..., None], to: LayerCache) -> Outputs:
        assert to.kv is not None
        assert to.sums is not None
        targets, state = of_cache(to, weights)
        op(y, ape, c.rms_norm_eps, s, ratio, targets, state, torch.bfloat16)
        return [to.kv.storage, to.sums.storage]

    def run(op: Callable[..., None]) -> Outputs:
        window = cache.window.storage
        return on(op, LayerCache.bind(world.layout, ratio, window, page.clone(), ring.clone()))

    nbytes = y.nbytes + 8 * cache.sums.codec.words * world.requests
    again = partial(on, kernel.compress, cache)
    return Work(lambda: run(kernel.compress), lambda: run(reference.compress), nbytes, again)


def residual_streams(world: World, head: bool = False, rounds: bool = False) -> Work:
    """Before a sublayer; head: the last collapse; rounds: its input too, which is not compared."""
    from dsv4_plugin.kernels.streams import kernel, reference

    c, n, r = world.config, world.rows, world.config.hc_mult
    d, outputs = c.hidden_size, r if head else (2 + r) * r
    fn = world.random(outputs, r * d) * (r * d) ** -0.5
    base, weight = world.random(outputs), world.random(d)
    iters = 0 if head else c.hc_sinkhorn_iters
    mixer = Mixer(fn, base, torch.ones_like(base), weight, iters, c.hc_eps, c.rms_norm_eps, rounds)
    out = world.random(n, d, dtype=torch.bfloat16)
    h = world.random(n, r, d, dtype=torch.bfloat16)
    by = Spread(world.random(n, r).sigmoid(), world.random(n, r, r).sigmoid())

    def run(op: Callable[..., tuple[Tensor, Tensor | Both, Spread | None]]) -> Outputs:
        streams_, x, spread = op(out, h, by, mixer)
        found = [streams_, plain(x)]
        return found if spread is None else [*found, spread.post, spread.mixing]

    nbytes = 2 * h.nbytes + 2 * out.nbytes + fn.nbytes
    return Work(lambda: run(kernel.streams), lambda: run(reference.streams), nbytes)


def joined_streams(world: World) -> Work:
    """Behind a pipeline stage's last layer."""
    from dsv4_plugin.kernels.streams import kernel, reference

    n, r, d = world.rows, world.config.hc_mult, world.config.hidden_size
    out = world.random(n, d, dtype=torch.bfloat16)
    h = world.random(n, r, d, dtype=torch.bfloat16)
    by = Spread(world.random(n, r).sigmoid(), world.random(n, r, r).sigmoid())
    return Work(
        lambda: [kernel.spread(out, h, by)],
        lambda: [reference.spread(out, h, by)],
        2 * h.nbytes + out.nbytes,
    )


def router(world: World, hashed: bool = False) -> Work:
    from dsv4_plugin.kernels.gate import kernel, reference

    c, n = world.config, world.config.n_routed_experts
    logits = 3 * world.random(world.rows, n)
    zeros = partial(torch.zeros, dtype=torch.int64, device=world.device)
    ids = zeros(world.rows)
    table = zeros(c.vocab_size, c.num_experts_per_tok) if hashed else None
    bias = None if hashed else world.random(n)
    args = (logits, c.num_experts_per_tok, c.routed_scaling_factor, bias, table, ids, ids.int())
    return Work(
        lambda: list(kernel.gate(*args)), lambda: list(reference.gate(*args)), logits.nbytes
    )


def float32_linear(world: World, outputs: int) -> Work:
    """The router's product, or the compressors'."""
    from dsv4_plugin.kernels.linear import kernel, reference

    x = world.random(world.rows, world.config.hidden_size, dtype=torch.bfloat16)
    parts = world.random(kernel.PARTS, outputs, x.shape[1], dtype=torch.bfloat16)
    for part, size in zip(parts, (2.0**-16, 2.0**-8, 1.0), strict=True):
        part.mul_(size)
    weight = parts.float().sum(0)
    return Work(
        lambda: [kernel.product(x, parts)],
        lambda: [reference(x.float(), weight)],
        parts.nbytes + x.nbytes + 4 * outputs * world.rows,
    )


def shared_activation(world: World) -> Work:
    from dsv4_plugin.kernels.swiglu import kernel, reference

    shape = world.rows, world.config.moe_intermediate_size
    gate, up = (world.random(*shape, dtype=torch.bfloat16) for _ in range(2))
    args = (gate, -up, world.config.swiglu_limit, torch.bfloat16)
    return Work(lambda: [kernel.swiglu(*args)], lambda: [reference.swiglu(*args)], 3 * gate.nbytes)


def _read(world: World, nbytes: int) -> int:
    """Of all experts' weights, those that the rows choose, at most."""
    n = world.experts
    return nbytes // n * min(n, world.rows * world.config.num_experts_per_tok)


def plain_experts(world: World) -> Work:
    from dsv4_plugin.kernels.experts import cpu, kernel

    (x, ids, weight), c = world.routed(), world.config
    d, f = c.hidden_size, c.moe_intermediate_size
    w13, w2 = (
        world.random(world.experts, *shape, dtype=torch.bfloat16).mul_(shape[0] ** -0.5)
        for shape in ((d, 2 * f), (f, d))
    )
    args = (x, ids, weight, w13, w2, c.swiglu_limit)
    return Work(
        lambda: [kernel.experts(*args)],
        lambda: [cpu.experts(*args)],
        _read(world, w13.nbytes + w2.nbytes) + 2 * x.nbytes,
    )


def packed_experts(world: World, kind: str, rounding: bool = False) -> Work:
    """Without rounding of inputs, where results are compared: a sum in another order may round to
    another e4m3 value."""
    from dsv4_plugin.kernels.experts import cpu, kernel

    (x, ids, weight), c = world.routed(), world.config
    n, d, f = world.experts, c.hidden_size, c.moe_intermediate_size
    w1, w3, w2 = (world.packed(kind, n, *s) for s in ((f, d), (f, d), (d, f)))
    args = (x, ids, weight, w1, w3, w2, c.swiglu_limit, rounding)
    stored = sum(t.nbytes for w in (w1, w3, w2) for t in vars(w).values() if torch.is_tensor(t))
    return Work(
        lambda: [kernel.packed_experts(*args)],
        lambda: [cpu.packed_experts(*args)],
        _read(world, stored) + 2 * x.nbytes,
    )


def _values(x: Inputs) -> Tensor:
    return x.values() if isinstance(x, Rounded) else x


def fp8_linear(world: World, n_in: str, n_out: str, factor: int = 1, rounded: bool = True) -> Work:
    """By the names of the config's fields; n_out times `factor`. rounded: so are its inputs."""
    from dsv4_plugin.kernels.packed import cpu, kernel

    inputs, outputs = getattr(world.config, n_in), factor * getattr(world.config, n_out)
    x = world.random(world.rows, inputs, dtype=torch.bfloat16)
    matrix = world.packed("fp8", outputs, inputs)
    assert isinstance(matrix, FP8Matrix)
    given = kernel.round_rows(x) if rounded else x
    arranged = kernel.arranged(matrix, rounded)
    return Work(
        lambda: [kernel.product(given, arranged)],
        lambda: [cpu.product(given, matrix)],
        outputs * inputs + x.nbytes + 2 * outputs * world.rows,
    )


def gated_linear(world: World, rounded: bool = False) -> Work:
    """The shared expert's w1 and w3; rounded: as its w2 takes them, not to be compared."""
    from dsv4_plugin.kernels.packed import cpu, kernel

    c = world.config
    x = world.random(world.rows, c.hidden_size, dtype=torch.bfloat16)
    matrix = world.packed("fp8", 2 * c.moe_intermediate_size, c.hidden_size)
    assert isinstance(matrix, FP8Matrix)
    given, arranged = kernel.round_rows(x), kernel.arranged(matrix, rounded=True)
    return Work(
        lambda: [_values(kernel.gated_product(given, arranged, c.swiglu_limit, rounded))],
        lambda: [_values(cpu.gated_product(given, matrix, c.swiglu_limit, rounded))],
        matrix.codes.nbytes + x.nbytes + 2 * c.moe_intermediate_size * world.rows,
    )


def int4_linear(world: World) -> Work:
    """Of the latent, in blocks of 128."""
    from dsv4_plugin.kernels.packed import cpu, kernel

    c = world.config
    x = world.random(world.rows, c.hidden_size, dtype=torch.bfloat16)
    data = world.bytes(0, 256, c.q_lora_rank, c.hidden_size // 2)
    scale = world.random(c.q_lora_rank, c.hidden_size // 128).abs() * 2.0**-7
    matrix = Int4Matrix(data, scale.bfloat16())
    return Work(
        lambda: [kernel.product(x, matrix)],
        lambda: [cpu.product(x, matrix)],
        data.nbytes + x.nbytes + 2 * c.q_lora_rank * world.rows,
    )


def grouped_linear(world: World, rounded: bool = False) -> Work:
    """wo_a, with a scale for every row; rounded: as wo_b takes them, not to be compared."""
    from dsv4_plugin.kernels.packed import cpu, kernel

    c, groups = world.config, world.config.o_groups
    inputs = c.num_attention_heads * c.head_dim // groups
    x = world.random(world.rows, groups, inputs, dtype=torch.bfloat16)
    blocks = world.packed("fp8", groups * c.o_lora_rank, inputs)
    assert isinstance(blocks, FP8Matrix)
    matrix = FP8Matrix(blocks.codes, blocks.scale.repeat_interleave(FP8_BLOCK, 0), height=1)
    arranged = kernel.arranged(matrix, rounded=False)
    return Work(
        lambda: [_values(kernel.grouped_product(x, arranged, rounded))],
        lambda: [_values(cpu.grouped_product(x, matrix, rounded))],
        matrix.codes.nbytes + x.nbytes + 2 * groups * c.o_lora_rank * world.rows,
    )


def rounded_inputs(world: World) -> Work:
    from dsv4_plugin.kernels.packed import cpu, kernel

    x = world.random(world.rows, world.config.hidden_size, dtype=torch.bfloat16)
    return Work(
        lambda: [kernel.round_inputs(x)],
        lambda: [cpu.round_inputs(x)],
        2 * x.nbytes,
    )


def _entries(world: World, ratio: int) -> int:
    """Compressed entries that all rows see together, about."""
    return world.rows * (world.length // ratio)


def index_queries(world: World) -> Work:
    from dsv4_plugin.kernels.index import kernel, reference

    cis, c = world.step(CSA).cis[CSA], world.config
    q = world.random(world.rows, c.index_n_heads, c.index_head_dim, dtype=torch.bfloat16)
    weight = world.random(world.rows, c.index_n_heads)
    kind = world.layout.page[CSA].parts["key"].codec.format

    def expect() -> Outputs:
        """With the dims of a head in the kernel's order: every fourth together."""
        turned, scaled = reference.queries(q, weight, cis, kind)
        return [turned.unflatten(-1, (-1, 4)).transpose(-1, -2).flatten(-2), scaled]

    return Work(lambda: list(kernel.queries(q, weight, cis, kind)), expect, 2 * q.nbytes)


def index(world: World) -> Work:
    """Scores and their top-k, from given queries."""
    from dsv4_plugin.kernels.index import kernel, reference
    from dsv4_plugin.kernels.index.topk import topk

    s, cache, c = world.step(CSA), world.cache(CSA), world.config
    q = world.random(world.rows, c.index_n_heads, c.index_head_dim, dtype=torch.bfloat16)
    weight = world.random(world.rows, c.index_n_heads)
    keys = cache.keys(s.tables)
    n, kind = world.length // CSA, keys.pool.codec.format
    turned = kernel.queries(q, weight, s.cis[CSA], kind)
    at = s.position, s.request

    def score_all() -> Tensor:
        flat = kernel.gathered(keys, s.seq_lens, CSA, n) if s.tiles else None
        return kernel.scores(*turned, keys, *at, CSA, n, flat)

    def launch() -> Outputs:
        score = score_all()
        return [topk(score, s.position, CSA, c.index_topk)]

    def expect() -> Outputs:
        # By the kernel's scores: sums of another order may choose another entry.
        score = score_all()
        plain_queries = reference.queries(q, weight, s.cis[CSA], kind)
        plain = reference.scores(*plain_queries, keys, *at, CSA, n)
        seen = ~plain.isnan()
        close = 1e-3 * float(plain[seen].abs().max())
        # The kernel's rows are a little longer than there are entries.
        torch.testing.assert_close(score[:, :n][seen], plain[seen], rtol=0, atol=close)
        return [reference.topk(score, s.position, CSA, c.index_topk)]

    row = 4 * keys.pool.codec.words
    nbytes = _entries(world, CSA) // world.tokens * row + q.nbytes
    return Work(launch, expect, nbytes)


def attention(world: World, ratio: int) -> Work:
    from dsv4_plugin.kernels.attention import kernel, reference

    s, cache, c = world.step(ratio), world.cache(ratio), world.config
    q = world.random(world.rows, c.num_attention_heads, c.head_dim, dtype=torch.bfloat16)
    sink = world.random(c.num_attention_heads)
    window = cache.window_rows(s.tables)
    entries = cache.entries(s.tables) if ratio else None
    chosen = None
    read = min(c.sliding_window, world.length)
    if ratio == CSA:
        n, k = max(1, world.length // CSA), c.index_topk
        pick = torch.arange(k, device=world.device) * max(1, n // k)
        chosen = pick.where(pick < n, -1).int().repeat(world.rows, 1)
        read += min(k, n)
    elif ratio == HCA:
        read += world.length // HCA
    args = (q, sink, s.cis[ratio], s, window, c.sliding_window, entries, ratio, chosen)
    row = 4 * window.pool.codec.words
    nbytes = read * row * (world.rows if ratio == CSA else world.requests) + 2 * q.nbytes
    return Work(
        lambda: [kernel.attention(*args)],
        lambda: [reference.attention(*args)],
        nbytes,
    )


WORK: dict[str, Callable[[World], Work]] = {
    "step metadata": place,
    "latent norm": latent_norm,
    "queries and window rows": queries_and_window,
    "compressor, CSA": partial(compressor, ratio=CSA),
    "compressor, HCA": partial(compressor, ratio=HCA),
    "residual streams": residual_streams,
    "residual streams, joined": joined_streams,
    "router": router,
    "router's product": partial(float32_linear, outputs=256),
    "compressors' product, CSA": partial(float32_linear, outputs=2560),
    "shared expert's SwiGLU": shared_activation,
    "index queries": index_queries,
    "index scores and top-k": index,
    "attention, SWA": partial(attention, ratio=SWA),
    "attention, CSA": partial(attention, ratio=CSA),
    "attention, HCA": partial(attention, ratio=HCA),
    "experts, bfloat16": plain_experts,
    "experts, FP8": partial(packed_experts, kind="fp8"),
    "experts, MXFP4": partial(packed_experts, kind="fp4"),
    "experts, NVFP4": partial(packed_experts, kind="nvfp4"),
    "FP8 linear, latent": partial(fp8_linear, n_in="hidden_size", n_out="q_lora_rank"),
    "FP8 linear, queries": partial(
        fp8_linear, n_in="q_lora_rank", n_out="num_attention_heads", factor=FLASH.head_dim
    ),
    "FP8 linear, groups of heads": grouped_linear,
    "FP8 linear, gated": gated_linear,
    "int4 linear, latent": int4_linear,
    "rounded inputs": rounded_inputs,
}
