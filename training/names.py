"""transformers' tensors of dsv4-mini and the native ones they are stored as."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from dsv4_plugin.tools.mini import UNUSED

NAMES = (
    (r"^model\.", ""),
    (r"^unused$", UNUSED),
    (r"^embed_tokens\.", "embed."),
    (r"^(mtp\.0\.)block\.", r"\1"),
    (r"(^|\.)hc_head\.hc_", r"\1hc_head_"),
    (r"\.(attn|ffn)_hc\.", r".hc_\1_"),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.self_attn\.", ".attn."),
    (r"\.mlp\.", ".ffn."),
    (r"\.compressor\.indexer\.(q_b_proj|scorer)", r".indexer.\1"),
    (r"\.compressor\.indexer\.", ".indexer.compressor."),
    (r"\.scorer\.", "."),
    (r"\.sinks$", ".attn_sink"),
    (r"\.position_bias$", ".ape"),
    (r"\.e_score_correction_bias$", ".bias"),
    (r"(compressor)\.kv_norm\.", r"\1.norm."),
    (r"\.q_a_proj\.", ".wq_a."),
    (r"\.q_a_norm\.", ".q_norm."),
    (r"\.q_b_proj\.", ".wq_b."),
    (r"\.kv_proj\.", ".wkv."),
    (r"(compressor)\.gate_proj\.", r"\1.wgate."),
    (r"\.o_a_proj\.", ".wo_a."),
    (r"\.o_b_proj\.", ".wo_b."),
    (r"(shared_experts)\.gate_proj\.", r"\1.w1."),
    (r"(shared_experts)\.down_proj\.", r"\1.w2."),
    (r"(shared_experts)\.up_proj\.", r"\1.w3."),
)
"""transformers' names, by these in order, are the native ones."""
_FLOAT32 = re.compile(r"(hc_\w+|ape|attn_sink|bias)$")
_LEFT_OUT = (".tid2eid", "lm_head.weight")
"""A rule makes the one; the other is the embedding."""


def native(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def compact_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors -> native ones in the dtypes the published layout stores."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(_LEFT_OUT):
            continue
        if name.endswith("experts.gate_up_proj"):
            for e, (w1, w3) in enumerate(part.chunk(2) for part in tensor):
                stem = native(name.removesuffix("gate_up_proj"))
                found |= {f"{stem}{e}.w1.weight": w1, f"{stem}{e}.w3.weight": w3}
        elif name.endswith("experts.down_proj"):
            stem = native(name.removesuffix("down_proj"))
            found |= {f"{stem}{e}.w2.weight": w2 for e, w2 in enumerate(tensor)}
        else:
            found[native(name)] = tensor
    return {
        name: tensor.to(torch.float32 if _FLOAT32.search(name) else torch.bfloat16).contiguous()
        for name, tensor in found.items()
    }


@torch.no_grad()
def restore(state: dict[str, Tensor], compact: dict[str, Tensor]) -> None:
    """Give transformers' modules, whose `state` it is, what `compact_tensors` made of it."""
    for name, tensor in state.items():
        if name.endswith(_LEFT_OUT):
            continue
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stem, kind = name.rsplit(".", 1)
            parts = ("w1", "w3") if kind == "gate_up_proj" else ("w2",)
            for e, expert in enumerate(tensor):
                found = [compact[f"{native(stem)}.{e}.{part}.weight"] for part in parts]
                expert.copy_(torch.cat(found))
        else:
            tensor.copy_(compact[native(name)])
