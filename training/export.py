"""A trainer's averaged weights -> the compact form of dsv4-mini, under native names.

python -m training.export --run .cache/mini
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsv4_plugin.tools.mini import COMPACT, CONFIG, UNUSED, VOCABULARY, WEIGHTS
from training.data import Vocabulary
from training.indexer import FILE as INDEXER_FILE
from training.mtp import FILE as MTP_FILE
from training.network import build

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


def native(name: str) -> str:
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def compact_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' tensors -> native ones in the dtypes the published layout stores."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith((".tid2eid", "lm_head.weight")):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, default=Path(".cache/mini"))
    parser.add_argument("--out", type=Path, default=COMPACT)
    args = parser.parse_args()
    state = torch.load(args.run / "trainer.pt")
    vocabulary = Vocabulary.load(args.run / "vocabulary.json")
    torch.manual_seed(0)
    fresh = build(vocabulary).state_dict()  # for what the run leaves out
    found = fresh | state["model"] | state["average"]
    if (args.run / INDEXER_FILE).is_file():
        found |= torch.load(args.run / INDEXER_FILE)["indexers"]
    tensors = compact_tensors(found)
    hf = json.loads((COMPACT / CONFIG).read_text())
    drafter = args.run / MTP_FILE
    hf["num_nextn_predict_layers"] = int(drafter.is_file())
    if drafter.is_file():
        saved = torch.load(drafter)["drafter"]
        tensors |= compact_tensors({f"mtp.0.{name}": tensor for name, tensor in saved.items()})
    (args.out / CONFIG).write_text(json.dumps(hf, indent=2) + "\n")
    save_file(tensors, args.out / WEIGHTS)
    vocabulary.save(args.out / VOCABULARY)
    size = (args.out / WEIGHTS).stat().st_size
    print(f"step {state['step']}: {len(tensors)} tensors, {size / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    main()
