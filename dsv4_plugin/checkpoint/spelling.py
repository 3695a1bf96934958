"""Tensor names as others write them, to the authors' own: one to one, or unknown as before.

Three spellings differ: transformers' module names (`model.layers.0.self_attn.q_a_proj.weight`), a
weight's scale (`.scale`, `.weight_scale`, `.weight_scale_inv`), and the router's bias.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from dsv4_plugin.config import ModelConfig
from dsv4_plugin.json_file import printable

_MODULES = {
    "self_attn": "attn",
    "mlp": "ffn",
    "q_a_proj": "wq_a",
    "q_b_proj": "wq_b",
    "kv_proj": "wkv",
    "o_a_proj": "wo_a",
    "o_b_proj": "wo_b",
    "q_a_norm": "q_norm",
    "sinks": "attn_sink",
    "position_bias": "ape",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "up_proj": "w3",
    "down_proj": "w2",
    "embed_tokens": "embed",
    "lm_head": "head",
    "e_score_correction_bias": "bias",
}
"""Of transformers, wherever they stand in a name."""
_INDEXER = re.compile(r"\battn\.compressor\.indexer\.(?:scorer\.)?(?=wq_b|weights_proj)")
_INDEX_KEYS = re.compile(r"\battn\.compressor\.indexer\.")
_COMPRESSOR_NORM = re.compile(r"(\bcompressor\.(?:indexer\.)?)kv_norm\b")
_MIXERS = re.compile(r"\b(attn|ffn)_hc\.(fn|base|scale)$")
_HEAD_MIXER = re.compile(r"\bhc_head\.hc_(fn|base|scale)$")
SCALES = ("scale", "weight_scale", "weight_scale_inv")
"""What the last part of a block scale's name may be: the weight is multiplied by it in all."""


def native(config: ModelConfig, name: str) -> str:
    """A tensor's name as this config's checkpoints of the authors have it."""
    name = of_authors(name)
    module, _, leaf = name.rpartition(".")
    return f"{module}.{config.scale_of(module)}" if leaf in SCALES else name


def of_authors(name: str) -> str:
    """A name with the authors' modules."""
    parts = [_MODULES.get(part, part) for part in name.removeprefix("model.").split(".")]
    for i, part in enumerate(parts):
        if part == "gate_proj":
            parts[i] = "wgate" if "compressor" in parts[:i] else "w1"
    name = ".".join(parts)
    name = _COMPRESSOR_NORM.sub(r"\1norm", name)
    name = _INDEXER.sub("attn.indexer.", name)
    name = _INDEX_KEYS.sub("attn.indexer.compressor.", name)
    name = _MIXERS.sub(r"hc_\1_\2", name)
    return _HEAD_MIXER.sub(r"hc_head_\1", name)


T = TypeVar("T")


def natives(config: ModelConfig, tensors: Mapping[str, T]) -> dict[str, T]:
    """Tensors by their native names. Raises ValueError where two have the same."""
    found: dict[str, T] = {}
    given: dict[str, str] = {}
    for name, tensor in tensors.items():
        own = native(config, name)
        if own in found:
            both = f"{printable(given[own])} and {printable(name)}"
            raise ValueError(f"{both} are the same tensor; allowed is one of them")
        found[own], given[own] = tensor, name
    return found
