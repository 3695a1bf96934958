"""compressed-tensors' NVFP4 and int4 experts: their values are its own, and what does not fit its
config is refused by name."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file

from dsv4_plugin import load
from dsv4_plugin.config import INT4_BLOCKS, ModelConfig
from dsv4_plugin.kernels.packed import Int4Matrix, NVFP4Matrix, product
from dsv4_plugin.quant.e2m1 import decode_nvfp4
from dsv4_plugin.quant.e4m3 import decode_ue8m0, e4m3_values, quantise_e4m3_blocks
from dsv4_plugin.quant.int4 import decode_int4, quantise_int4
from dsv4_plugin.tools.make import make_checkpoint
from tests.conftest import A_LAYER_OF_EACH, SMALL, random_ids
from tests.tolerances import BF16_SUM, LOGITS_STD, OP_FP32

FORMATS = ("ct-nvfp4", "ct-w4a16")
BOTH = {"symmetric": True, "dynamic": False}
NVFP4 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16} | BOTH
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128} | BOTH


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed")
    for fmt in FORMATS:
        make_checkpoint(folder / fmt, "tiny", 1, SMALL | A_LAYER_OF_EACH, tokenizer=False, fmt=fmt)
    return folder


def decompressed(state, fmt, weights):
    """By compressed-tensors itself."""
    compressor = BaseCompressor.get_value_from_registry(fmt)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), format=fmt)
    return compressor.decompress(dict(state), scheme)["weight"].float()


def random_bytes(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("block", INT4_BLOCKS)
def test_int4_values_are_compressed_tensors_own(block):
    torch.manual_seed(block)
    data, scale = random_bytes(96, 128), torch.rand(96, 256 // block).bfloat16()
    state = {
        "weight_packed": data.view(torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor([96, 256]),
    }
    expected = decompressed(state, "pack-quantized", INT4 | {"group_size": block})
    exact = decode_int4(data, scale)
    matrix = Int4Matrix(data, scale)
    assert torch.equal(exact.bfloat16().float(), expected)
    assert torch.equal(matrix.rows(0, 96, torch.bfloat16).float(), expected)
    assert torch.equal(matrix.rows(0, 96, torch.float32), exact)
    assert torch.equal(matrix.rows(5, 37, torch.float32), exact[5:37])


@pytest.mark.parametrize("block", INT4_BLOCKS)
def test_int4_rounding_is_compressed_tensors_own(block):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight[3] = 0
    data, scale = quantise_int4(weight, block)
    weights = INT4 | {"group_size": block}
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    state = {"weight": weight.float(), "weight_scale": scale.float()}
    theirs = compressor.compress(state, scheme)["weight_packed"]
    used = scale.repeat_interleave(block // 8, 1) > 0  # by words: a block of zeros has no scale
    assert torch.equal(data.view(torch.int32)[used], theirs[used])
    error = (decode_int4(data, scale) - weight.float()).abs()
    assert (error <= scale.float().repeat_interleave(block, 1) * 0.55).all()


def test_nvfp4_values_are_compressed_tensors_own():
    """To one step of float32: the reciprocal of the global scale is rounded once."""
    torch.manual_seed(0)
    data, scale = random_bytes(96, 128), torch.randint(0, 0x7F, (96, 16), dtype=torch.uint8)
    top = torch.tensor([3431.7])
    state = {
        "weight_packed": data,
        "weight_scale": scale.view(torch.float8_e4m3fn),
        "weight_global_scale": top,
    }
    expected = decompressed(state, "nvfp4-pack-quantized", NVFP4)
    found = NVFP4Matrix(data, scale, (1 / top)[0]).rows(0, 96, torch.float32)
    assert (found - expected).abs().max() <= expected.abs().max() * 2.0**-7  # theirs is bfloat16
    assert ((found - expected).abs() <= expected.abs() * 2.0**-7 + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n_out", "n_in", "block"), [(512, 4096, 128), (130, 192, 64), (32, 64, 32)]
)
def test_int4_products(n_out, n_in, block, dtype):
    torch.manual_seed(n_out)
    matrix = Int4Matrix(random_bytes(n_out, n_in // 2), torch.rand(n_out, n_in // block).bfloat16())
    x = torch.randn(5, n_in).to(dtype)
    expected = x.float() @ decode_int4(matrix.data, matrix.scale).t()
    found = product(x, matrix)
    tolerance = OP_FP32 if dtype == torch.float32 else BF16_SUM
    assert found.dtype == dtype
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


def plain_twin(source, folder):
    """The same model unpacked, to float32."""
    config = ModelConfig.from_pretrained(source)
    tensors = load_file(next(source.glob("*.safetensors")))
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        parts = ("weight_packed", "weight_scale", "weight_shape", "weight_global_scale")
        state = {p: tensors.pop(f"{module}.{p}") for p in parts if f"{module}.{p}" in tensors}
        data, scale = (state[p].view(torch.uint8) for p in parts[:2])
        if config.experts == "w4a16":
            weight = decode_int4(data, state["weight_scale"])
        else:
            weight = decode_nvfp4(data, scale, 1 / state["weight_global_scale"])
        tensors[f"{module}.weight"] = weight
    folder.mkdir()
    hf = json.loads((source / "config.json").read_text())
    for name in [name for name in tensors if name.endswith(".attn.wq_a.scale")]:
        assert tensors[name].dtype == torch.bfloat16
    for name in [name for name in tensors if name.endswith(".scale")]:
        module, scale = name.removesuffix(".scale"), tensors.pop(name)
        wide = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
        codes = tensors[f"{module}.weight"].float()
        tensors[f"{module}.weight"] = codes * wide[: codes.shape[0], : codes.shape[1]]
    del hf["quantization_config"]
    (folder / "config.json").write_text(json.dumps(hf))
    save_file(tensors, folder / "model.safetensors")
    return folder


def with_config(source, folder, change):
    shutil.copytree(source, folder)
    hf = json.loads((folder / "config.json").read_text())
    change(hf["quantization_config"])
    (folder / "config.json").write_text(json.dumps(hf))
    return folder


@pytest.mark.parametrize("fmt", FORMATS)
def test_inputs_are_not_rounded(made, tmp_path, fmt):
    """Without rounded inputs of FP8 the logits are those of the decompressed model; with them they
    are others."""

    def weights_only(asked):
        asked["config_groups"]["group_0"]["input_activations"] = None

    copy = with_config(made / fmt, tmp_path / "a16", weights_only)
    ids = random_ids(150, seed=3)
    expected = load(plain_twin(copy, tmp_path / "plain"), "float32").logits(ids)
    found = load(copy, "float32").logits(ids)
    assert (found - expected).abs().max() < 20 * LOGITS_STD * expected.std()
    rounded = load(made / fmt, "float32").logits(ids)
    assert (rounded - expected).abs().max() > 20 * LOGITS_STD * expected.std()


@pytest.mark.parametrize("fmt", FORMATS)
def test_attention_may_be_plain(made, tmp_path, fmt):
    """Without a group for it."""
    plain = load_file(plain_twin(made / fmt, tmp_path / "plain") / "model.safetensors")
    copy = with_config(made / fmt, tmp_path / "copy", lambda q: groups(q).pop("group_0"))
    tensors = load_file(next(copy.glob("*.safetensors")))
    for name in [name for name in tensors if ".attn.w" in name]:
        if name.endswith(".scale"):
            del tensors[name]
        else:
            tensors[name] = plain[name].bfloat16()
    save_file(tensors, next(copy.glob("*.safetensors")))
    ids = random_ids(150, seed=3)
    expected = load(tmp_path / "plain", "float32").logits(ids)
    found = load(copy, "float32").logits(ids)
    assert (found - expected).abs().max() < 20 * LOGITS_STD * expected.std()


def groups(asked):
    return asked["config_groups"]


WHERE = r"quantization_config\.config_groups"


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda q: q.pop("config_groups"), f"{WHERE} is None; it must be a JSON object"),
        (lambda q: groups(q).pop("group_1"), f"{WHERE} has 0 groups of 4 bits; allowed is one"),
        (
            lambda q: groups(q)["group_1"]["weights"].update(num_bits=3),
            rf"{WHERE}\.group_1\.weights\.num_bits is 3; allowed are 4 and 8",
        ),
        (
            lambda q: groups(q)["group_1"]["weights"].update(symmetric=False),
            r"weights\.symmetric is False; allowed is True",
        ),
        (
            lambda q: groups(q)["group_1"]["weights"].update(actorder="group"),
            r"weights\.actorder is 'group'; allowed are 'weight' and 'static'",
        ),
        (
            lambda q: groups(q)["group_1"]["weights"].update(strategy="block"),
            r"group_1\.weights is .*; allowed are float of 8 bits in blocks",
        ),
        (
            lambda q: groups(q)["group_0"]["weights"].update(block_structure=None),
            r"group_0\.weights lacks block_structure; allowed is \[128, 128\]",
        ),
        (
            lambda q: groups(q).update(group_2=groups(q)["group_1"]),
            r"config_groups has two groups of (ct-nvfp4|w4a16); allowed is one",
        ),
        (
            lambda q: groups(q)["group_0"]["input_activations"].update(num_bits=4),
            "inputs of FP8 weights have 4 bits; allowed are 8",
        ),
        (lambda q: q.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is .* left out"),
        (lambda q: q.update(transform_config={"a": 1}), r"transform_config\.a is 1; this version"),
    ],
)
@pytest.mark.parametrize("fmt", FORMATS)
def test_configs_that_do_not_fit_are_refused(made, tmp_path, fmt, change, pattern):
    copy = with_config(made / fmt, tmp_path / "copy", change)
    with pytest.raises(ValueError, match=pattern) as info:
        load(copy)
    assert "\n" not in str(info.value)


E = "layers.1.ffn.experts.3.w2"


def broken(source, folder, damage):
    shutil.copytree(source, folder)
    shard = next(folder.glob("*.safetensors"))
    tensors = load_file(shard)
    damage(tensors)
    save_file(tensors, shard)
    return folder


@pytest.mark.parametrize(
    ("fmt", "damage", "pattern"),
    [
        ("ct-w4a16", lambda t: t.pop(f"{E}.weight_scale"), f"{E}.weight_scale is missing"),
        (
            "ct-w4a16",
            lambda t: t[f"{E}.weight_shape"].copy_(torch.tensor([64, 128])),
            r"layers.1.ffn.experts.3.w2.weight_shape is \[64, 128\]; the weight is \[128, 64\]",
        ),
        (
            "ct-w4a16",
            lambda t: t.update({f"{E}.weight_zero_point": torch.zeros(16, 1, dtype=torch.int32)}),
            f"{E}.weight_zero_point is unexpected",
        ),
        (
            "ct-w4a16",
            lambda t: t.update({f"{E}.weight_g_idx": torch.zeros(64, dtype=torch.int32)}),
            f"{E}.weight_g_idx is unexpected",
        ),
        (
            "ct-w4a16",
            lambda t: t[f"{E}.weight_scale"][0].fill_(float("nan")),
            f"{E}.weight_scale has 1 scales that are not finite",
        ),
        (
            "ct-nvfp4",
            lambda t: t[f"{E}.weight_global_scale"].zero_(),
            f"{E}.weight_global_scale has nothing but zeros",
        ),
        (
            "ct-nvfp4",
            lambda t: t.update({f"{E}.weight_packed": t[f"{E}.weight_packed"].view(torch.int32)}),
            f"{E}.weight_packed is I32, config.json .*NVFP4.* asks for U8 or I8",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(made, tmp_path, fmt, damage, pattern):
    copy = broken(made / fmt, tmp_path / "copy", damage)
    with pytest.raises(ValueError, match=pattern):
        load(copy)


def test_scalars_and_input_scales_of_w4a4(made, tmp_path):
    """A global scale has a dim or none; 4-bit activations' scales are skipped."""

    def as_w4a4(tensors):
        for name in [name for name in tensors if name.endswith("weight_global_scale")]:
            tensors[name] = tensors[name].reshape(())
            tensors[name.replace("weight_global", "input_global")] = torch.ones(1)

    copy = broken(made / "ct-nvfp4", tmp_path / "copy", as_w4a4)
    ids = random_ids(70, seed=4)
    assert torch.equal(load(copy).logits(ids), load(made / "ct-nvfp4").logits(ids))


@pytest.mark.parametrize("scale", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("fmt", FORMATS)
def test_compressors_and_indexers_of_first_uploads(made, tmp_path, fmt, scale):
    """FP8, under scales by another name: the network that their values make. One without its scales
    is refused."""
    names = ("compressor.wkv", "compressor.wgate", "indexer.wq_b", "indexer.weights_proj")
    values = {}

    def as_fp8(tensors):
        for module in [n.removesuffix(".weight") for n in tensors if n.endswith(".weight")]:
            if module.endswith(names):
                codes, exponents = quantise_e4m3_blocks(tensors[f"{module}.weight"])
                factor = (decode_ue8m0(exponents) * 1.13).to(scale)
                tensors[f"{module}.weight"] = codes.view(torch.float8_e4m3fn)
                tensors[f"{module}.weight_scale"] = factor
                wide = factor.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
                wide = wide[: codes.shape[0], : codes.shape[1]]
                values[f"{module}.weight"] = e4m3_values(codes) * wide

    first = broken(made / fmt, tmp_path / "first", as_fp8)
    plain = broken(made / fmt, tmp_path / "plain", lambda t: t.update(values))
    assert len(values) == 8
    ids = random_ids(150, seed=3)
    found, expected = (load(folder, "float32").logits(ids) for folder in (first, plain))
    assert torch.equal(found, expected)
    without = "layers.1.attn.compressor.wkv"
    copy = broken(first, tmp_path / "copy", lambda t: t.pop(f"{without}.weight_scale"))
    with pytest.raises(ValueError, match=f"{without}.scale is missing"):
        load(copy)
