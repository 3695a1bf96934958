"""Attention of all three layer kinds: window rows, plus compressed rows (CSA: chosen; HCA: all).

One KV head, whose keys are the values. qr = q_norm(wq_a x), q = wq_b qr, normed per head without a
weight; kv = kv_norm(wkv x); RoPE on the last dims of both. softmax(q k / sqrt(d)) over a query's
window and compressed rows together, with a learned sink per head in the denominator; RoPE undone on
the output; then wo_a within each group of heads and wo_b over all. Source: `Attention` of the
authors' inference/model.py.

Shapes: T tokens, D hidden size, H heads of this rank, d head_dim, k index_topk.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.step import Step
from dsv4_plugin.config import CSA, SWA, ModelConfig
from dsv4_plugin.kernels.attention import attention
from dsv4_plugin.kernels.packed import Both, plain
from dsv4_plugin.kernels.qkv import qkv
from dsv4_plugin.model.compressor import Compressor, Compressors
from dsv4_plugin.model.indexer import Indexer
from dsv4_plugin.model.loading import give_below, shard
from dsv4_plugin.model.norm import RMSNorm
from dsv4_plugin.model.parallel import OutputGroups, Parallel
from dsv4_plugin.model.quantised import Beside, by_rows, grouped_linear, takes_rounded


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, parallel: Parallel, layer: int, prefix: str) -> None:
        super().__init__()
        c, d = config, config.head_dim
        self.ratio, self.eps = c.compress_ratios[layer], c.rms_norm_eps
        self.sliding_window = c.sliding_window
        self.heads, self.dim, self.dtype = c.num_attention_heads // parallel.size, d, parallel.dtype
        self.topk, n_heads = c.index_topk, c.num_attention_heads
        groups = OutputGroups(n_heads, c.o_groups, parallel.rank, parallel.size)
        self.groups, all_groups = groups.parts, groups.parts * parallel.size
        self.wq_a = parallel.replicated(c.hidden_size, c.q_lora_rank, f"{prefix}.wq_a")
        self.wq_b = parallel.column(c.q_lora_rank, n_heads * d, f"{prefix}.wq_b")
        self.wkv = parallel.replicated(c.hidden_size, d, f"{prefix}.wkv")
        self.kv_norm = RMSNorm(d, self.eps)
        self.wo_b = parallel.row(all_groups * c.o_lora_rank, c.hidden_size, f"{prefix}.wo_b")
        rounds = takes_rounded(self.wo_b)
        self.wo_a = grouped_linear(parallel, groups, d, c.o_lora_rank, f"{prefix}.wo_a", rounds)
        self.output_groups = groups
        self.takes_rounded = takes_rounded(self.wq_a, self.wkv)
        sink = torch.empty(self.heads, dtype=torch.float32)
        self.attn_sink = nn.Parameter(sink, requires_grad=False)
        if self.ratio != SWA:
            self.compressor = Compressor(c, self.ratio, d)
        if self.ratio == CSA:
            self.indexer = Indexer(c, parallel, f"{prefix}.indexer")
        takers = [self.wq_b, *([self.indexer.wq_b] if self.ratio == CSA else [])]
        self.q_norm = RMSNorm(c.q_lora_rank, self.eps, takes_rounded(*takers))

    def take(self, name: str, tensor: Tensor) -> bool:
        """A full tensor of the layer; wo_b gets its columns for a rank's parts of groups."""
        if name == "attn_sink":
            tensor = shard(tensor, 0, self.output_groups.rank, self.heads)
        elif name.startswith("wo_b."):
            tensor = by_rows(name, self.output_groups.wo_b, tensor)
        return give_below(self, name, tensor)

    def finalize_weights(self) -> None:
        """After loading: products of the same input become one, and so do compressors."""
        if not hasattr(self, "down"):
            self.down = Beside(self.wq_a, self.wkv)
            if self.ratio == CSA:
                self.up = Beside(self.wq_b, self.indexer.wq_b)
            if self.ratio != SWA:
                parts = [self.compressor, *([self.indexer.compressor] if self.ratio == CSA else [])]
                self.compressors = Compressors(self.ratio, parts, self.dtype)
        self.down.arrange()
        if self.ratio == CSA:
            self.up.arrange()

    def write(self, x: Tensor, cis: Tensor, window_write: Tensor, cache: LayerCache) -> None:
        """Nothing but the window rows of x [T, D]: of a drafter, which reads the main model. The
        rest is as a step has it."""
        nobody = x.new_empty(len(x), 0, self.dim)
        qkv(nobody, self.wkv(x), self.kv_norm.weight, self.eps, cis, window_write, cache.window)

    def forward(self, x: Tensor | Both, step: Step, cache: LayerCache) -> Tensor:
        """x [T, D], normed -> [T, D]. Writes this step's rows, then reads what each token sees."""
        cis = step.cis[self.ratio]
        qr, kv = self.down(x)
        qr = self.q_norm(qr)
        choosing = self.ratio == CSA and step.longest // CSA > self.topk
        q, *index_q = self.up(qr) if choosing else [self.wq_b(qr)]
        q, kv_weight = q.view(-1, self.heads, self.dim), self.kv_norm.weight
        q = qkv(q, kv, kv_weight, self.eps, cis, step.window_write, cache.window)
        entries = chosen = None
        if self.ratio != SWA:
            self.compressors(plain(x), step, cache)
            entries = cache.entries(step.tables)
        if choosing:
            chosen = self.indexer(plain(x), *index_q, cis, step, cache)
        window, size = cache.window_rows(step.tables), self.sliding_window + step.together
        o = attention(q, self.attn_sink, cis, step, window, size, entries, self.ratio, chosen)
        o = o.to(x.dtype).view(-1, self.groups, self.heads * self.dim // self.groups)
        out: Tensor = self.wo_b(self.wo_a(o))
        return out
