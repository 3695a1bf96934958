"""One frozen configuration, read once from a Hugging Face `config.json`.

Both spellings in circulation are read: the published one (`compress_ratios`, `num_hash_layers`,
`rope_scaling`) and the one `transformers` saves (`layer_types`, `mlp_layer_types`,
`compress_rates`, `rope_parameters`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

Generation = Literal["april", "0731"]
"""Of a checkpoint: they were trained with different effort texts."""

Experts = Literal["plain", "fp4", "fp8", "nvfp4"]
"""How a checkpoint stores its routed experts. Where they are not plain (bfloat16 or float32), the
other large products are FP8."""

FP8_BLOCK = 128
"""Rows and columns of a block of an FP8 weight that share a scale."""
FP4_BLOCKS = {"fp4": 32, "nvfp4": 16}
"""Values along the input dim that share a scale in an FP4 weight."""
HF_QUANT = "hf_quant_config.json"
"""Where an exporter says NVFP4 if config.json does not."""

SWA, CSA, HCA = 0, 4, 128
"""The layer kinds, named by their compress ratio (tokens per compressed KV entry)."""

ARCHITECTURE = "DeepseekV4ForCausalLM"
_LAYER_TYPES = {
    "sliding_attention": SWA,
    "compressed_sparse_attention": CSA,
    "heavily_compressed_attention": HCA,
}


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension of the compressed layers' RoPE (no mscale)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of a checkpoint, under the authors' names."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    max_position_embeddings: int
    yarn: Yarn | None
    n_shared_experts: int = 1
    num_nextn_predict_layers: int = 0
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    bos_token_id: int = 0
    eos_token_id: int = 1
    torch_dtype: str = "bfloat16"
    experts: Experts = "plain"
    generation: Generation = "april"

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> ModelConfig:
        """Read `DIR/config.json`. Raises ValueError or FileNotFoundError in one sentence."""
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; a checkpoint folder needs a config.json"
            )
        beside = Path(directory) / HF_QUANT
        exported = json.loads(beside.read_text()) if beside.is_file() else {}
        return cls.from_hf(with_exported(json.loads(path.read_text()), exported))

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Build from the parsed config.json. Raises ValueError naming the field at fault."""
        model_type = hf.get("model_type")
        if model_type != "deepseek_v4":
            raise ValueError(
                f"model_type is {model_type!r}; this package serves 'deepseek_v4' only"
            )
        values: dict[str, Any] = {
            f.name: hf[f.name] for f in fields(cls) if hf.get(f.name) is not None
        }
        values |= {
            "qk_rope_head_dim": _rope_head_dim(hf),
            "compress_ratios": _compress_ratios(hf),
            "num_hash_layers": _num_hash_layers(hf),
            "yarn": _yarn(hf),
            "torch_dtype": hf.get("torch_dtype") or hf.get("dtype") or "bfloat16",
            "experts": _experts(hf),
            "generation": generation_of(hf),
        } | _rope_thetas(hf)
        missing = [n for n in _REQUIRED if n not in values]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        config = cls(**values)
        config._validate()
        return config

    def is_fp8(self, module: str) -> bool:
        """Does a quantised checkpoint store this linear (its name without `.weight`) as FP8?"""
        *path, leaf = module.split(".")
        return self.experts != "plain" and leaf in _FP8_LINEARS and path[-1:] != ["compressor"]

    def experts_of(self, module: str) -> Experts:
        """How the experts of a layer are stored: NVFP4 is of the main layers only."""
        return "fp4" if self.experts == "nvfp4" and module.startswith("mtp.") else self.experts

    def _validate(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be a positive integer")
        for name in ("hidden_size", "moe_intermediate_size"):
            if getattr(self, name) % 8:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a multiple of 8")
        self._validate_blocks()
        for layer, ratio in enumerate(self.compress_ratios):
            if ratio not in (SWA, CSA, HCA):
                raise ValueError(
                    f"compress_ratios[{layer}] is {ratio!r}; allowed are {SWA}, {CSA} and {HCA}"
                )
        if len(self.compress_ratios) != self.num_hidden_layers:
            raise ValueError(
                f"compress_ratios has {len(self.compress_ratios)} entries; "
                f"num_hidden_layers asks for at least {self.num_hidden_layers}"
            )
        if self.num_attention_heads % self.o_groups:
            raise ValueError(
                f"o_groups is {self.o_groups}; it must divide num_attention_heads "
                f"({self.num_attention_heads})"
            )
        if self.qk_rope_head_dim % 2 or not 0 < self.qk_rope_head_dim <= self.index_head_dim:
            raise ValueError(
                f"qk_rope_head_dim is {self.qk_rope_head_dim}; it must be even and at most "
                f"index_head_dim ({self.index_head_dim})"
            )
        if self.qk_rope_head_dim >= self.head_dim:
            raise ValueError(
                f"head_dim is {self.head_dim}; it must exceed "
                f"qk_rope_head_dim ({self.qk_rope_head_dim})"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}; "
                f"n_routed_experts is only {self.n_routed_experts}"
            )

    def _validate_blocks(self) -> None:
        block = FP4_BLOCKS.get(self.experts, 1)
        for name in ("hidden_size", "moe_intermediate_size"):
            if getattr(self, name) % block:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; {self.experts} experts have a scale per "
                    f"{block} values, so it must be a multiple of {block}"
                )

    def require_tensor_parallel(self, size: int) -> None:
        """Raise ValueError unless `size` ranks can share the heads and expert widths evenly."""
        for name in ("num_attention_heads", "moe_intermediate_size"):
            if getattr(self, name) % size:
                raise ValueError(
                    f"tensor_parallel_size is {size}; it must divide {name} ({getattr(self, name)})"
                )

    def with_mtp_layer(self) -> ModelConfig:
        """With the MTP layer (no compression, biased gate) as layer number num_hidden_layers.

        Raises ValueError where the checkpoint has none that can be used.
        """
        if self.generation == "0731":
            raise ValueError(
                "this 0731 checkpoint drafts with DSpark, which is not supported; "
                "MTP is what April checkpoints have: serve it without speculative decoding"
            )
        if self.num_nextn_predict_layers != 1:
            raise ValueError(
                f"num_nextn_predict_layers is {self.num_nextn_predict_layers}; "
                "MTP needs a checkpoint that has 1"
            )
        return replace(self, compress_ratios=(*self.compress_ratios, SWA))

    def require_expert_parallel(self, size: int) -> None:
        """Raise ValueError unless `size` ranks can hold the same number of experts each."""
        if self.n_routed_experts % size:
            raise ValueError(
                f"expert parallelism over {size} ranks needs n_routed_experts "
                f"({self.n_routed_experts}) to be a multiple of {size}"
            )


_FP8_LINEARS = frozenset(
    ["wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3", "e_proj", "h_proj", "main_proj"]
)
_REQUIRED = [f.name for f in fields(ModelConfig) if f.default is MISSING]
_POSITIVE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "n_shared_experts",
    "hc_mult",
    "hc_sinkhorn_iters",
    "max_position_embeddings",
)


def generation_of(hf: Mapping[str, Any]) -> Generation:
    """The generation by config.json: 0731 brought the `dspark_*` fields."""
    return "0731" if any(key.startswith("dspark_") for key in hf) else "april"


def with_exported(hf: Mapping[str, Any], exported: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, completed by what only hf_quant_config.json says (empty where there is none).

    Raises ValueError where that names another format than NVFP4.
    """
    asked = hf.get("quantization_config") or {}
    layers = (exported.get("quantization") or {}).get("quantized_layers") or {}
    algos = {layer.get("quant_algo") for layer in layers.values()}
    if not algos or "moe_quant_algo" in asked:
        return dict(hf)
    if algos != {"NVFP4"}:
        raise ValueError(
            f"{HF_QUANT}: quantized_layers has {sorted(map(str, algos))}; allowed is 'NVFP4'"
        )
    return dict(hf) | {"quantization_config": {**asked, "moe_quant_algo": "NVFP4"}}


def _experts(hf: Mapping[str, Any]) -> Experts:
    """The variant, from `quantization_config` and `expert_dtype`."""
    asked = hf.get("quantization_config")
    if not asked:
        return "plain"
    for field, allowed in _QUANTISATION.items():
        if asked.get(field, allowed) != allowed:
            raise ValueError(
                f"quantization_config.{field} is {asked[field]!r}; allowed is {allowed!r}"
            )
    if "quant_method" not in asked:
        raise ValueError("quantization_config lacks quant_method; allowed is 'fp8'")
    algo = asked.get("moe_quant_algo")
    if algo not in (None, "NVFP4"):
        raise ValueError(f"quantization_config.moe_quant_algo is {algo!r}; allowed is 'NVFP4'")
    dtype = hf.get("expert_dtype") or "fp4"  # the first release does not say
    if dtype not in ("fp4", "fp8"):
        raise ValueError(f"expert_dtype is {dtype!r}; allowed are 'fp4' and 'fp8'")
    if algo == "NVFP4" and dtype != "fp4":
        raise ValueError(f"expert_dtype is {dtype!r}; NVFP4 experts are 'fp4'")
    if algo:
        return "nvfp4"
    return "fp8" if dtype == "fp8" else "fp4"


_QUANTISATION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
}
"""Fields of `quantization_config`, and the one value of each that is supported."""


def _rope_head_dim(hf: Mapping[str, Any]) -> int:
    if "qk_rope_head_dim" in hf:
        return int(hf["qk_rope_head_dim"])
    return int(hf.get("partial_rotary_factor", 64 / 512) * hf.get("head_dim", 512))


def _compress_ratios(hf: Mapping[str, Any]) -> tuple[int, ...]:
    """One ratio per main layer; the published list goes on with the MTP layers' entries."""
    n = hf.get("num_hidden_layers", 0)
    if hf.get("compress_ratios") is not None:
        return tuple(hf["compress_ratios"][:n])
    if hf.get("layer_types") is None:
        raise ValueError("config.json lacks compress_ratios (or layer_types)")
    rates = hf.get("compress_rates") or {}
    unknown = sorted(set(hf["layer_types"]) - set(_LAYER_TYPES))
    if unknown:
        raise ValueError(f"layer_types has {unknown}; allowed are {sorted(_LAYER_TYPES)}")
    return tuple(rates.get(kind, _LAYER_TYPES[kind]) for kind in hf["layer_types"][:n])


def _num_hash_layers(hf: Mapping[str, Any]) -> int:
    if hf.get("num_hash_layers") is not None:
        return int(hf["num_hash_layers"])
    kinds = list(hf.get("mlp_layer_types") or ["hash_moe"] * 3)
    n = kinds.count("hash_moe")
    if "hash_moe" in kinds[n:]:
        raise ValueError("mlp_layer_types has a hash_moe layer after a moe layer; hash layers lead")
    return n


def _yarn(hf: Mapping[str, Any]) -> Yarn | None:
    nested = hf.get("rope_parameters") or {}
    scaling = hf.get("rope_scaling") or nested.get("compress") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"rope_scaling type is {kind!r}; allowed are 'yarn' and none")
    return Yarn(
        factor=float(scaling["factor"]),
        original_max_position_embeddings=int(scaling["original_max_position_embeddings"]),
        beta_fast=float(scaling.get("beta_fast", 32)),
        beta_slow=float(scaling.get("beta_slow", 1)),
    )


def _rope_thetas(hf: Mapping[str, Any]) -> dict[str, float]:
    nested = hf.get("rope_parameters") or {}
    found = {
        "rope_theta": hf.get("rope_theta") or (nested.get("main") or {}).get("rope_theta"),
        "compress_rope_theta": hf.get("compress_rope_theta")
        or (nested.get("compress") or {}).get("rope_theta"),
    }
    return {name: float(theta) for name, theta in found.items() if theta is not None}
