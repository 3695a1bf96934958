"""The network as a GPU runs it: the same modules, on operations made for steps on the device.

Per layer, besides the products: a launch for each of mHC's two places, the query's latent norm,
queries and window rows, the compressor, attention and the router, and the indexer's three. Nothing
here waits for the device or depends on what is in it.

Whatever differs from step to step, other than in values, stays in the attention of a layer: it
alone sees step and caches, which `begin` names. The rest depends on the number of rows only, so
that CUDA graphs that break at `attend`, and torch.compile, take it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.config import CSA, SWA
from dsv4_plugin.kernels.compress import State, Target, compress
from dsv4_plugin.kernels.custom_op import custom_op
from dsv4_plugin.kernels.dispatch import use_triton
from dsv4_plugin.kernels.gate import gate
from dsv4_plugin.kernels.norm import rms_norm
from dsv4_plugin.kernels.paged import Paged
from dsv4_plugin.kernels.paged_attention import Queries, paged_attention
from dsv4_plugin.kernels.paged_index import choose
from dsv4_plugin.kernels.qkv import qkv
from dsv4_plugin.kernels.step import DeviceStep
from dsv4_plugin.kernels.streams import Mixer, Spread, spread, streams
from dsv4_plugin.model.attention import Attention
from dsv4_plugin.model.hyper_connection import HyperConnection, HyperHead
from dsv4_plugin.model.moe import MoE
from dsv4_plugin.model.norm import RMSNorm

if TYPE_CHECKING:
    from dsv4_plugin.model.block import Block
    from dsv4_plugin.model.transformer import Transformer

TILED = 16
"""From this many tokens of a request on, neighbouring rows share tiles of attention."""


@dataclass(frozen=True)
class Running:
    """What attention takes besides its input, in the step that runs."""

    blocks: list[Block]
    step: DeviceStep
    caches: Sequence[LayerCache]


_running: Running | None = None


def begin(model: Transformer, step: DeviceStep, caches: Sequence[LayerCache]) -> None:
    """`forward` or `run` of the model, which come next in this process, are of this step."""
    global _running
    assert len(caches) == len(model.layers)
    _running = Running(cast("list[Block]", list(model.layers.values())), step, caches)


def forget() -> None:
    """No step runs: its caches may go."""
    global _running
    _running = None


@custom_op("attend(Tensor x, int block) -> Tensor", lambda x, block: torch.empty_like(x))
def attend(x: Tensor, block: int) -> Tensor:
    """The attention of the running step's layer, counted from the stage's first: [T, D] -> same."""
    r = _running
    assert r is not None
    return _attention(r.blocks[block].attn, x, r.step, r.caches[block])


def forward(model: Transformer, input_ids: Tensor) -> Tensor:
    """input_ids int [T], padding included -> hidden states [T, D], ready for the head."""
    h, out, by = _blocks(model, model.spread(input_ids), input_ids)
    mixer = _mixer(model.hc_head, model.norm)
    return streams(out, h, by, mixer)[1]


def run(model: Transformer, h: Tensor, input_ids: Tensor) -> Tensor:
    """A pipeline stage's blocks: streams [T, R, D] -> [T, R, D]."""
    h, out, by = _blocks(model, h, input_ids)
    return spread(out, h, by) if out is not None and by is not None else h


def _blocks(
    model: Transformer, h: Tensor, input_ids: Tensor
) -> tuple[Tensor, Tensor | None, Spread | None]:
    """The streams before the last sublayer's output joined them, that output, and how it joins."""
    out: Tensor | None = None
    by: Spread | None = None
    blocks = cast("list[Block]", list(model.layers.values()))
    assert _running is not None
    padding = (_running.step.position < 0)[:, None] if use_triton(h.device) else None
    for i, block in enumerate(blocks):
        h, x, by = streams(out, h, by, _mixer(block.hc_attn, block.attn_norm))
        out = model.attend(x, i)
        h, x, by = streams(out, h, by, _mixer(block.hc_ffn, block.ffn_norm))
        out = _moe(block.ffn, x, input_ids, padding)
    return h, out, by


def _mixer(hc: HyperConnection | HyperHead, norm: RMSNorm) -> Mixer:
    """Made once per place, after loading."""
    if hc.mixer is None:
        iters = hc.iters if isinstance(hc, HyperConnection) else 0
        scale = hc.scale.expand(len(hc.base)).contiguous()
        hc.mixer = Mixer(hc.fn, hc.base, scale, norm.weight, iters, hc.hc_eps, hc.norm_eps)
    return hc.mixer


def _attention(attention: Attention, x: Tensor, step: DeviceStep, cache: LayerCache) -> Tensor:
    a, ratio, layout, tables = attention, attention.ratio, cache.layout, step.tables
    cis = step.cis[ratio]
    qr = rms_norm(a.wq_a(x), a.q_norm.weight, a.eps)
    q = a.wq_b(qr).view(-1, a.heads, a.dim)
    q = qkv(q, a.wkv(x), a.kv_norm.weight, a.eps, cis, step.window_write, cache.window)
    window = Paged(cache.window, tables.window, tables.window_stride, 0, layout.window_block)
    tiles = step.longest_query >= TILED
    entries = chosen = None
    if ratio != SWA:
        _compress(a, x, step, cache)
        entries = _paged(cache, ratio, "kv", step)
    if ratio == CSA and step.longest // CSA > a.topk:
        i = a.indexer  # its scale is left out: a positive factor of all scores changes no choice
        chosen = choose(
            i.wq_b(qr).view(-1, i.heads, i.dim), i.weights_proj(x), cis,
            _paged(cache, ratio, "key", step), step.position, step.request, ratio, step.longest,
            a.topk, tiles, i.reduce,
        )  # fmt: skip
    queries = Queries(step.position, step.request, cis, step.longest)
    o = paged_attention(q, a.attn_sink, queries, window, a.window, entries, ratio, chosen, tiles)
    out: Tensor = a.wo_b(a.wo_a(o.view(-1, a.groups, o[0].numel() // a.groups)))
    return out


def _paged(cache: LayerCache, ratio: int, name: str, step: DeviceStep) -> Paged:
    part = cache.layout.page[ratio].parts[name]
    pool = cache.kv if name == "kv" else cache.key
    assert pool is not None
    return Paged(pool, step.tables.page, step.tables.page_stride, part.offset, part.rows)


def _compress(attention: Attention, x: Tensor, step: DeviceStep, cache: LayerCache) -> None:
    pool, ratio, layout = attention.pool, attention.ratio, cache.layout
    assert pool is not None
    assert cache.kv is not None
    assert cache.sums is not None
    parts = layout.page[ratio].parts
    targets = [Target(cache.kv, parts["kv"].offset, attention.compressor.norm.weight)]
    carry = 0
    if ratio == CSA:
        assert cache.key is not None
        quantised = cache.key.codec.kind in ("fp8", "fp4")
        weight = attention.indexer.compressor.norm.weight
        targets.append(Target(cache.key, parts["key"].offset, weight, quantised))
        carry = parts["carry"].offset
    state = State(cache.sums, layout.ring_rows, cache.carry, carry)
    y = pool.project(x.float()).view(-1, 2, pool.halves, pool.channels)
    size, eps = layout.page_size, attention.eps
    compress(y, pool.ape, eps, step, ratio, size, targets, state, pool.dtype)


def _moe(moe: MoE, x: Tensor, input_ids: Tensor, padding: Tensor | None) -> Tensor:
    """padding: bool [T, 1], rows that choose no experts, so that none is read for them."""
    g = moe.gate
    logits = nn.functional.linear(x.float(), g.weight)
    ids, weight = gate(logits, g.k, g.scale, g.bias, g.tid2eid, input_ids)
    if padding is not None:
        ids.masked_fill_(padding, -1)
    out: Tensor = moe.all_reduce(moe.experts(x, ids, weight) + moe.shared_experts(x))
    return out
