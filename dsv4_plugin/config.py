"""One frozen configuration, read once from a Hugging Face `config.json`.

Both spellings in circulation are read: the published one (`compress_ratios`, `num_hash_layers`,
`rope_scaling`) and the one `transformers` saves (`layer_types`, `mlp_layer_types`,
`compress_rates`, `rope_parameters`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from dsv4_plugin.fields import Each, Only, Table, Unread, Whole, check_fields
from dsv4_plugin.json_file import as_object, read_object, shown

Generation = Literal["april", "0731", "v4.1"]
"""Of a checkpoint: they were trained with different prompts (V4.1's network is not served)."""

Experts = Literal["plain", "fp4", "fp8", "nvfp4", "ct-nvfp4", "w4a16", "gptq"]
"""How a checkpoint stores its routed experts; of compressed-tensors: ct-nvfp4 and w4a16, of GPTQ
and AutoRound: gptq. Where they are not plain (bfloat16 or float32), the other large products are
FP8, all or only attention's; of gptq each is int4 or plain."""

FP8_BLOCK = 128
"""Rows and columns of a block of an FP8 weight that share a scale."""
FP4_BLOCKS = {"fp4": 32, "nvfp4": 16, "ct-nvfp4": 16}
"""Values along the input dim that share a scale in an FP4 weight."""
INT4_BLOCKS = (128, 64, 32)
"""The same in an int4 weight: the config says which."""
INT4 = ("w4a16", "gptq")
COMPRESSED = ("ct-nvfp4", "w4a16")
"""Of compressed-tensors: draft layers and everything beside attention and experts is plain."""
CONFIG = "config.json"
HF_QUANT = "hf_quant_config.json"
"""Where an exporter says NVFP4 if config.json does not."""

SWA, CSA, HCA = 0, 4, 128
"""The layer kinds, named by their compress ratio (tokens per compressed KV entry)."""

ARCHITECTURE = "DeepseekV4ForCausalLM"
V41, V41_ARCHITECTURE = "deepseek_v41", "DeepseekV41ForCausalLM"
V41_REFUSED = (
    f"model_type is {V41!r}: DeepSeek-V4.1 is another network (Engram tables, two-level indexer; "
    "510 GB of weights), which this package does not serve; it serves 'deepseek_v4'"
)
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
class DSpark:
    """The block drafter of 0731: `block_size` tokens at once, after the streams behind layers
    `target_layer_ids`. How many stages it has, only the checkpoint's tensors say."""

    block_size: int
    noise_token_id: int
    target_layer_ids: tuple[int, ...]
    markov_rank: int
    stages: int = 3


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
    compress_ratios: tuple[int, ...]
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    max_position_embeddings: int
    yarn: Yarn | None
    sliding_window: int = 128
    n_shared_experts: int = 1
    num_nextn_predict_layers: int = 0
    vision_n_layers: int = 0
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
    int4_block: int = 128
    int4_modules: frozenset[str] | None = None
    fp8_attention: bool = True
    rounds_fp8_inputs: bool = True
    generation: Generation = "april"
    dspark: DSpark | None = None

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> ModelConfig:
        """Read `DIR/config.json`. Raises ValueError or FileNotFoundError in one sentence."""
        path = Path(directory) / CONFIG
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; a checkpoint folder needs a config.json"
            )
        beside = Path(directory) / HF_QUANT
        return cls.from_hf(read_hf(path, beside if beside.is_file() else None))

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Build from the parsed config.json. Raises ValueError naming the field at fault."""
        model_type = as_object(hf, CONFIG).get("model_type")
        if model_type == V41:
            raise NotImplementedError(V41_REFUSED)
        if model_type != "deepseek_v4":
            raise ValueError(
                f"model_type is {shown(model_type)}; this package serves 'deepseek_v4' only"
            )
        check_fields(hf, FIELDS)
        found = as_published(hf)
        values = {f.name: found[f.name] for f in fields(cls) if found.get(f.name) is not None} | {
            "yarn": _yarn(found),
            "compress_ratios": _compress_ratios(found),
            **_experts(found),
            "generation": generation_of(found),
        }
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise ValueError(f"{CONFIG} lacks {', '.join(missing)}")
        config = cls(**values)
        for name, holds, must in config._relations():
            if not holds:
                raise ValueError(f"{name} is {getattr(config, name)}; it must {must}")
        return replace(config, dspark=_dspark(found, config))

    def _relations(self) -> Iterator[tuple[str, bool, str]]:
        """What fields ask of each other: a field, whether it holds, and what it must do."""
        c, block = self, self.block_of(self.experts)
        per = f"be a multiple of {block}: {c.experts} experts have a scale per {block} values"
        yield "hidden_size", c.hidden_size % block == 0, per
        yield "moe_intermediate_size", c.moe_intermediate_size % block == 0, per
        yield (
            "o_groups",
            c.num_attention_heads % c.o_groups == 0,
            f"divide num_attention_heads ({c.num_attention_heads})",
        )
        yield (
            "qk_rope_head_dim",
            c.qk_rope_head_dim <= c.index_head_dim,
            f"be at most index_head_dim ({c.index_head_dim})",
        )
        yield (
            "head_dim",
            c.head_dim > c.qk_rope_head_dim,
            f"exceed qk_rope_head_dim ({c.qk_rope_head_dim})",
        )
        yield (
            "num_experts_per_tok",
            c.num_experts_per_tok <= c.n_routed_experts,
            f"be at most n_routed_experts ({c.n_routed_experts})",
        )
        yield (
            "num_hash_layers",
            c.num_hash_layers <= c.num_hidden_layers,
            f"be at most num_hidden_layers ({c.num_hidden_layers})",
        )
        yield (
            "n_routed_experts",
            c.n_routed_experts * c.num_hidden_layers <= MOST_EXPERTS,
            f"be at most {MOST_EXPERTS:,} in all {c.num_hidden_layers} layers together",
        )
        for name in ("bos_token_id", "eos_token_id"):
            must = f"be below vocab_size ({c.vocab_size})"
            yield name, getattr(c, name) < c.vocab_size, must

    def is_fp8(self, module: str) -> bool:
        """Does a quantised checkpoint store this linear (its name without `.weight`) as FP8?"""
        *path, leaf = module.split(".")
        if self.experts == "gptq":
            return False
        if self.experts in COMPRESSED:
            return self.fp8_attention and _ATTENTION.fullmatch(module) is not None
        plain = path[:1] in (["vision"], ["aligner"]) or path[-1:] == ["compressor"]
        return self.experts != "plain" and leaf in _FP8_LINEARS and not plain

    def is_int4(self, module: str) -> bool:
        """Does a checkpoint of GPTQ's layout store this linear as int4? Only tensors say; before
        they are known: attention and shared experts of the main layers."""
        if self.experts != "gptq":
            return False
        if self.int4_modules is None:
            return _INT4.fullmatch(module) is not None
        return module in self.int4_modules

    def experts_of(self, module: str) -> Experts:
        """How the experts of a layer are stored: NVFP4 is of the main layers only."""
        if module.startswith("mtp.") and self.experts == "gptq":
            scope = module.partition(".experts")[0]
            return "gptq" if f"{scope}.experts" in (self.int4_modules or ()) else "plain"
        if module.startswith("mtp."):
            draft: dict[Experts, Experts]
            draft = {"nvfp4": "fp4", "ct-nvfp4": "plain", "w4a16": "plain"}
            return draft.get(self.experts, self.experts)
        return self.experts

    def block_of(self, experts: Experts) -> int:
        """Values along the input dim that share a scale, 1 where they do not count."""
        return self.int4_block if experts in INT4 else FP4_BLOCKS.get(experts, 1)

    def scale_of(self, module: str) -> str:
        """The last part of the name of a packed weight's block scales."""
        routed = _ROUTED.search(module) is not None
        own = routed and self.experts_of(module) in ("nvfp4", *COMPRESSED)
        return "weight_scale" if own else "scale"

    def require_tensor_parallel(
        self, size: int, option: str = "the number of tensor-parallel ranks"
    ) -> None:
        """Raise ValueError, which names the option that asked for it, unless `size` ranks can share
        heads, expert widths and vocabulary evenly."""
        for name in ("num_attention_heads", "moe_intermediate_size", "vocab_size"):
            if getattr(self, name) % size:
                raise ValueError(
                    f"{option} is {size}; it must divide {name} ({getattr(self, name)})"
                )

    def require_page_size(self, size: int, option: str = "page_size") -> None:
        """Raise ValueError, which names the option, unless pages of `size` tokens hold whole rows
        of every layer."""
        unit = max(self.compress_ratios) or 1
        if size < 1 or size % unit:
            raise ValueError(f"{option} is {size}; it must be a multiple of {unit}")

    @property
    def draft_layers(self) -> int:
        """Stages of DSpark, or the one layer of MTP."""
        return 1 if self.dspark is None else self.dspark.stages

    def with_draft_layers(self, option: str = "speculative decoding") -> ModelConfig:
        """With the drafter's layers (no compression, biased gates) from number num_hidden_layers.

        Raises ValueError, which names the option, where the checkpoint has none that can be used.
        """
        if self.dspark is None and self.num_nextn_predict_layers != 1:
            raise ValueError(
                f"num_nextn_predict_layers is {self.num_nextn_predict_layers}; "
                f"MTP needs a checkpoint that has 1, so leave {option} out"
            )
        ratios = (*self.compress_ratios, *[SWA] * self.draft_layers)
        return replace(self, compress_ratios=ratios)

    def require_expert_parallel(self, size: int, option: str = "expert parallelism") -> None:
        """Raise ValueError, which names the option, unless each of `size` ranks gets an expert."""
        if self.n_routed_experts < size:
            raise ValueError(
                f"{option} over {size} ranks needs an expert for each; n_routed_experts is "
                f"{self.n_routed_experts}"
            )

    def experts_of_rank(self, rank: int, size: int) -> range:
        """The experts that a rank holds with expert parallelism: as many as others, or one less."""
        n = self.n_routed_experts
        return range(rank * n // size, (rank + 1) * n // size)


_ATTENTION = re.compile(r"layers\.\d+\.attn\.(wq_a|wq_b|wkv|wo_a|wo_b)")
_INT4 = re.compile(r"layers\.\d+\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|ffn\.shared_experts\.w[123])")
_ROUTED = re.compile(r"\.experts\.\d+\.")
_FP8_LINEARS = frozenset(
    ["wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3", "e_proj", "h_proj", "main_proj"]
)
MOST_EXPERTS = 1 << 16
"""Of all layers together (Pro has 23,424): the names of their tensors are kept in memory."""

_LAYERS = 1024
_ROPE = {
    "type": Only("yarn"),
    "rope_type": Only("yarn"),
    "factor": Only(16.0),
    "original_max_position_embeddings": Only(65536),
    "beta_fast": Only(32.0),
    "beta_slow": Only(1.0),
}
_PARTIAL = Only(0.125, 0.25, 0.5)
_SEEN_IN_TENSORS = (
    "config_groups", "group_size", "ignore", "modules_to_not_convert", "producer",
    "quantized_layers",
)  # fmt: skip
"""Which modules are packed, and how, is what their tensors' names, dtypes and shapes say."""
CT = "compressed-tensors"
_ANY = dict.fromkeys(("observer", "observer_kwargs", "scale_dtype", "zp_dtype"), Unread())
_GROUP = Table(
    {
        "format": Only("float-quantized", "nvfp4-pack-quantized", "pack-quantized"),
        "targets": Unread(),
        "output_activations": Only(),
        "weights": Table(
            {
                "num_bits": Only(4, 8),
                "type": Only("float", "int"),
                "strategy": Only("block", "tensor_group", "group"),
                "group_size": Only(16, *INT4_BLOCKS),
                "block_structure": Only([FP8_BLOCK, FP8_BLOCK]),
                "symmetric": Only(True),
                "dynamic": Only(False),
                "actorder": Only("weight", "static"),
            }
            | _ANY
        ),
        "input_activations": Table(
            {
                "num_bits": Only(4, 8),
                "type": Only("float"),
                "strategy": Only("group", "tensor_group"),
                "group_size": Only(16, FP8_BLOCK),
                "block_structure": Only(),
                "symmetric": Only(True),
                "dynamic": Only(True, "local"),
                "actorder": Only(),
            }
            | _ANY
        ),
    }
)
"""A group of quantization_config.config_groups. Its targets are not evaluated: they often miss, and
tensors say themselves what they are."""
_KINDS = {
    "8 float block": "fp8",
    "4 float tensor_group": "ct-nvfp4",
    "4 int group": "w4a16",
}
"""A group's weights, by num_bits, type and strategy."""
GPTQ = ("gptq", "auto-round")
_METHODS = Only("fp8", CT, *GPTQ)
_OF_GPTQ: dict[str, Any] = {
    "bits": Only(4),
    "sym": Only(True),
    "desc_act": Only(False),
    "lm_head": Only(False),
    "data_type": Only("int"),
    "act_bits": Only(16, 32),
    "super_bits": Only(),
    "super_group_size": Only(),
    "static_kv_dtype": Only(),
    "static_attention_dtype": Only(),
    "hadamard_config": Only(),
    "rotation_config": Only(),
    "checkpoint_format": Only("gptq", "gptq_v2"),
    "packing_format": Only("auto_round", "auto_round:auto_gptq", "auto_round:gptqmodel"),
    "pack_dtype": Only("int32"),
}
"""Fields of GPTQ and AutoRound that ask for something."""
_HOW_IT_WAS_MADE = (
    "act_data_type", "act_dynamic", "act_group_size", "act_sym", "amp", "autoround_version",
    "batch_size", "block_name_to_quantize", "damp_percent", "dataset", "dynamic",
    "enable_alg_ext", "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input",
    "extra_config", "gradient_accumulate_steps", "iters", "low_gpu_mem_usage", "lr", "meta",
    "minmax_lr", "model_file_base_name", "model_name_or_path", "nsamples", "quant_block_list",
    "quantizer", "regex_config", "scale_dtype", "seqlen", "static_groups", "supported_types",
    "to_quant_block_names", "true_sequential",
)  # fmt: skip
"""Of GPTQ and AutoRound. What they left as it was (`extra_config`, `dynamic`), tensors say."""
_HARMLESS = (
    # Of training.
    "attention_dropout", "initializer_range", "router_aux_loss_coef", "router_jitter_noise",
    # Stages of the drafter: its tensors say.
    "n_mtp_layers",
    # Of images, which are not read. How many layers there are for them tells Vision-Exp.
    "vision_dim", "vision_n_heads", "vision_inter_dim", "vision_patch_size", "vision_rope_theta",
    "vision_downsample_ratio", "vision_max_n_token", "vision_min_pixels", "vision_max_wh_ratio",
    # Of transformers, and of programs that pass checkpoints on.
    "transformers_version", "use_cache", "pad_token_id", "return_dict", "problem_type",
    "output_router_logits", "output_attentions", "output_hidden_states", "id2label", "label2id",
    "chunk_size_feed_forward", "is_encoder_decoder", "auto_map", "unsloth_version",
    "unsloth_fixed",
)  # fmt: skip
FIELDS = Table(
    {
        # Sizes. Tensors have them too, so that a wrong one is found in a checkpoint's headers.
        "vocab_size": Whole(1, 1 << 20),
        "hidden_size": Whole(8, 1 << 16, unit=8),
        "num_hidden_layers": Whole(1, _LAYERS),
        "num_attention_heads": Whole(1, 1024),
        "head_dim": Whole(8, 4096, unit=8),
        "q_lora_rank": Whole(1, 1 << 16),
        "o_groups": Whole(1, 1024),
        "o_lora_rank": Whole(1, 1 << 16),
        "index_n_heads": Whole(1, 1024),
        "index_head_dim": Only(16, 32, 64, 128, 256),  # a Hadamard matrix has a power of two
        "n_routed_experts": Whole(1, 1 << 13),
        "moe_intermediate_size": Whole(8, 1 << 16, unit=8),
        "num_nextn_predict_layers": Whole(0, 16),
        "vision_n_layers": Whole(0, _LAYERS),
        "compress_ratios": Each(Only(SWA, CSA, HCA), 2 * _LAYERS),
        "num_hash_layers": Whole(0, _LAYERS),
        # No tensor shows these. They differ between published checkpoints and small ones that were
        # made for tests, by the authors' code among others.
        "num_experts_per_tok": Whole(1, 64),
        "index_topk": Whole(1, 1 << 16),
        "qk_rope_head_dim": Only(16, 32, 64),
        "sliding_window": Only(16, 32, 64, 128),
        "swiglu_limit": Only(1.0, 10.0),
        "routed_scaling_factor": Only(1.5, 2.5),
        "max_position_embeddings": Whole(1, 1 << 30),
        "torch_dtype": Only("bfloat16", "float32"),
        "expert_dtype": Only("fp4", "fp8"),
        "bos_token_id": Whole(0, 1 << 20),
        "eos_token_id": Whole(0, 1 << 20),
        # Of the drafter.
        "dspark_block_size": Whole(1, 16),
        "dspark_noise_token_id": Whole(0, 1 << 20),
        "dspark_target_layer_ids": Each(Whole(0, _LAYERS), 16),
        "dspark_markov_rank": Whole(1, 1 << 16),
        # Nor these, and all checkpoints agree: another value is damage, which would show in nothing
        # but worse answers.
        "n_shared_experts": Only(1),
        "hc_mult": Only(4),
        "hc_sinkhorn_iters": Only(20),
        "hc_eps": Only(1e-6),
        "rms_norm_eps": Only(1e-20, 1e-6),  # Vision-Exp's is 1e-20
        "rope_theta": Only(10000.0),
        "compress_rope_theta": Only(160000.0),
        "rope_scaling": Table(_ROPE),
        # What the network is without asking: another value would be another network.
        "architectures": Each(Only(ARCHITECTURE), 1),
        "model_type": Only("deepseek_v4"),
        "dspark_markov_head_type": Only("vanilla"),
        "confidence_head_with_markov": Only(True),
        "enable_confidence_head": Only(True),
        "sample_from_anchor": Only(True),
        "scoring_func": Only("sqrtsoftplus"),
        "topk_method": Only("noaux_tc"),
        "norm_topk_prob": Only(True),
        "hidden_act": Only("silu"),
        "attention_bias": Only(False),
        "mlp_bias": Only(False),
        "num_key_value_heads": Only(1),
        "tie_word_embeddings": Only(False),
        "quantization_config": Table(
            {
                "quant_method": _METHODS,
                # Of compressed-tensors.
                "format": Only(
                    "mixed-precision", "float-quantized", "nvfp4-pack-quantized", "pack-quantized"
                ),
                "quantization_status": Only("compressed"),
                "kv_cache_scheme": Only(),
                "sparsity_config": Table({}),
                "transform_config": Table({}),
                "global_compression_ratio": Unread(),
                "version": Unread(),
                "fmt": Only("e4m3"),
                "weight_block_size": Only([FP8_BLOCK, FP8_BLOCK]),
                "scale_fmt": Only("ue8m0"),
                "activation_scheme": Only("dynamic"),
                "moe_quant_algo": Only("NVFP4"),
                "quant_algo": Only("MIXED_PRECISION"),
                "kv_cache_quant_algo": Only(),
            }
            | _OF_GPTQ
            | dict.fromkeys(_SEEN_IN_TENSORS + _HOW_IT_WAS_MADE, Unread())
        ),
        # How transformers (5.16 and later) writes some of them.
        "dtype": Only("bfloat16", "float32"),
        "layer_types": Each(Only(*_LAYER_TYPES), _LAYERS),
        "mlp_layer_types": Each(Only("hash_moe", "moe"), _LAYERS),
        "compress_rates": Table({kind: Only(r) for kind, r in _LAYER_TYPES.items()}),
        "partial_rotary_factor": _PARTIAL,
        "rope_parameters": Table(
            {
                "main": Table(
                    {
                        "rope_type": Only("default"),
                        "rope_theta": Only(10000.0),
                        "partial_rotary_factor": _PARTIAL,
                    }
                ),
                "compress": Table(
                    _ROPE
                    | {
                        "rope_theta": Only(160000.0),
                        "attention_factor": Only(1.0),
                        "partial_rotary_factor": _PARTIAL,
                    }
                ),
            }
        ),
    }
    | dict.fromkeys(_HARMLESS, Unread())
)
"""Every field of config.json that is read or known to be harmless, and what it may be."""


def generation_of(hf: Mapping[str, Any]) -> Generation:
    """The generation by config.json: 0731 brought the `dspark_*` fields."""
    if hf.get("model_type") == V41:
        return "v4.1"
    return "0731" if any(key.startswith("dspark_") for key in hf) else "april"


def read_hf(config: str | Path, exported: str | Path | None) -> dict[str, Any]:
    """config.json, completed by what only hf_quant_config.json says, where there is one.

    Raises ValueError where that names another format than NVFP4, or a file is not JSON.
    """
    hf = read_object(config)
    beside = {} if exported is None else read_object(exported)
    asked = as_object(hf.get("quantization_config") or {}, "quantization_config")
    quantization = as_object(beside.get("quantization") or {}, f"{HF_QUANT}: quantization")
    name = f"{HF_QUANT}: quantized_layers"
    layers = as_object(quantization.get("quantized_layers") or {}, name)
    for layer, how in layers.items():
        algo = as_object(how, f"{name}.{layer}").get("quant_algo")
        if algo != "NVFP4":
            raise ValueError(f"{name}.{layer} is {shown(algo)}; allowed is 'NVFP4'")
    if not layers or "moe_quant_algo" in asked:
        return hf
    return hf | {"quantization_config": {**asked, "moe_quant_algo": "NVFP4"}}


def as_published(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Checked fields under the published names, where transformers wrote its own; none is null.

    Raises ValueError where a field is missing that all have, or where two say different things.
    """
    found = {name: value for name, value in hf.items() if value is not None}
    saved = {
        "rope_scaling": ("rope_parameters", found.get("rope_parameters", {}).get("compress")),
        "torch_dtype": ("dtype", found.get("dtype")),
        "compress_ratios": ("layer_types", _ratios(found.get("layer_types"))),
        "num_hash_layers": ("mlp_layer_types", _hash_layers(found.get("mlp_layer_types"))),
        "qk_rope_head_dim": ("partial_rotary_factor", _rope_head_dim(found)),
    }
    for name, (other, value) in saved.items():
        said = found.get(name, value)
        if said is not None:
            found[name] = said
        # Constants of rope_scaling cannot differ; ratios go on with those of draft layers.
        n = len(value) if isinstance(value, list) else None
        if value is not None and name != "rope_scaling" and (said[:n] if n else said) != value:
            raise ValueError(f"{name} is {shown(said)}, but {other} makes it {shown(value)}")
    return found


def _ratios(kinds: list[str] | None) -> list[int] | None:
    return None if kinds is None else [_LAYER_TYPES[kind] for kind in kinds]


def _hash_layers(kinds: list[str] | None) -> int | None:
    if kinds is None:
        return None
    n = kinds.count("hash_moe")
    if "hash_moe" in kinds[n:]:
        raise ValueError("mlp_layer_types has a hash_moe layer after a moe layer; hash layers lead")
    return n


def _rope_head_dim(found: Mapping[str, Any]) -> int | None:
    factor, dim = found.get("partial_rotary_factor"), found.get("head_dim")
    return None if factor is None or dim is None else int(factor * dim)


def _compress_ratios(found: Mapping[str, Any]) -> tuple[int, ...]:
    """One ratio per main layer; the published list goes on with those of draft layers, all 0."""
    ratios, n = found.get("compress_ratios"), found.get("num_hidden_layers")
    if ratios is None:
        raise ValueError(f"{CONFIG} lacks compress_ratios (or layer_types)")
    if n is None:
        raise ValueError(f"{CONFIG} lacks num_hidden_layers")
    if len(ratios) < n:
        raise ValueError(
            f"compress_ratios has {len(ratios)} entries; num_hidden_layers asks for at least {n}"
        )
    if any(ratios[n:]):
        raise ValueError(
            f"compress_ratios is {ratios[n:]} after the {n} main layers; draft layers have 0"
        )
    return tuple(ratios[:n])


DSPARK_FIELDS = tuple(f"dspark_{f.name}" for f in fields(DSpark) if f.default is MISSING)
"""What a DSpark drafter cannot do without."""


def _dspark(found: Mapping[str, Any], config: ModelConfig) -> DSpark | None:
    if any(name not in found for name in DSPARK_FIELDS):
        return None
    block, noise, targets, rank = (found[name] for name in DSPARK_FIELDS)
    if noise >= config.vocab_size:
        raise ValueError(
            f"dspark_noise_token_id is {noise}; it must be below vocab_size ({config.vocab_size})"
        )
    last = config.num_hidden_layers - 1
    if not targets or targets != sorted({*targets}) or targets[-1] > last:
        raise ValueError(
            f"dspark_target_layer_ids is {shown(targets)}; allowed are ascending layers from 0 to "
            f"{last}, at least one"
        )
    return DSpark(block, noise, tuple(targets), rank)


def _yarn(found: Mapping[str, Any]) -> Yarn:
    scaling = found.get("rope_scaling")
    if scaling is None:
        raise ValueError(f"{CONFIG} lacks rope_scaling (or rope_parameters.compress)")
    said = {name for name, value in scaling.items() if value is not None}
    for needed in ({"type", "rope_type"}, {"factor"}, {"original_max_position_embeddings"}):
        if not needed & said:
            raise ValueError(f"rope_scaling lacks {min(needed)}; {_ROPE[min(needed)]}")
    return Yarn(
        factor=float(scaling["factor"]),
        original_max_position_embeddings=scaling["original_max_position_embeddings"],
        beta_fast=float(scaling.get("beta_fast") or 32),
        beta_slow=float(scaling.get("beta_slow") or 1),
    )


def _experts(found: Mapping[str, Any]) -> dict[str, Any]:
    """The variant, from `quantization_config` and `expert_dtype`: fields of ModelConfig."""
    asked = found.get("quantization_config")
    if not asked:
        return {"experts": "plain"}
    if asked.get("quant_method") is None:
        raise ValueError(f"quantization_config lacks quant_method; {_METHODS}")
    if asked["quant_method"] == CT:
        return _compressed(asked.get("config_groups"))
    if asked["quant_method"] in GPTQ:
        return _gptq(asked)
    return {"experts": _published_experts(found, asked)}


def _gptq(asked: Mapping[str, Any]) -> dict[str, Any]:
    for name, must in (("bits", _OF_GPTQ["bits"]), ("sym", _OF_GPTQ["sym"])):
        if asked.get(name) is None:
            raise ValueError(f"quantization_config lacks {name}; {must}")
    block, must = asked.get("group_size"), Only(*INT4_BLOCKS)
    if not must.permits(block):
        raise ValueError(f"quantization_config.group_size is {shown(block)}; {must}")
    return {"experts": "gptq", "int4_block": block}


def _compressed(groups: Any) -> dict[str, Any]:
    """What compressed-tensors' groups say: of experts, and perhaps of attention."""
    where = "quantization_config.config_groups"
    found: dict[str, Any] = {}
    for name, group in as_object(groups, where).items():
        check_fields(as_object(group, f"{where}.{name}"), _GROUP, f"{where}.{name}.")
        weights = group.get("weights") or {}
        kind = _KINDS.get(" ".join(str(weights.get(k)) for k in ("num_bits", "type", "strategy")))
        size = {"fp8": (None, FP8_BLOCK), "ct-nvfp4": (16,), "w4a16": INT4_BLOCKS}.get(kind or "")
        if kind is None or size is None or weights.get("group_size") not in size:
            raise ValueError(
                f"{where}.{name}.weights is {shown(weights)}; allowed are float of 8 bits in "
                "blocks of 128 x 128, float of 4 bits in tensor groups of 16, and int of 4 bits in "
                "groups of 32, 64 or 128"
            )
        if kind == "fp8" and weights.get("block_structure") is None:
            raise ValueError(f"{where}.{name}.weights lacks block_structure; allowed is [128, 128]")
        if kind in found:
            raise ValueError(f"{where} has two groups of {kind}; allowed is one")
        found[kind] = group
    experts = [kind for kind in found if kind != "fp8"]
    if len(experts) != 1:
        raise ValueError(
            f"{where} has {len(experts)} groups of 4 bits; allowed is one, of the routed experts"
        )
    inputs = found.get("fp8", {}).get("input_activations")
    if inputs and inputs.get("num_bits") != 8:
        raise ValueError(
            f"{where}: inputs of FP8 weights have {inputs.get('num_bits')} bits; allowed are 8"
        )
    block = found["w4a16"]["weights"]["group_size"] if "w4a16" in found else INT4_BLOCKS[0]
    return {
        "experts": experts[0],
        "int4_block": block,
        "fp8_attention": "fp8" in found,
        "rounds_fp8_inputs": bool(inputs),
    }


def _published_experts(found: Mapping[str, Any], asked: Mapping[str, Any]) -> Experts:
    dtype = found.get("expert_dtype", "fp4")  # the first release does not say
    if asked.get("moe_quant_algo") is None:
        return "fp8" if dtype == "fp8" else "fp4"
    if dtype != "fp4":
        raise ValueError(f"expert_dtype is {dtype!r}; NVFP4 experts are 'fp4'")
    return "nvfp4"
