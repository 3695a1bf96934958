"""The router: sqrt-softplus scores, and which experts a token goes to.

score = sqrt(softplus(W x)); the k best of score + bias, or, in the first layers, those that a table
names for the token id; their weights are score / sum of the chosen ones' * routed_scaling_factor.
Source: `Gate` of the authors' inference/model.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsv4_plugin.config import ModelConfig
from dsv4_plugin.kernels.gate import gate
from dsv4_plugin.kernels.linear import Product, on_tensor_cores


class Gate(nn.Module):
    """Experts by top-k of score + bias, or, in the first layers, by a table over token ids."""

    def __init__(self, config: ModelConfig, hash_routed: bool) -> None:
        super().__init__()
        self.k, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        shape = (config.n_routed_experts, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)
        self.product: Product | None = None
        self.bias: nn.Parameter | None = None
        self.tid2eid: nn.Parameter | None = None
        if hash_routed:
            table = torch.empty(config.vocab_size, self.k, dtype=torch.int64)
            self.tid2eid = nn.Parameter(table, requires_grad=False)
        else:
            bias = torch.empty(config.n_routed_experts, dtype=torch.float32)
            self.bias = nn.Parameter(bias, requires_grad=False)

    def finalize_weights(self) -> None:
        """After loading: into parts for tensor cores, where there are such."""
        if self.product is None:
            self.product = on_tensor_cores(self.weight.data)
            if self.product is not None:
                self.weight = nn.Parameter(self.weight.new_empty(0), requires_grad=False)

    def forward(self, x: Tensor, input_ids: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D], input_ids and position int [T] -> expert ids int64 [T, k] and their weights,
        float32 [T, k]; see the operation for rows of padding."""
        if self.product is None:
            logits = nn.functional.linear(x.float(), self.weight)
        else:
            logits = self.product(x)
        return gate(logits, self.k, self.scale, self.bias, self.tid2eid, input_ids, position)
