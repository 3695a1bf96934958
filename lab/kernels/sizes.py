"""Configurations of published sizes."""

from __future__ import annotations

from dsv4_plugin.config import ModelConfig


def flash(ratios: list[int]) -> ModelConfig:
    """Flash with layers of these kinds."""
    return ModelConfig(
        vocab_size=129280, hidden_size=4096, num_hidden_layers=43, num_attention_heads=64,
        head_dim=512, qk_rope_head_dim=64, q_lora_rank=1024, o_groups=8, o_lora_rank=1024,
        sliding_window=128, compress_ratios=tuple(ratios), index_n_heads=64, index_head_dim=128,
        index_topk=512, n_routed_experts=256, num_experts_per_tok=6, moe_intermediate_size=2048,
        num_hash_layers=3, routed_scaling_factor=1.5, max_position_embeddings=1 << 20, yarn=None,
    )  # fmt: skip
