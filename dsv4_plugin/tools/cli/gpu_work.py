"""What `dsv4 gpu-check` runs: every kernel, on inputs of a given size.

Shapes are Flash's: 64 heads of 512, 4 streams of 4,096, 256 experts, pages of 256 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.layout import BlockLayout, CacheLayout
from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.cache.rows import RowFormat, RowPool
from dsv4_plugin.cache.step import Step
from dsv4_plugin.config import CSA, HCA, SWA, ModelConfig
from dsv4_plugin.kernels.compress import of_cache
from dsv4_plugin.kernels.packed import FP4Matrix, FP8Matrix, Matrix, NVFP4Matrix
from dsv4_plugin.kernels.step import Rows
from dsv4_plugin.kernels.streams import Mixer, Spread

Outputs = list[Tensor]
HEADS, D, ROPE, HIDDEN, STREAMS, EXPERTS, INDEX_HEADS, INDEX_D = 64, 512, 64, 4096, 4, 256, 64, 128
EPS = 1e-6
TOPK = 512
ROUTED, CHOSEN, EXPERT_WIDTH, LIMIT = 64, 6, 2048, 10.0
"""Experts that are there, of a token, their width and their SwiGLU's limit."""


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
    bring `tokens` tokens each in this step."""

    device: torch.device
    config: ModelConfig
    layout: CacheLayout
    requests: int
    tokens: int
    length: int

    @classmethod
    def of(
        cls, device: torch.device, requests: int, tokens: int, length: int, kv_dtype: str = "fp8"
    ) -> World:
        config = ModelConfig(
            vocab_size=129280, hidden_size=HIDDEN, num_hidden_layers=3, num_attention_heads=HEADS,
            head_dim=D, qk_rope_head_dim=ROPE, q_lora_rank=1024, o_groups=8, o_lora_rank=1024,
            sliding_window=128, compress_ratios=(SWA, CSA, HCA), index_n_heads=INDEX_HEADS,
            index_head_dim=INDEX_D, index_topk=TOPK, n_routed_experts=EXPERTS,
            num_experts_per_tok=6, moe_intermediate_size=2048, num_hash_layers=0,
            routed_scaling_factor=1.5,
            max_position_embeddings=1 << 20, yarn=None,
        )  # fmt: skip
        layout = CacheLayout.of(config, kv_dtype)
        return cls(device, config, layout, requests, tokens, length)

    @property
    def rows(self) -> int:
        return self.requests * self.tokens

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(len(shape) + sum(shape))
        return torch.randn(shape, device=self.device, generator=generator).to(dtype)

    def bytes(self, low: int, high: int, *shape: int) -> Tensor:
        """uint8 from low to high - 1."""
        generator = torch.Generator(self.device).manual_seed(sum(shape))
        return torch.randint(
            low, high, shape, device=self.device, generator=generator, dtype=torch.uint8
        )

    def packed(self, kind: str, *shape: int) -> Matrix:
        """Random codes of weights [..., out, in]."""
        *e, n_out, n_in = shape
        if kind == "fp8":
            codes = self.bytes(0, 256, *shape)
            codes[codes & 0x7F == 0x7F] = 0  # NaN
            scale = self.random(*e, -(-n_out // 128), -(-n_in // 128)).abs() * 2.0**-12
            return FP8Matrix(codes, scale)
        data = self.bytes(0, 256, *e, n_out, n_in // 2)
        if kind == "fp4":
            return FP4Matrix(data, self.bytes(116, 122, *e, n_out, n_in // 32))
        scale, top = self.bytes(0, 0x7F, *e, n_out, n_in // 16), self.random(*e).abs() * 2.0**-12
        return NVFP4Matrix(data, scale, top)

    def routed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs of the experts, the choices of each row and their weights."""
        ids = self.random(self.rows, ROUTED).topk(CHOSEN).indices
        x = self.random(self.rows, HIDDEN, dtype=torch.bfloat16)
        return x, ids, self.random(self.rows, CHOSEN).sigmoid()

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
        return BlockTables(window, pages, numbers, self.layout.window.words, page, ring)

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
        place(tables, self.start(), self.lengths(), block, words, self.grains(), rows)
        angle = self.random(self.rows, ROPE // 2)
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
        blocks = self.requests * -(-self.length // tokens)
        storage = torch.zeros(blocks * layout.words, dtype=torch.int32, device=self.device)
        first = torch.arange(blocks, device=self.device)[:, None] * layout.words
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


def latent_norm(world: World) -> Work:
    from dsv4_plugin.kernels.norm import kernel, reference

    x = world.random(world.rows, 1024, dtype=torch.bfloat16)
    weight = world.random(1024)
    return Work(
        lambda: [kernel.rms_norm(x, weight, EPS)],
        lambda: [reference.rms_norm(x, weight, EPS)],
        2 * x.nbytes,
    )


def queries_and_window(world: World) -> Work:
    from dsv4_plugin.kernels.qkv import kernel, reference

    s = world.step(SWA)
    q = world.random(world.rows, HEADS, D, dtype=torch.bfloat16)
    kv = world.random(world.rows, D, dtype=torch.bfloat16)
    weight = world.random(D)
    empty = world.window()
    codec = world.layout.window.parts["kv"].codec
    same = RowPool(empty, codec)

    def run(op: Callable[..., Tensor]) -> Outputs:
        pool = RowPool(empty.clone(), codec)
        return [op(q, kv, weight, EPS, s.cis[SWA], s.window_write, pool), pool.storage]

    nbytes = 2 * q.nbytes + kv.nbytes + 4 * codec.words * world.rows
    again = partial(kernel.qkv, q, kv, weight, EPS, s.cis[SWA], s.window_write, same)
    return Work(lambda: run(kernel.qkv), lambda: run(reference.qkv), nbytes, again)


def compressor(world: World, ratio: int) -> Work:
    from dsv4_plugin.kernels.compress import kernel, reference

    s, cache = world.step(ratio), world.cache(ratio)
    assert cache.kv is not None
    assert cache.sums is not None
    halves, channels = (2, D + INDEX_D) if ratio == CSA else (1, D)
    y = world.random(world.rows, 2, halves, channels)
    ape = world.random(ratio, halves, channels)
    weights = world.random(D), world.random(INDEX_D)
    page, ring = cache.kv.storage, cache.sums.storage

    def on(op: Callable[..., None], to: LayerCache) -> Outputs:
        assert to.kv is not None
        assert to.sums is not None
        targets, state = of_cache(to, weights)
        op(y, ape, EPS, s, ratio, targets, state, torch.bfloat16)
        return [to.kv.storage, to.sums.storage]

    def run(op: Callable[..., None]) -> Outputs:
        window = cache.window.storage
        return on(op, LayerCache.bind(world.layout, ratio, window, page.clone(), ring.clone()))

    nbytes = y.nbytes + 8 * cache.sums.codec.words * world.requests
    again = partial(on, kernel.compress, cache)
    return Work(lambda: run(kernel.compress), lambda: run(reference.compress), nbytes, again)


def residual_streams(world: World) -> Work:
    from dsv4_plugin.kernels.streams import kernel, reference

    n, r = world.rows, STREAMS
    outputs = (2 + r) * r
    fn = world.random(outputs, r * HIDDEN) * (r * HIDDEN) ** -0.5
    base, weight = world.random(outputs), world.random(HIDDEN)
    mixer = Mixer(fn, base, torch.ones_like(base), weight, 20, EPS, EPS)
    out = world.random(n, HIDDEN, dtype=torch.bfloat16)
    h = world.random(n, r, HIDDEN, dtype=torch.bfloat16)
    by = Spread(world.random(n, r).sigmoid(), world.random(n, r, r).sigmoid())

    def run(op: Callable[..., tuple[Tensor, Tensor, Spread | None]]) -> Outputs:
        streams_, x, spread = op(out, h, by, mixer)
        assert spread is not None
        return [streams_, x, spread.post, spread.mixing]

    nbytes = 2 * h.nbytes + 2 * out.nbytes + fn.nbytes
    return Work(lambda: run(kernel.streams), lambda: run(reference.streams), nbytes)


def router(world: World) -> Work:
    from dsv4_plugin.kernels.gate import kernel, reference

    logits, bias = 3 * world.random(world.rows, EXPERTS), world.random(EXPERTS)
    ids = torch.zeros(world.rows, dtype=torch.int64, device=world.device)
    args = (logits, 6, 1.5, bias, None, ids, ids)
    return Work(
        lambda: list(kernel.gate(*args)), lambda: list(reference.gate(*args)), logits.nbytes
    )


def shared_activation(world: World) -> Work:
    from dsv4_plugin.kernels.swiglu import kernel, reference

    gate, up = (world.random(world.rows, EXPERT_WIDTH, dtype=torch.bfloat16) for _ in range(2))
    args = (gate, -up, LIMIT, torch.bfloat16)
    return Work(lambda: [kernel.swiglu(*args)], lambda: [reference.swiglu(*args)], 3 * gate.nbytes)


def _read(world: World, nbytes: int) -> int:
    """Of all experts' weights, those that the rows choose, at most."""
    return nbytes // ROUTED * min(ROUTED, world.rows * CHOSEN)


def plain_experts(world: World) -> Work:
    from dsv4_plugin.kernels.experts import cpu, kernel

    x, ids, weight = world.routed()
    w13, w2 = (
        world.random(ROUTED, *shape, dtype=torch.bfloat16).mul_(shape[0] ** -0.5)
        for shape in ((HIDDEN, 2 * EXPERT_WIDTH), (EXPERT_WIDTH, HIDDEN))
    )
    args = (x, ids, weight, w13, w2, LIMIT)
    return Work(
        lambda: [kernel.experts(*args)],
        lambda: [cpu.experts(*args)],
        _read(world, w13.nbytes + w2.nbytes) + 2 * x.nbytes,
    )


def packed_experts(world: World, kind: str) -> Work:
    """Inputs as they are: a sum in another order may round to another e4m3 value."""
    from dsv4_plugin.kernels.experts import cpu, kernel

    x, ids, weight = world.routed()
    d, f = HIDDEN, EXPERT_WIDTH
    w1, w3, w2 = (world.packed(kind, ROUTED, *s) for s in ((f, d), (f, d), (d, f)))
    args = (x, ids, weight, w1, w3, w2, LIMIT, False)
    stored = sum(t.nbytes for w in (w1, w3, w2) for t in vars(w).values() if torch.is_tensor(t))
    return Work(
        lambda: [kernel.packed_experts(*args)],
        lambda: [cpu.packed_experts(*args)],
        _read(world, stored) + 2 * x.nbytes,
    )


def fp8_linear(world: World, n_out: int, n_in: int) -> Work:
    from dsv4_plugin.kernels.packed import cpu, kernel

    x, matrix = (
        world.random(world.rows, n_in, dtype=torch.bfloat16),
        world.packed("fp8", n_out, n_in),
    )
    return Work(
        lambda: [kernel.product(x, matrix)],
        lambda: [cpu.product(x, matrix)],
        n_out * n_in + x.nbytes + 2 * n_out * world.rows,
    )


def rounded_inputs(world: World) -> Work:
    from dsv4_plugin.kernels.packed import cpu, kernel

    x = world.random(world.rows, HIDDEN, dtype=torch.bfloat16)
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

    cis = world.step(CSA).cis[CSA]
    q = world.random(world.rows, INDEX_HEADS, INDEX_D, dtype=torch.bfloat16)
    weight = world.random(world.rows, INDEX_HEADS)

    def expect() -> Outputs:
        """With the dims of a head in the kernel's order: every fourth together."""
        turned, scaled = reference.queries(q, weight, cis, RowFormat.FP8)
        return [turned.unflatten(-1, (-1, 4)).transpose(-1, -2).flatten(-2), scaled]

    return Work(lambda: list(kernel.queries(q, weight, cis, RowFormat.FP8)), expect, 2 * q.nbytes)


def index(world: World) -> Work:
    """Scores and their top-k, from given queries."""
    from dsv4_plugin.kernels.index import kernel, reference
    from dsv4_plugin.kernels.index.topk import topk

    s, cache = world.step(CSA), world.cache(CSA)
    q = world.random(world.rows, INDEX_HEADS, INDEX_D, dtype=torch.bfloat16)
    weight = world.random(world.rows, INDEX_HEADS)
    keys = cache.keys(s.tables)
    n, kind = world.length // CSA, keys.pool.codec.format
    turned = kernel.queries(q, weight, s.cis[CSA], kind)
    at = s.position, s.request

    def score_all() -> Tensor:
        flat = kernel.gathered(keys, s.seq_lens, CSA, n) if s.tiles else None
        return kernel.scores(*turned, keys, *at, CSA, n, flat)

    def launch() -> Outputs:
        score = score_all()
        return [topk(score, s.position, CSA, TOPK)]

    def expect() -> Outputs:
        # By the kernel's scores: sums of another order may choose another entry.
        score = score_all()
        plain_queries = reference.queries(q, weight, s.cis[CSA], kind)
        plain = reference.scores(*plain_queries, keys, *at, CSA, n)
        seen = ~plain.isnan()
        close = 1e-3 * float(plain[seen].abs().max())
        # The kernel's rows are a little longer than there are entries.
        torch.testing.assert_close(score[:, :n][seen], plain[seen], rtol=0, atol=close)
        return [reference.topk(score, s.position, CSA, TOPK)]

    row = 4 * keys.pool.codec.words
    nbytes = _entries(world, CSA) // world.tokens * row + q.nbytes
    return Work(launch, expect, nbytes)


def attention(world: World, ratio: int) -> Work:
    from dsv4_plugin.kernels.attention import kernel, reference

    s, cache = world.step(ratio), world.cache(ratio)
    q = world.random(world.rows, HEADS, D, dtype=torch.bfloat16)
    sink = world.random(HEADS)
    window = cache.window_rows(s.tables)
    entries = cache.entries(s.tables) if ratio else None
    chosen = None
    read = min(128, world.length)
    if ratio == CSA:
        n = max(1, world.length // CSA)
        pick = torch.arange(TOPK, device=world.device) * max(1, n // TOPK)
        chosen = pick.where(pick < n, -1).int().repeat(world.rows, 1)
        read += min(TOPK, n)
    elif ratio == HCA:
        read += world.length // HCA
    args = (q, sink, s.cis[ratio], s, window, 128, entries, ratio, chosen)
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
    "router": router,
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
    "FP8 linear, latent": partial(fp8_linear, n_out=1024, n_in=HIDDEN),
    "FP8 linear, queries": partial(fp8_linear, n_out=HEADS * D, n_in=1024),
    "rounded inputs": rounded_inputs,
}
