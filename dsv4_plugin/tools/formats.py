"""The published variants: what their config.json says, and weights packed as they pack them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dsv4_plugin.checkpoint.names import EXPERT, Shape, stored_as
from dsv4_plugin.config import CT, FP8_BLOCK, HF_QUANT, INT4, INT4_BLOCKS, Experts, ModelConfig
from dsv4_plugin.quant.e2m1 import nvfp4_global_scale, quantise_mxfp4, quantise_nvfp4
from dsv4_plugin.quant.e4m3 import decode_ue8m0, quantise_e4m3_blocks
from dsv4_plugin.quant.int4 import GPTQ_ZEROS, quantise_int4, to_gptq

FP8: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}
NOISE_TOKEN = 128799
VISION: dict[str, Any] = {
    "num_nextn_predict_layers": 3,
    "rms_norm_eps": 1e-20,
    "vision_n_layers": 2,
    "vision_dim": 32,
    "vision_n_heads": 2,
    "vision_inter_dim": 64,
    "vision_patch_size": 14,
    "vision_rope_theta": 10000,
    "vision_downsample_ratio": 3,
    "vision_max_n_token": 384,
    "vision_min_pixels": 147456,
    "vision_max_wh_ratio": 8,
}
"""With a small tower: nothing here computes it."""
FORMATS = ("bf16", "fp8-fp4", "base", "nvfp4", "0731", "vision", "ct-nvfp4", "ct-w4a16", "gptq")
TORCH_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
}
"""As which raw bytes are written."""


def format_fields(fmt: str, hf: dict[str, Any]) -> dict[str, Any]:
    """config.json of an unquantised model -> the fields that make it a variant of that format.

    Raises ValueError for an unknown format.
    """
    if fmt not in FORMATS:
        raise ValueError(f"format is {fmt!r}; allowed are {', '.join(FORMATS)}")
    if fmt == "bf16":
        return {}
    if fmt == "gptq":
        return {"quantization_config": gptq(hf)}
    if fmt.startswith("ct-"):
        return {"quantization_config": compressed(fmt, hf)}
    fields = {"expert_dtype": "fp8" if fmt == "base" else "fp4", "quantization_config": FP8}
    if fmt == "nvfp4":
        layers = {
            f"layers.{i}.ffn.experts": {"group_size": 16, "quant_algo": "NVFP4"}
            for i in range(hf["num_hidden_layers"])
        }
        nvfp4 = {"moe_quant_algo": "NVFP4", "quant_algo": "MIXED_PRECISION", "group_size": 16}
        fields["quantization_config"] = FP8 | nvfp4 | {"quantized_layers": layers}
    if fmt in ("0731", "vision"):
        fields |= dspark_fields(hf)
    if fmt == "vision":
        fields |= VISION
    return fields


def dspark_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """What config.json of 0731 says of its drafter, for a model of any size."""
    n = hf["num_hidden_layers"]
    return {
        "compress_ratios": [*hf["compress_ratios"][:n], 0, 0, 0],
        "dspark_block_size": 5,
        "dspark_markov_rank": 256,
        "dspark_noise_token_id": min(NOISE_TOKEN, hf["vocab_size"] - 1),
        "dspark_target_layer_ids": list(range(max(0, n - 3), n)),
        "num_nextn_predict_layers": 1,
    }


def compressed(fmt: str, hf: dict[str, Any]) -> dict[str, Any]:
    """What llm-compressor writes: FP8 attention, experts of 4 bits, the rest in bfloat16."""
    both = {"symmetric": True, "dynamic": False}
    fp8 = {"num_bits": 8, "type": "float", "strategy": "block"}
    inputs = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128}
    block = int4_block(hf["hidden_size"], hf["moe_intermediate_size"])
    experts = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    if fmt == "ct-w4a16":
        experts = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": block}
    return {
        "quant_method": CT,
        "format": "mixed-precision",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ["lm_head", "re:.*mtp.*"],
        "config_groups": {
            "group_0": {
                "format": "float-quantized",
                "targets": [r"re:.*attn\.(wq_a|wq_b|wkv|wo_a|wo_b)$"],
                "weights": fp8 | both | {"block_structure": [FP8_BLOCK, FP8_BLOCK]},
                "input_activations": inputs | {"symmetric": True, "dynamic": True},
            },
            "group_1": {
                "format": "pack-quantized" if fmt == "ct-w4a16" else "nvfp4-pack-quantized",
                "targets": [r"re:.*experts\.\d+\.(w1|w2|w3)$"],
                "weights": experts | both,
                "input_activations": None,
            },
        },
    }


def int4_block(*widths: int) -> int:
    """The largest that cuts no width."""
    return next((b for b in INT4_BLOCKS if not any(n % b for n in widths)), INT4_BLOCKS[-1])


def gptq(hf: dict[str, Any]) -> dict[str, Any]:
    """What AutoRound writes, with everything int4 but draft layers, compressors and indexers."""
    heads = hf["num_attention_heads"] * hf["head_dim"] // hf["o_groups"]
    lora = hf["q_lora_rank"], hf["o_groups"] * hf["o_lora_rank"]
    block = int4_block(hf["hidden_size"], hf["moe_intermediate_size"], heads, *lora)
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": block,
        "sym": True,
        "data_type": "int",
        "extra_config": {},
    }


def exported_files(hf: dict[str, Any]) -> dict[str, Any]:
    """What an exporter writes beside config.json: file name -> content."""
    quantised = hf.get("quantization_config") or {}
    if quantised.get("moe_quant_algo") != "NVFP4":
        return {}
    names = ("quant_algo", "group_size", "quantized_layers")
    return {HF_QUANT: {"quantization": {name: quantised[name] for name in names}}}


def pack(config: ModelConfig, name: str, weight: Tensor) -> dict[str, Tensor]:
    """One parameter of the network as the tensors that a checkpoint of this config stores.

    Args:
        name: of the parameter; weight: its values, float.
    """
    stored = stored_as(config, name, tuple(weight.shape))
    if len(stored) == 1:
        return {name: weight.bfloat16() if stored[name].dtypes == ("BF16",) else weight}
    kind: Experts = "gptq" if config.experts == "gptq" else "fp8"
    if EXPERT.fullmatch(name):
        kind = config.experts_of(name)
    tensors = _int4(kind, weight, config.int4_block) if kind in INT4 else _PACK[kind](weight)
    parts = dict(zip(stored, tensors, strict=True))
    return {part: as_stored(stored[part].dtypes[0], tensor) for part, tensor in parts.items()}


def as_stored(dtype: str, tensor: Tensor) -> Tensor:
    """Raw bytes as the one-byte format of that name; UE8M0 bytes as float32 where asked."""
    if dtype in ("F32", "BF16"):
        values = decode_ue8m0(tensor) if tensor.dtype == torch.uint8 else tensor
        return values.bfloat16() if dtype == "BF16" else values
    if dtype in ("I64", "F16"):
        return tensor
    return tensor.view(TORCH_DTYPES[dtype])


def _nvfp4(weight: Tensor) -> tuple[Tensor, ...]:
    top = nvfp4_global_scale(weight)
    return *quantise_nvfp4(weight, top), top, torch.ones(())  # activations: needs calibration


def _ct_nvfp4(weight: Tensor) -> tuple[Tensor, ...]:
    top = (1 / nvfp4_global_scale(weight)).reshape(1)
    return *quantise_nvfp4(weight, 1 / top), top


def _int4(kind: Experts, weight: Tensor, block: int) -> tuple[Tensor, ...]:
    data, scale = quantise_int4(weight, block)
    return _stored_int4(kind, data, scale)


def _stored_int4(kind: Experts, data: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """Bytes [out, in / 2] and scales [out, in / block] -> tensors in the order of `stored_as`."""
    n_out, n_in = len(data), 2 * data.shape[1]
    if kind == "w4a16":
        return data, scale, torch.tensor([n_out, n_in])
    zeros = torch.full((scale.shape[1], n_out // 8), GPTQ_ZEROS[0], dtype=torch.int32)
    return to_gptq(data), zeros, scale.t().half().contiguous()


_PACK: dict[Experts, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "fp8": quantise_e4m3_blocks,
    "fp4": quantise_mxfp4,
    "nvfp4": _nvfp4,
    "ct-nvfp4": _ct_nvfp4,
}
"""Weight [out, in] -> its tensors in the order of `stored_as`."""


def random_expert(
    config: ModelConfig, name: str, shape: Shape, generator: torch.Generator
) -> dict[str, Tensor]:
    """A routed expert's matrix of 4-bit codes drawn as they are: rounding a thousand experts of
    the real width takes minutes. Values have the standard deviation in^-0.5, as other weights."""
    stored = stored_as(config, name, shape)
    n_in = shape[1]
    shapes = {part: s.shape for part, s in stored.items()}
    unit = n_in**-0.5 / E2M1_STD

    def byte(part: str, low: int, high: int) -> Tensor:
        bytes_ = torch.randint(low, high, shapes[part], generator=generator, dtype=torch.uint8)
        return as_stored(stored[part].dtypes[0], bytes_)

    module = name.removesuffix(".weight")
    kind = config.experts_of(name)
    if kind in INT4:
        data = torch.randint(0, 256, (shape[0], n_in // 2), generator=generator, dtype=torch.uint8)
        spread = 0.5 + torch.rand(shape[0], n_in // config.int4_block, generator=generator)
        tensors = _stored_int4(kind, data, n_in**-0.5 / INT4_STD * spread)
        parts = zip(stored.items(), tensors, strict=True)
        return {part: as_stored(s.dtypes[0], tensor) for (part, s), tensor in parts}
    if kind == "ct-nvfp4":
        packed, scale = f"{module}.weight_packed", f"{module}.weight_scale"
        top = torch.tensor([64 / unit])
        return {
            packed: byte(packed, 0, 256),
            scale: byte(scale, 0x60, 0x70),
            f"{module}.weight_global_scale": top,
        }
    out = {name: byte(name, 0, 256)}
    if config.experts_of(name) == "fp4":
        exponent = 127 + round(torch.tensor(unit).log2().item())
        return out | {f"{module}.scale": byte(f"{module}.scale", exponent - 1, exponent + 1)}
    return out | {
        f"{module}.weight_scale": byte(f"{module}.weight_scale", 0x60, 0x70),  # 32 to 120
        f"{module}.weight_scale_2": torch.tensor(unit / 64),
        f"{module}.input_scale": torch.ones(()),
    }


INT4_STD = 4.6
"""Of -8 .. 7, equally likely."""
E2M1_STD = 2.9
"""Of e2m1 values whose codes are equally likely."""
