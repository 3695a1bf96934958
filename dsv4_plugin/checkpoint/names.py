"""The tensors of a checkpoint in the native layout: one table of names, shapes and dtypes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsv4_plugin.checkpoint.spelling import of_authors
from dsv4_plugin.config import (
    COMPRESSED,
    CSA,
    DSPARK_FIELDS,
    FP8_BLOCK,
    SWA,
    DSpark,
    Experts,
    ModelConfig,
)

Shape = tuple[int, ...]

EXPERT = re.compile(
    r"(.*\.experts)\.(\d+)\.(w[123](?:\.(?:scale|weight_scale|weight_scale_2|input_scale|"
    r"weight_packed|weight_global_scale|weight_shape|input_global_scale|"
    r"qweight|qzeros|scales|g_idx))?)"
    r"(?:\.weight)?"
)
"""(module, expert, `w1` or what belongs to it, as `w1.scale`)."""
SCALE = re.compile(r".*\.(scale|weight_scale|weight_scale_2|weight_global_scale|scales)")
"""A packed weight's scales."""
_STAGE = re.compile(r"mtp\.(\d{1,3})\.")
ACTIVATION_SCALES = ("input_scale", "input_global_scale")
GATE = ".ffn.gate.weight"
QWEIGHT, G_IDX = ".qweight", ".g_idx"
"""Of GPTQ: a packed weight; which block each input is of, where it is written."""
_UNPACKED = re.compile(
    r"(layers\.\d+\.attn\.(?:(?:indexer\.)?compressor\.(?:wkv|wgate)|"
    r"indexer\.(?:wq_b|weights_proj)))\.(weight|scale|qweight|qzeros|scales|g_idx)"
)
"""(module, tensor) of small products that some exporters pack, and the network holds plain."""
_INT4_LINEAR = re.compile(
    r"(?:layers|mtp)\.\d+\.(?:attn\.(?:wq_a|wq_b|wkv|wo_a|wo_b)|ffn\.shared_experts\.w[123]|"
    r"e_proj|h_proj|main_proj)"
)
_VISION = re.compile(r"(vision|aligner)\..+|image_(start|pad|newline|end)|.*\.ffn\.gate\.bias_vl")
_BIAS = re.compile(r"layers\.(\d+)\.ffn\.gate\.bias")
_HC = re.compile(r"\bhc_(attn|ffn|head)_(fn|base|scale)$")


def parameter_name(name: str) -> str:
    """The module path of a checkpoint tensor (`layers.0.hc_attn_fn` -> `layers.0.hc_attn.fn`)."""
    return _HC.sub(r"hc_\1.\2", name)


@dataclass(frozen=True)
class Stored:
    """How a tensor lies in a file: safetensors' names of the dtypes allowed, and the shape.

    The first dtype is the one that is written.
    """

    dtypes: tuple[str, ...]
    shape: Shape


def is_for_images(config: ModelConfig, name: str) -> bool:
    """Is a tensor one that Vision-Exp has for images, which text goes without?

    The vision tower, what maps its rows to the network's, and the routers' biases of image tokens,
    those of hash layers among them, which have none for text.
    """
    if not config.vision_n_layers:
        return False
    bias = _BIAS.fullmatch(name)
    hashed = bias is not None and int(bias[1]) < config.num_hash_layers
    return hashed or _VISION.fullmatch(name) is not None


def unpacked(config: ModelConfig, name: str) -> tuple[str, str] | None:
    """(module, tensor) of what may be packed in the file, but is held plain."""
    if config.experts not in (*COMPRESSED, "gptq"):
        return None
    found = _UNPACKED.fullmatch(name)
    return found and (found[1], found[2])


def is_unread_scale(expected: Mapping[str, Stored], name: str) -> bool:
    """Is a tensor a scale that nothing is multiplied by: of activations that are not rounded by it,
    or of a weight that is not packed?"""
    module, _, leaf = name.rpartition(".")
    weight = expected.get(f"{module}.weight") or expected.get(f"{module}.weight_packed")
    if name in expected or weight is None:
        return False
    return leaf in ACTIVATION_SCALES or (leaf == "scale" and weight.dtypes[0] == "BF16")


def is_order(expected: Mapping[str, Stored], name: str) -> bool:
    """Is a tensor the order of a GPTQ weight's inputs? It says nothing but 0, 0, ..., 1, 1, ..."""
    return name.endswith(G_IDX) and f"{name.removesuffix(G_IDX)}{QWEIGHT}" in expected


def stored_tensors(config: ModelConfig, mtp: bool = False) -> dict[str, Stored]:
    """`expected_tensors` in the variant's own form: packed weights and their scales."""
    stored: dict[str, Stored] = {}
    for name, shape in expected_tensors(config, mtp).items():
        stored |= stored_as(config, name, shape)
    return stored


def stored_as(config: ModelConfig, name: str, shape: Shape) -> dict[str, Stored]:
    """The tensors that hold one parameter of the network."""
    module = name.removesuffix(".weight")
    kind: Experts
    if EXPERT.fullmatch(name):
        kind = config.experts_of(name)
    else:
        kind = "fp8" if config.is_fp8(module) and name.endswith(".weight") else "plain"
        kind = "gptq" if config.is_int4(module) and name.endswith(".weight") else kind
    if kind == "plain":
        return {name: Stored(_plain_dtypes(name), shape)}
    n_out, n_in = shape
    if kind == "fp8":
        return _fp8(config, module, shape)
    packed, blocks = (n_out, n_in // 2), (n_out, n_in // config.block_of(kind))
    if kind == "fp4":
        return {
            name: Stored(("I8", "U8"), packed),
            f"{module}.scale": Stored(("F8_E8M0",), blocks),
        }
    if kind == "w4a16":
        return {
            f"{module}.weight_packed": Stored(("I32",), (n_out, n_in // 8)),
            f"{module}.weight_scale": Stored(("BF16",), blocks),
            f"{module}.weight_shape": Stored(("I64",), (2,)),
        }
    if kind == "gptq":
        return _gptq(module, shape, config.int4_block)
    if kind == "ct-nvfp4":
        return {
            f"{module}.weight_packed": Stored(("U8", "I8"), packed),
            f"{module}.weight_scale": Stored(("F8_E4M3",), blocks),
            f"{module}.weight_global_scale": Stored(("F32",), (1,)),
        }
    return {
        name: Stored(("U8", "I8"), packed),
        f"{module}.weight_scale": Stored(("F8_E4M3",), blocks),
        f"{module}.weight_scale_2": Stored(("F32",), ()),
        f"{module}.input_scale": Stored(("F32",), ()),
    }


def _fp8(config: ModelConfig, module: str, shape: Shape) -> dict[str, Stored]:
    blocks = (-(-shape[0] // FP8_BLOCK), -(-shape[1] // FP8_BLOCK))
    scales = ["F32", "F8_E8M0", "BF16"] if config.experts == "fp8" else ["F8_E8M0", "F32", "BF16"]
    if config.experts in COMPRESSED:
        scales.reverse()
    return {
        f"{module}.weight": Stored(("F8_E4M3",), shape),
        f"{module}.scale": Stored(tuple(scales), blocks),
    }


def _gptq(module: str, shape: Shape, block: int) -> dict[str, Stored]:
    """Transposed: inputs are the rows."""
    n_out, n_in = shape
    return {
        f"{module}{QWEIGHT}": Stored(("I32",), (n_in // 8, n_out)),
        f"{module}.qzeros": Stored(("I32",), (n_in // block, n_out // 8)),
        f"{module}.scales": Stored(("F16", "BF16"), (n_in // block, n_out)),
    }


def as_found(
    config: ModelConfig, expected: Mapping[str, Stored], dtypes: Mapping[str, str]
) -> dict[str, Stored]:
    """Expected tensors, with those of a checkpoint that it packs and the network holds plain.

    dtypes: of the checkpoint's tensors.
    """
    stored: dict[str, Stored] = {}
    for name, plain in expected.items():
        module, leaf = unpacked(config, name) or ("", "")
        if leaf == "weight" and f"{module}{QWEIGHT}" in dtypes and config.experts == "gptq":
            stored |= _gptq(module, plain.shape, config.int4_block)
        elif leaf == "weight" and dtypes.get(name) == "F8_E4M3":
            stored |= _fp8(config, module, plain.shape)
        else:
            stored[name] = plain
    return stored


def with_int4(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """With the linears that a checkpoint of GPTQ's layout has as int4, by its tensors' names."""
    if config.experts != "gptq":
        return config
    return replace(config, int4_modules=int4_modules(names))


def int4_modules(names: Collection[str]) -> frozenset[str]:
    """The linears that are int4 in GPTQ's layout, and draft layers' experts."""
    modules = set()
    for name in names:
        module, _, leaf = of_authors(name).rpartition(".")
        if leaf != "qweight":
            continue
        if _INT4_LINEAR.fullmatch(module):
            modules.add(module)
        elif module.startswith("mtp.") and ".experts." in module:
            modules.add(module.partition(".experts.")[0] + ".experts")
    return frozenset(modules)


def _plain_dtypes(name: str) -> tuple[str, ...]:
    if name.endswith("tid2eid"):
        return "I64", "I32"
    if name.startswith(("vision.", "aligner.")):
        return ("BF16",)
    return ("F32", "BF16") if _FLOAT32.search(name) else ("BF16", "F32")


_FLOAT32 = re.compile(r"(^|[._])(hc_\w+|ape|attn_sink|bias|bias_vl)$")
"""What is published in float32; the rest of what is not packed is bfloat16."""


def expected_tensors(config: ModelConfig, mtp: bool = False) -> dict[str, Shape]:
    """Every tensor of the main model, or of the drafter too, and its unquantised shape."""
    c = config
    tensors: dict[str, Shape] = {
        "embed.weight": (c.vocab_size, c.hidden_size),
        "head.weight": (c.vocab_size, c.hidden_size),
        "norm.weight": (c.hidden_size,),
    }
    tensors |= _hyper_connection("hc_head", c.hc_mult, 1, c)
    for layer in range(c.num_hidden_layers):
        inner = _block(c, c.compress_ratios[layer], layer < c.num_hash_layers)
        tensors |= {f"layers.{layer}.{name}": shape for name, shape in inner.items()}
    return tensors | draft_tensors(c) if mtp else tensors


def with_drafter(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """With the drafter that a checkpoint's tensors are of: num_nextn_predict_layers is 1 in
    checkpoints with three stages of DSpark, too.

    Raises ValueError where config.json does not say what that drafter has to know.
    """
    if "mtp.0.e_proj.weight" in names:
        return replace(config, dspark=None)
    if "mtp.0.main_proj.weight" not in names:
        return config
    if config.dspark is None:
        raise ValueError(
            "mtp.0.main_proj.weight is of a DSpark drafter; config.json has to have all of "
            f"{', '.join(DSPARK_FIELDS)}"
        )
    stages = {int(stage[1]) for name in names if (stage := _STAGE.match(name))}
    return replace(config, dspark=replace(config.dspark, stages=1 + max(stages)))


def draft_tensors(config: ModelConfig) -> dict[str, Shape]:
    """The drafter's. Raises ValueError where the checkpoint has none that can be used."""
    c = config.with_draft_layers()
    return _mtp_tensors(c) if c.dspark is None else _dspark_tensors(c, c.dspark)


def _mtp_tensors(c: ModelConfig) -> dict[str, Shape]:
    d = c.hidden_size
    inner = _block(c, SWA, hash_routed=False) | _hyper_connection("hc_head", c.hc_mult, 1, c)
    inner |= {"e_proj.weight": (d, d), "h_proj.weight": (d, d)}
    inner |= {f"{name}.weight": (d,) for name in ("enorm", "hnorm", "norm")}
    return {f"mtp.0.{name}": shape for name, shape in inner.items()}


def _dspark_tensors(c: ModelConfig, dspark: DSpark) -> dict[str, Shape]:
    d, rank, last = c.hidden_size, dspark.markov_rank, dspark.stages - 1
    tensors: dict[str, Shape] = {}
    for stage in range(dspark.stages):
        block = _block(c, SWA, hash_routed=False)
        tensors |= {f"mtp.{stage}.{name}": shape for name, shape in block.items()}
    read = len(dspark.target_layer_ids) * d
    tensors |= {"mtp.0.main_proj.weight": (d, read), "mtp.0.main_norm.weight": (d,)}
    tensors |= {
        f"mtp.{last}.norm.weight": (d,),
        f"mtp.{last}.markov_head.markov_w1.weight": (c.vocab_size, rank),
        f"mtp.{last}.markov_head.markov_w2.weight": (c.vocab_size, rank),
        f"mtp.{last}.confidence_head.proj.weight": (1, d + rank),
    }
    return tensors | _hyper_connection(f"mtp.{last}.hc_head", c.hc_mult, 1, c)


def image_tensors(config: ModelConfig, hf: Mapping[str, Any]) -> dict[str, Shape]:
    """What Vision-Exp has beside a 0731 checkpoint; hf: config.json, with the tower's sizes."""
    d, v, f = config.hidden_size, hf["vision_dim"], hf["vision_inter_dim"]
    patch = 3 * hf["vision_patch_size"] ** 2
    tensors: dict[str, Shape] = {
        "vision.patch_embed.proj.weight": (v, patch),
        "vision.patch_embed.proj.bias": (v,),
        "vision.norm.weight": (v,),
        "aligner.w1.weight": (d, v * hf["vision_downsample_ratio"] ** 2),
        "aligner.w1.bias": (d,),
        "aligner.w2.weight": (d, d),
        "aligner.w2.bias": (d,),
    }
    block: dict[str, Shape] = {
        "norm1.weight": (v,),
        "attn.wqkv.weight": (3 * v, v),
        "attn.wqkv.bias": (3 * v,),
        "attn.wo.weight": (v, v),
        "attn.wo.bias": (v,),
        "norm2.weight": (v,),
        "mlp.w1.weight": (2 * f, v),
        "mlp.w2.weight": (v, f),
    }
    for i in range(config.vision_n_layers):
        tensors |= {f"vision.blocks.{i}.{name}": shape for name, shape in block.items()}
    tensors |= {f"image_{which}": (d,) for which in ("start", "pad", "newline", "end")}
    scopes = [f"layers.{i}" for i in range(config.num_hidden_layers)]
    scopes += [f"mtp.{i}" for i in range(config.draft_layers)]
    tensors |= {f"{scope}.ffn.gate.bias_vl": (config.n_routed_experts,) for scope in scopes}
    hashed = scopes[: config.num_hash_layers]
    return tensors | {f"{scope}.ffn.gate.bias": (config.n_routed_experts,) for scope in hashed}


def _block(c: ModelConfig, ratio: int, hash_routed: bool) -> dict[str, Shape]:
    """One layer's tensors, without the layer's name."""
    n = (2 + c.hc_mult) * c.hc_mult
    inner = {**dict(_attention(c, ratio)), **dict(_moe(c, hash_routed))}
    inner |= _hyper_connection("hc_attn", n, 3, c) | _hyper_connection("hc_ffn", n, 3, c)
    return inner | {"attn_norm.weight": (c.hidden_size,), "ffn_norm.weight": (c.hidden_size,)}


def _hyper_connection(name: str, n: int, scales: int, c: ModelConfig) -> dict[str, Shape]:
    fn = (n, c.hc_mult * c.hidden_size)
    return {f"{name}_fn": fn, f"{name}_base": (n,), f"{name}_scale": (scales,)}


def _attention(c: ModelConfig, ratio: int) -> Iterator[tuple[str, Shape]]:
    heads_dim = c.num_attention_heads * c.head_dim
    yield "attn.wq_a.weight", (c.q_lora_rank, c.hidden_size)
    yield "attn.q_norm.weight", (c.q_lora_rank,)
    yield "attn.wq_b.weight", (heads_dim, c.q_lora_rank)
    yield "attn.wkv.weight", (c.head_dim, c.hidden_size)
    yield "attn.kv_norm.weight", (c.head_dim,)
    yield "attn.attn_sink", (c.num_attention_heads,)
    yield "attn.wo_a.weight", (c.o_groups * c.o_lora_rank, heads_dim // c.o_groups)
    yield "attn.wo_b.weight", (c.hidden_size, c.o_groups * c.o_lora_rank)
    if ratio != SWA:
        yield from _compressor(c, ratio, c.head_dim, "attn.compressor")
    if ratio == CSA:
        yield "attn.indexer.wq_b.weight", (c.index_n_heads * c.index_head_dim, c.q_lora_rank)
        yield "attn.indexer.weights_proj.weight", (c.index_n_heads, c.hidden_size)
        yield from _compressor(c, ratio, c.index_head_dim, "attn.indexer.compressor")


def _compressor(c: ModelConfig, ratio: int, dim: int, name: str) -> Iterator[tuple[str, Shape]]:
    width = 2 * dim if ratio == CSA else dim
    yield f"{name}.wkv.weight", (width, c.hidden_size)
    yield f"{name}.wgate.weight", (width, c.hidden_size)
    yield f"{name}.ape", (ratio, width)
    yield f"{name}.norm.weight", (dim,)


def _moe(c: ModelConfig, hash_routed: bool) -> Iterator[tuple[str, Shape]]:
    d, f = c.hidden_size, c.moe_intermediate_size
    yield "ffn.gate.weight", (c.n_routed_experts, d)
    if hash_routed:
        yield "ffn.gate.tid2eid", (c.vocab_size, c.num_experts_per_tok)
    else:
        yield "ffn.gate.bias", (c.n_routed_experts,)
    yield from _expert("ffn.shared_experts", d, f * c.n_shared_experts)
    for e in range(c.n_routed_experts):
        yield from _expert(f"ffn.experts.{e}", d, f)


def _expert(name: str, d: int, f: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.w1.weight", (f, d)
    yield f"{name}.w2.weight", (d, f)
    yield f"{name}.w3.weight", (f, d)
