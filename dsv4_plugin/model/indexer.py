"""The Indexer of a CSA layer: which compressed entries a query attends to."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from dsv4_plugin.config import CSA, ModelConfig
from dsv4_plugin.kernels.rope import rotate_
from dsv4_plugin.model.compressor import Compressor
from dsv4_plugin.model.parallel import Parallel


class Indexer(nn.Module):
    """Index queries and head weights; their keys come from a compressor of their own.

    Heads are split over ranks where their number divides: a rank then has a part of each score,
    and `reduce` sums the parts, so that all ranks choose the same entries.
    """

    def __init__(self, config: ModelConfig, parallel: Parallel, prefix: str) -> None:
        super().__init__()
        n_heads, self.dim, self.topk = (
            config.index_n_heads,
            config.index_head_dim,
            config.index_topk,
        )
        split = parallel.size > 1 and n_heads % parallel.size == 0
        self.heads = n_heads // parallel.size if split else n_heads
        self.scale = self.dim**-0.5 * n_heads**-0.5
        self.reduce = parallel.all_reduce if split else _as_it_is
        linear = parallel.column if split else parallel.replicated
        self.wq_b = linear(config.q_lora_rank, n_heads * self.dim, f"{prefix}.wq_b")
        self.weights_proj = linear(config.hidden_size, n_heads, f"{prefix}.weights_proj")
        self.compressor = Compressor(config, CSA, self.dim)

    def forward(
        self, x: Tensor, qr: Tensor, cis: Tensor, rotate: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x [T, D], qr [T, q_lora_rank] -> queries float32 [T, I, c], weights float32 [T, I]."""
        q: Tensor = self.wq_b(qr)
        q = rotate_(q.view(-1, self.heads, self.dim), cis).float()
        weight: Tensor = self.weights_proj(x).float() * self.scale
        return q if rotate is None else q @ rotate, weight


def _as_it_is(score: Tensor) -> Tensor:
    return score


@lru_cache
def hadamard(dim: int, device: torch.device) -> Tensor:
    """The orthonormal Hadamard matrix [dim, dim], dim a power of two."""
    h = torch.ones(1, 1, device=device)
    while h.shape[0] < dim:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h.mul_(dim**-0.5)
