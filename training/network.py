"""The network under training: transformers' DeepSeek-V4, made cheaper on a CPU from outside.

Legend: B rows, S tokens, T tokens of all rows, H heads, K keys, R streams, D head or hidden size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as v4
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

from dsv4_plugin.tools.mini import COMPACT, CONFIG, hash_table
from training.data import Vocabulary


class Attend(torch.autograd.Function):
    """Query norm, RoPE, attention with sinks over shared keys, inverse RoPE: one node.

    The heads of a token are rows beside each other, so that a row of the batch is one product.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, mask: Tensor, sinks: Tensor, cos: Tensor, sin: Tensor,
        eps: float,
    ) -> Tensor:  # fmt: skip
        """q [B, S, H, D], kv [B, K, D], mask [B, S, K], sinks [H], cos and sin [(B,) S, D'] ->
        as q.
        """
        b, s, h, d = q.shape
        q = q.clone()
        p, scale, sink = Attend.shares(q, kv, mask, sinks, cos, sin, eps)
        ctx.save_for_backward(q, kv, p, scale, sink, cos, sin)
        out = torch.bmm(p.view(b, s * h, -1), kv).view(b, s, h, d)
        return _rotate(out, cos, -sin)

    @staticmethod
    def shares(
        q: Tensor, kv: Tensor, mask: Tensor, sinks: Tensor, cos: Tensor, sin: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """-> each key's share [B, S, H, K], the factor of q [B, S, H] and the sink's share.

        Rotates q in place.
        """
        b, s, h, d = q.shape
        norm = torch.linalg.vector_norm(q, dim=-1, dtype=torch.float32)
        scale = (norm.square() / d + eps).rsqrt() * d**-0.5
        q = _rotate(q, cos, sin)
        p = torch.bmm(q.view(b, s * h, d), kv.mT).view(b, s, h, -1).float()
        p.mul_(scale[..., None]).add_(mask[:, :, None])
        top = torch.maximum(p.amax(-1), sinks)
        p.sub_(top[..., None]).exp_()
        sink = (sinks - top).exp_()
        total = p.sum(-1) + sink
        return p.div_(total[..., None]).to(q.dtype), scale, sink / total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, p, scale, sink, cos, sin = ctx.saved_tensors
        b, s, h, d = q.shape
        rows = b, s * h, -1
        grad = _rotate(grad.to(q.dtype, copy=True), cos, sin).view(rows)
        dkv = torch.bmm(p.view(rows).mT, grad)
        dp = torch.bmm(grad, kv.mT).view(b, s, h, -1).float().mul_(p)
        dot = dp.sum(-1, keepdim=True)
        ds = dp.sub_(p * dot).mul_(scale[..., None]).to(q.dtype).view(rows)
        dkv += torch.bmm(ds.mT, q.view(rows))
        dq = torch.bmm(ds, kv).view(b, s, h, d)
        along = (q * dq).sum(-1, dtype=torch.float32) * scale.square()
        dq = torch.addcmul(dq, q, along[..., None].to(q.dtype), value=-1)
        dsinks = -(sink * dot[..., 0]).sum((0, 1))
        return _rotate(dq, cos, -sin), dkv, None, dsinks, None, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in place on the last channels of x [B, S, H, D]; cos and sin [(B,) S, channels / 2]."""
    part = x[..., -2 * cos.shape[-1] :].unflatten(-1, (-1, 2))
    a, b = part[..., 0].float(), part[..., 1].float()
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    part[..., 0], part[..., 1] = a * cos - b * sin, b * cos + a * sin
    return x


def queries_and_keys(
    self: v4.DeepseekV4Attention,
    hidden_states: Tensor,
    position_embeddings: dict[str, tuple[Tensor, Tensor]],
    position_ids: Tensor,
    attention_mask: Tensor,
    past_key_values: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of a block's input [B, S, D]: what `Attend` takes as q, kv, mask, cos and sin. The window's
    keys come first, the compressor's entries last.
    """
    b, s, _d = hidden_states.shape
    cos, sin = position_embeddings[self.rope_layer_type]
    q_residual = self.q_a_norm(self.q_a_proj(hidden_states))
    q = self.q_b_proj(q_residual).view(b, s, -1, self.head_dim)
    kv = self.kv_norm(self.kv_proj(hidden_states))[:, None]
    kv = v4.apply_rotary_pos_emb(kv, cos, sin)
    if past_key_values is not None:
        kv = past_key_values.update(kv, kv, self.layer_idx)[0]
    mask = attention_mask[:, 0]
    if self.compressor is not None:
        entries, bias = self.compressor(
            hidden_states, q_residual, position_ids, past_key_values, self.layer_idx
        )
        kv = torch.cat([kv, entries], 2)
        if bias is not None:
            mask = torch.cat([mask, bias[:, 0]], -1)
    return q, kv[:, 0].to(q.dtype), mask, cos[0], sin[0]


def attention(
    self: v4.DeepseekV4Attention, hidden_states: Tensor, **inputs: Any
) -> tuple[Tensor, None]:
    """`DeepseekV4Attention.forward` over `Attend`."""
    return attend(self, *queries_and_keys(self, hidden_states, **inputs))


def attend(
    self: v4.DeepseekV4Attention, q: Tensor, kv: Tensor, mask: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, None]:
    """The rest of `attention`: what `queries_and_keys` gave -> [B, S, D]."""
    out = Attend.apply(q, kv, mask, self.sinks, cos, sin, self.q_b_norm.eps)
    out = self.o_a_proj(out.view(*q.shape[:2], self.config.o_groups, -1))
    return self.o_b_proj(out.flatten(2)), None


class AllVisible(nn.Module):
    """In the indexer's place while rows are so short that it chooses every finished entry."""

    def __init__(self, indexer: nn.Module) -> None:
        super().__init__()
        self.ratio, self.topk = indexer.compress_rate, indexer.index_topk

    def forward(
        self, hidden: Tensor, _q: Tensor, positions: Tensor, _cache: Any, _layer: int
    ) -> Tensor:
        """-> entry numbers [B, S, entries so far], -1 where one is not finished yet."""
        n = (int(positions[0, -1]) + 1) // self.ratio
        assert n <= self.topk
        entries = torch.arange(n)
        visible = entries < (positions[..., None] + 1) // self.ratio
        return torch.where(visible, entries, -1).expand(len(hidden), -1, -1)


class Sinkhorn(torch.autograd.Function):
    """Doubly stochastic matrices [R, R, T], tokens last, so that each operation is one vector's.

    From softmaxed rows: columns once, then rows and columns `iterations` - 1 times.
    """

    @staticmethod
    def forward(ctx: Any, m: Tensor, iterations: int, eps: float) -> Tensor:
        steps = [0] + [1, 0] * (iterations - 1)
        saved = []
        for dim in steps:
            total = m.sum(dim, keepdim=True).add_(eps)
            m = m / total
            saved += [m, total]
        ctx.steps = steps
        ctx.save_for_backward(*saved)
        return m

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        saved = ctx.saved_tensors
        for i, dim in reversed(list(enumerate(ctx.steps))):
            m, total = saved[2 * i], saved[2 * i + 1]
            grad = (grad - (grad * m).sum(dim, keepdim=True)).div_(total)
        return grad, None, None


def connect(self: v4.DeepseekV4HyperConnection, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`DeepseekV4HyperConnection.forward`: streams [B, S, R, D] -> post, comb, collapsed."""
    b, s, r, d = streams.shape
    flat = streams.view(b * s, r * d)
    with torch.autocast("cpu", enabled=False):
        w = self.fn @ flat.T
    scale = flat.square().mean(-1).add(self.input_norm.eps).rsqrt()
    w = w * scale
    w = w * self.scale.repeat_interleave(torch.tensor([r, r, r * r]))[:, None] + self.base[:, None]
    pre = w[:r].sigmoid() + self.hc_eps
    post = 2 * w[r : 2 * r].sigmoid()
    comb = w[2 * r :].view(r, r, -1).softmax(1) + self.hc_eps
    comb = Sinkhorn.apply(comb, self.hc_sinkhorn_iters, self.hc_eps)
    parts = streams.view(b * s, r, d).unbind(1)
    collapsed = sum(p[:, None] * x for p, x in zip(pre, parts, strict=True))
    return post, comb, collapsed.view(b, s, d)


def mix(post: Tensor, comb: Tensor, out: Tensor, streams: Tensor) -> Tensor:
    """post [R, T], comb [R, R, T] (from, to), out and streams [B, S, (R,) D] -> streams."""
    b, s, r, d = streams.shape
    parts = streams.view(b * s, r, d).unbind(1)
    out = out.reshape(b * s, d)
    mixed = [
        post[k, :, None] * out + sum(comb[j, k, :, None] * parts[j] for j in range(r))
        for k in range(r)
    ]
    return torch.stack(mixed, 1).view(b, s, r, d)


def block(
    self: v4.DeepseekV4DecoderLayer, streams: Tensor, input_ids: Tensor, **inputs: Any
) -> Tensor:
    """`DeepseekV4DecoderLayer.forward` over the two above."""
    post, comb, x = self.attn_hc(streams)
    streams = mix(post, comb, self.self_attn(self.input_layernorm(x), **inputs)[0], streams)
    post, comb, x = self.ffn_hc(streams)
    x = self.mlp(self.post_attention_layernorm(x), input_ids=input_ids)
    return mix(post, comb, x, streams)


def experts(self: v4.DeepseekV4Experts, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """`DeepseekV4Experts.forward`: two batched products over rows padded to the busiest expert's
    count. x [T, D], index and weights [T, k] -> [T, D].
    """
    t, k = index.shape
    order = index.reshape(-1).argsort()
    counts = torch.bincount(index.reshape(-1), minlength=self.num_experts)
    start = counts.cumsum(0) - counts
    expert = index.reshape(-1)[order]
    place = torch.arange(t * k) - start[expert] + expert * int(counts.max())
    token = order // k
    rows = x.new_zeros(self.num_experts * int(counts.max()), x.shape[-1])
    rows = rows.index_copy(0, place, x[token]).view(self.num_experts, -1, x.shape[-1])
    hidden = self._apply_gate(torch.bmm(rows, self.gate_up_proj.transpose(1, 2)))
    out = torch.bmm(hidden, self.down_proj.transpose(1, 2)).flatten(0, 1)[place]
    out = out * weights.reshape(-1)[order, None]
    return torch.zeros_like(x).index_add(0, token, out.to(x.dtype))


_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    v4.DeepseekV4Attention: attention,
    v4.DeepseekV4HyperConnection: connect,
    v4.DeepseekV4DecoderLayer: block,
    v4.DeepseekV4Experts: experts,
}


def make_cheaper(model: nn.Module) -> None:
    """Give the modules of this model, and of no other, the forwards above."""
    for module in model.modules():
        forward = _FORWARDS.get(type(module))
        if forward is not None:
            module.forward = MethodType(forward, module)


def build(vocabulary: Vocabulary) -> v4.DeepseekV4ForCausalLM:
    """The network on the compact vocabulary in float32, fresh, embedding and head tied."""
    hf = json.loads((COMPACT / CONFIG).read_text())
    config = DeepseekV4Config(**(hf | {"vocab_size": len(vocabulary.ids)}))
    model = v4.DeepseekV4ForCausalLM(config)
    model.lm_head.weight = model.model.embed_tokens.weight
    # All tokens outside the compact vocabulary share one row of the head. It counts as often as
    # there are such tokens, so that sampling over the full vocabulary stays on the trained rows.
    model.unused = nn.Parameter(torch.zeros(config.hidden_size))
    model.log_unused = math.log(hf["vocab_size"] - config.vocab_size)
    make_cheaper(model)
    initialise(model)
    nn.init.constant_(model.model.norm.weight, 0.3)
    for layer in model.model.layers[: config.mlp_layer_types.count("hash_moe")]:
        table = hash_table(torch.tensor(vocabulary.ids), config.num_local_experts)
        layer.mlp.gate.tid2eid.copy_(table)
    return model.train()


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Matrices by their fan-in; what a block adds starts near zero; streams start unlike."""
    for name, p in model.named_parameters():
        if name.endswith(("o_b_proj.weight", "down_proj", "down_proj.weight")):
            p.normal_(std=0.01)
        elif "embed_tokens" in name:
            p.normal_(std=0.3)
        elif name.endswith("_hc.base"):
            r = round((len(p) + 1) ** 0.5) - 1  # there are (R + 2) R
            p.normal_(std=0.5)
            p[2 * r :] += 3 * torch.eye(r).flatten()
        elif name.endswith("_hc.fn"):
            p.normal_(std=0.02)
        elif name.endswith(("proj", "proj.weight", "gate.weight")):
            p.normal_(std=p.shape[-1] ** -0.5)


def leave_out_indexer(model: v4.DeepseekV4ForCausalLM) -> dict[str, nn.Module]:
    """Put `AllVisible` in the indexers' place; returns them by their names."""
    indexers = {}
    for i, layer in enumerate(model.model.layers):
        compressor = layer.self_attn.compressor
        if hasattr(compressor, "indexer"):
            indexers[f"model.layers.{i}.self_attn.compressor.indexer"] = compressor.indexer
            compressor.indexer = AllVisible(compressor.indexer)
    return indexers


def hidden_states(model: v4.DeepseekV4ForCausalLM, ids: Tensor, prefix: int = 0) -> Tensor:
    """Normed hidden states [B, S - prefix, D] of rows [B, S] that share their first tokens.

    The shared tokens run once, through transformers' cache, and their gradients add up.
    """
    if not prefix:
        return _run(model, ids, 0, None)
    cache = DynamicCache(config=model.config)
    _run(model, ids[:1, :prefix], 0, cache)
    for layer in cache.layers:
        _expand(layer, len(ids))
    return _run(model, ids[:, prefix:], prefix, cache)


def _run(model: v4.DeepseekV4ForCausalLM, ids: Tensor, start: int, cache: Any) -> Tensor:
    b, s = ids.shape
    window = model.config.sliding_window
    positions = torch.arange(start, start + s)
    keys = torch.arange(max(0, start - window + 1), start + s)
    distance = positions[:, None] - keys
    visible = (distance >= 0) & (distance < window)
    mask = torch.zeros(s, len(keys)).masked_fill(~visible, float("-inf"))
    return model.model(
        ids,
        attention_mask={"sliding_attention": mask.expand(b, 1, -1, -1)},
        position_ids=positions.expand(b, -1),
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state


def _expand(layer: Any, rows: int) -> None:
    """One row's cache as that of `rows` rows."""

    def expand(x: Any) -> Any:
        return x.expand(rows, *x.shape[1:]) if isinstance(x, Tensor) else x

    layer.keys, layer.values = expand(layer.keys), expand(layer.values)
    for name in ("buffer_kv", "buffer_gate", "compressed_kv", "overlap_kv", "overlap_gate"):
        if hasattr(layer, name):
            setattr(layer, name, {key: expand(x) for key, x in getattr(layer, name).items()})
