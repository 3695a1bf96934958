"""The Compressor: every `ratio` tokens become one KV entry.

kv = wkv x and score = wgate x + ape[position % ratio], in float32. An entry is, per channel, the
softmax of its tokens' scores times their kv; then norm, and RoPE at the window's first position.
HCA pools its 128 tokens. CSA's kv is twice as wide: an entry pools the 4 tokens before its window
by their first half of channels, and its own 4 by their second. Source: `Compressor` of the authors'
inference/model.py.

A CSA layer runs two of them on the same tokens, one for KV entries and one for indexer keys; their
channels lie side by side here (C of them), so that one product and one pooling serve both.

Shapes: T tokens, h halves (1 for HCA, 2 for CSA), C channels per half.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.step import Step
from dsv4_plugin.config import CSA, ModelConfig
from dsv4_plugin.kernels.compress import compress, of_cache
from dsv4_plugin.model.norm import RMSNorm
from dsv4_plugin.model.parallel import Float32Linear, Linear


class Compressor(nn.Module):
    """The weights of one compressor: kv and gate products, position bias (ape), norm."""

    def __init__(self, config: ModelConfig, ratio: int, dim: int) -> None:
        super().__init__()
        halves = 2 if ratio == CSA else 1
        self.wkv = Linear(config.hidden_size, halves * dim, torch.float32)
        self.wgate = Linear(config.hidden_size, halves * dim, torch.float32)
        ape = torch.empty(ratio, halves * dim, dtype=torch.float32)
        self.ape = nn.Parameter(ape, requires_grad=False)
        self.norm = RMSNorm(dim, config.rms_norm_eps)


class Compressors(nn.Module):
    """Runs a layer's compressors over a step, from pooling sums in the cache to finished rows.

    Made of loaded compressors, whose products it fuses into one (and takes away from them). Pooling
    is float32; a finished entry goes on in `dtype`, the model's, as the authors' does: what fp8
    rows then round to depends on it.
    """

    def __init__(self, ratio: int, compressors: list[Compressor], dtype: torch.dtype) -> None:
        super().__init__()
        self.ratio, self.halves, self.dtype = ratio, 2 if ratio == CSA else 1, dtype
        self.norms = [c.norm for c in compressors]
        self.eps = compressors[0].norm.eps
        self.channels = sum(c.norm.weight.numel() for c in compressors)
        kv = self._beside([c.wkv.weight for c in compressors], 0)
        gate = self._beside([c.wgate.weight for c in compressors], 0)
        self.project = Float32Linear(kv.shape[1], 2 * len(kv))
        self.project.weight.data = torch.cat([kv, gate])
        ape = self._beside([c.ape for c in compressors], 1).unflatten(1, (self.halves, -1))
        self.ape = nn.Parameter(ape, requires_grad=False)
        for c in compressors:
            del c.wkv, c.wgate, c.ape

    def _beside(self, tensors: list[Tensor], dim: int) -> Tensor:
        """Channels of all compressors side by side within each half."""
        parts = [t.unflatten(dim, (self.halves, -1)) for t in tensors]
        return torch.cat(parts, dim + 1).flatten(dim, dim + 1)

    def forward(self, x: Tensor, step: Step, cache: LayerCache) -> None:
        """Pool the normed x [T, D] and write whatever became complete."""
        targets, state = of_cache(cache, [norm.weight for norm in self.norms])
        y = self.project(x).view(-1, 2, self.halves, self.channels)
        compress(y, self.ape, self.eps, step, self.ratio, targets, state, self.dtype)
