"""The feed-forward part of a block: gate, routed experts, shared expert.

An expert is w2 (silu(min(w1 x, limit)) * clamp(w3 x, -limit, limit)). Source: `Expert` and `MoE` of
the authors' inference/model.py.
"""

from __future__ import annotations

from torch import Tensor, nn

from dsv4_plugin.cache.step import Step
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.kernels.packed import Both, Inputs, plain
from dsv4_plugin.model.gate import Gate
from dsv4_plugin.model.parallel import Parallel
from dsv4_plugin.model.quantised import Gated, takes_rounded


class Expert(nn.Module):
    """The shared expert: every token's, clamped like the routed ones. Not summed over ranks."""

    def __init__(self, config: ModelConfig, parallel: Parallel, prefix: str) -> None:
        super().__init__()
        d, f = config.hidden_size, config.moe_intermediate_size * config.n_shared_experts
        self.limit = config.swiglu_limit
        self.w1 = parallel.column(d, f, f"{prefix}.w1")
        self.w2 = parallel.row(f, d, f"{prefix}.w2", reduce=False)
        self.w3 = parallel.column(d, f, f"{prefix}.w3")

    def finalize_weights(self) -> None:
        """After loading: w1 and w3 become one product."""
        if not hasattr(self, "gated"):
            self.gated = Gated(self.w1, self.w3, self.limit, takes_rounded(self.w2))
        self.gated.arrange()

    def forward(self, x: Inputs | Both) -> Tensor:
        out: Tensor = self.w2(self.gated.swiglu(x))
        return out


class MoE(nn.Module):
    def __init__(self, config: ModelConfig, parallel: Parallel, layer: int, prefix: str) -> None:
        super().__init__()
        self.gate = Gate(config, hash_routed=layer < config.num_hash_layers)
        self.experts = parallel.experts(f"{prefix}.experts")
        self.shared_experts = Expert(config, parallel, f"{prefix}.shared_experts")
        self.all_reduce = parallel.all_reduce
        self.takes_rounded = takes_rounded(self.shared_experts.w1, self.shared_experts.w3)

    def forward(self, x: Tensor | Both, input_ids: Tensor, step: Step) -> Tensor:
        """x [T, D] -> [T, D]."""
        ids, weight = self.gate(plain(x), input_ids, step.position)
        return self.all_reduce(self.experts(plain(x), ids, weight, self.shared_experts(x)))
