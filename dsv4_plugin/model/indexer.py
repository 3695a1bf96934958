"""The Indexer of a CSA layer: which compressed entries a query attends to.

score of an entry = sum over index heads of weight_h * relu(q_h . key), q = wq_b qr with RoPE, the
weights of weights_proj x; the index_topk best of those a query sees, lower entry first among
equals. Source: `Indexer` of the authors' inference/model.py.
"""

from __future__ import annotations

from torch import Tensor, nn

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.step import Step
from dsv4_plugin.config import CSA, ModelConfig
from dsv4_plugin.kernels.index import choose
from dsv4_plugin.model.compressor import Compressor
from dsv4_plugin.model.parallel import Parallel


class Indexer(nn.Module):
    """Index queries and head weights; their keys come from a compressor of their own.

    Heads are split over ranks where their number divides: a rank then has a part of each score,
    and `reduce` sums the parts, so that all ranks choose the same entries.
    """

    def __init__(self, config: ModelConfig, parallel: Parallel, prefix: str) -> None:
        super().__init__()
        n_heads = config.index_n_heads
        self.dim, self.topk = config.index_head_dim, config.index_topk
        split = parallel.size > 1 and n_heads % parallel.size == 0
        self.heads = n_heads // parallel.size if split else n_heads
        self.reduce = parallel.all_reduce if split else _as_it_is
        linear = parallel.column if split else parallel.replicated
        self.wq_b = linear(config.q_lora_rank, n_heads * self.dim, f"{prefix}.wq_b")
        self.weights_proj = linear(config.hidden_size, n_heads, f"{prefix}.weights_proj")
        self.compressor = Compressor(config, CSA, self.dim)

    def forward(self, x: Tensor, q: Tensor, cis: Tensor, step: Step, cache: LayerCache) -> Tensor:
        """x [T, D], q = wq_b qr -> the entries that each token attends to, int32 [T, k]."""
        q = q.view(-1, self.heads, self.dim)
        keys = cache.keys(step.tables)
        return choose(q, self.weights_proj(x), cis, keys, step, CSA, self.topk, self.reduce)


def _as_it_is(score: Tensor) -> Tensor:
    return score
