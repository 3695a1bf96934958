"""What a user can get wrong: one sentence that names the field and what is allowed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4_plugin import load
from dsv4_plugin.checkpoint.files import (
    INDEX,
    check_checkpoint,
    read_headers,
    read_tensor,
    read_tensors,
)
from dsv4_plugin.checkpoint.load import load_weights
from dsv4_plugin.checkpoint.names import stored_tensors
from dsv4_plugin.config import DSPARK_FIELDS, FIELDS, V41_REFUSED, ModelConfig
from dsv4_plugin.fields import Only, Unread, Whole
from dsv4_plugin.model.parallel import LocalParallel
from dsv4_plugin.model.transformer import Transformer
from dsv4_plugin.tools.cli import main
from dsv4_plugin.tools.convert import convert_checkpoint
from dsv4_plugin.tools.make import make_checkpoint
from lab.paths import SHARED, needs_shared
from tests.conftest import A_LAYER_OF_EACH, SMALL, v41_fields


@pytest.fixture
def broken(small, tmp_path):
    """A copy of a checkpoint to break: edit(config fields), tensors as files."""
    copy = tmp_path / "broken"
    shutil.copytree(small, copy)
    return copy


def edit(directory, **fields):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refused(directory, pattern, error=ValueError, **kwargs):
    with pytest.raises(error, match=pattern) as info:
        load(directory, **kwargs)
    assert "\n" not in str(info.value)


def test_v41_is_refused_by_what_it_is(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(v41_fields()))
    refused(
        tmp_path,
        "^model_type is 'deepseek_v41': DeepSeek-V4.1 is another .*510 GB",
        NotImplementedError,
    )
    for command in (["checkpoint", "inspect"], ["plan", "--gpu", "A100-80"]):
        assert main([*command, str(tmp_path)]) == 2
        assert capsys.readouterr().err == f"dsv4: {V41_REFUSED}\n"


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"compress_ratios": [0, 4, 7, 4, 128]}, r"compress_ratios\[2\] is 7; allowed are 0, 4"),
        ({"compress_ratios": [0, 4, 128, 4, 128, 4]}, r"compress_ratios is \[4\] after the 5 main"),
        ({"compress_ratios": "04"}, "compress_ratios is '04'; it must be a list"),
        ({"compress_ratios": [0, 4]}, "compress_ratios has 2 entries"),
        ({"model_type": "llama"}, "model_type is 'llama'.*'deepseek_v4'"),
        ({"model_type": ["deepseek_v4"]}, "model_type is"),
        ({"o_groups": 3}, "o_groups is 3; it must divide num_attention_heads"),
        ({"head_dim": 16}, "head_dim is 16; it must exceed"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ({"hidden_size": 0}, "hidden_size is 0; allowed are multiples of 8 from 8 to 65,536"),
        ({"hidden_size": "128"}, "hidden_size is '128'; allowed are multiples of 8"),
        ({"hidden_size": True}, "hidden_size is True; allowed"),
        ({"vocab_size": 512.0}, "vocab_size is 512.0; allowed are integers from 1"),
        ({"n_routed_experts": 10**8}, "n_routed_experts is 100000000; allowed are integers"),
        (
            {"n_routed_experts": 8192, "num_hidden_layers": 9, "compress_ratios": [0] * 9},
            "n_routed_experts is 8192; it must be at most 65,536 in all 9 layers together",
        ),
        ({"hc_sinkhorn_iters": 20.0}, "hc_sinkhorn_iters is 20.0; allowed is 20"),
        ({"hc_sinkhorn_iters": 10**9}, "hc_sinkhorn_iters is 1000000000; allowed is 20"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; allowed is 'sqrtsoftplus'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy'; allowed is 'noaux_tc'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; allowed is 'silu'"),
        ({"norm_topk_prob": 1}, "norm_topk_prob is 1; allowed is True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; allowed is False"),
        ({"attention_bias": True}, "attention_bias is True; allowed is False"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2; allowed is 1"),
        ({"sliding_window": 127}, "sliding_window is 127; allowed are 16, 32, 64 and 128"),
        ({"swiglu_limit": -10.0}, "swiglu_limit is -10.0; allowed are 1.0 and 10.0"),
        ({"swiglu_limit": float("nan")}, "swiglu_limit is nan; allowed are 1.0 and 10.0"),
        ({"hc_eps": 0}, "hc_eps is 0; allowed is 1e-06"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; allowed are 1e-20 and 1e-06"),
        ({"rope_theta": -1}, "rope_theta is -1; allowed is 10000.0"),
        ({"routed_scaling_factor": 2}, "routed_scaling_factor is 2; allowed are 1.5 and 2.5"),
        ({"torch_dtype": "float16"}, "torch_dtype is 'float16'; allowed are 'bfloat16' and 'fl"),
        ({"dtype": "float32"}, "torch_dtype is 'bfloat16', but dtype makes it 'float32'"),
        ({"num_hash_layers": 6}, "num_hash_layers is 6; it must be at most num_hidden_layers"),
        ({"eos_token_id": 512}, r"eos_token_id is 512; it must be below vocab_size \(512\)"),
        ({"eos_token_id": [1]}, r"eos_token_id is \[1\]; allowed are integers"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; it must be a JSON object"),
        ({"rope_scaling": None}, "lacks rope_scaling"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling lacks factor; allowed is 16.0"),
        ({"rope_scaling": {"type": "yarn", "factor": 0}}, "rope_scaling.factor is 0; allowed is"),
        ({"rope_scaling": {"mscale": 1}}, "rope_scaling.mscale is 1; this version knows no such"),
        ({"rope_scaling": {"factor": 16}}, "rope_scaling lacks rope_type; allowed is 'yarn'"),
        ({"n_group": 8}, "n_group is 8; this version knows no such field of conf"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8'; it must be a JSON object"),
        ({"quantization_config": [1]}, r"quantization_config is \[1\]; it must be"),
        ({"q_lora_rank": None}, "lacks q_lora_rank"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            "rope_scaling.type is 'linear'; allowed is 'yarn'",
        ),
        (
            {"hidden_size": 64},
            r"embed.weight has shape \[512, 128\], .* asks for \[512, 64",
        ),
    ],
)
def test_config_fields(broken, fields, pattern):
    edit(broken, **fields)
    refused(broken, pattern)


def test_arguments(small):
    refused(small, "dtype is 'float16'; allowed are auto, float32, bfloat16", dtype="float16")
    refused(small, "kv_dtype is 'int4'; allowed are", kv_dtype="int4")


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        (
            {"quant_method": "awq"},
            "quantization_config.quant_method is 'awq'; allowed are 'fp8', 'compressed-t",
        ),
        ({"fmt": "e5m2"}, "quantization_config.fmt is 'e5m2'; allowed is 'e4m3'"),
        ({"weight_block_size": [64, 64]}, r"weight_block_size is \[64, 64\]; allowed is \[128, 12"),
        (
            {"quant_method": None},
            "quantization_config lacks quant_method; allowed are 'fp8', 'compressed-t",
        ),
        ({"zero_point": True}, "quantization_config.zero_point is True; this version knows no"),
        ({"kv_cache_quant_algo": "FP8"}, "kv_cache_quant_algo is 'FP8'; it must be left out"),
        ({"moe_quant_algo": "INT4"}, "moe_quant_algo is 'INT4'; allowed is 'NVFP4'"),
        ({}, r"layers.0.attn.wq_a.scale is missing.*more"),
    ],
)
def test_quantisation_fields(broken, fields, pattern):
    edit(broken, quantization_config={"quant_method": "fp8"} | fields)
    refused(broken, pattern)


def test_expert_dtypes(broken):
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    edit(broken, expert_dtype="int4", **quantised)
    refused(broken, "expert_dtype is 'int4'; allowed are 'fp4' and 'fp8'")
    edit(broken, expert_dtype="fp4", moe_intermediate_size=72, **quantised)
    refused(
        broken,
        "moe_intermediate_size is 72; it must be a multiple of 32: fp4 experts have a scale per 32",
    )


def shard(directory):
    return next(directory.glob("*.safetensors"))


def test_missing_unexpected_and_misshapen_tensors(broken):
    tensors = load_file(shard(broken))
    norm = tensors.pop("norm.weight")
    save_file(tensors, shard(broken))
    refused(broken, "norm.weight is missing")
    save_file(tensors | {"norm.weight": norm[:-1].clone()}, shard(broken))
    refused(broken, r"norm.weight has shape \[127\], config.json asks for \[128\]")
    save_file(tensors | {"norm.weight": norm, "surprise": norm.clone()}, shard(broken))
    refused(broken, "surprise is unexpected")
    save_file(tensors | {"norm.weight": norm.to(int)}, shard(broken))
    refused(
        broken, r"norm.weight is I64, config.json \(no quantization_config\) asks for BF16 or F32"
    )


def rewrite(file, change):
    """Let `change` work on a file's header, by tensor name; the data stays."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def shifted(header):
    begin, end = header["norm.weight"]["data_offsets"]
    header["norm.weight"]["data_offsets"] = [begin - 2, end - 2]


HEADERS = {
    "a list": (lambda h: b"[]", r"the header is \[\]; it must be a JSON object"),
    "no JSON": (lambda h: b"{,}", r"model-.*safetensors: the header is not JSON that can be read"),
    "no dtype": (lambda h: h["norm.weight"].pop("dtype") and None, "norm.weight is .* must have a"),
    "no shape": (lambda h: h["norm.weight"].pop("shape") and None, "norm.weight is .* must have a"),
    "no offsets": (
        lambda h: h["norm.weight"].pop("data_offsets") and None,
        r"norm.weight is .* must have a dtype \(text\), a shape \(a list of sizes\) and data_off",
    ),
    "a negative size": (
        lambda h: h["norm.weight"].update(shape=[-128]),
        "norm.weight is .* must have a dtype",
    ),
    "offsets before the data": (
        lambda h: h["norm.weight"].update(data_offsets=[-256, 0]),
        "norm.weight is .* must have a dtype",
    ),
    "offsets that overlap": (shifted, "norm.weight begins at byte .* the tensor before it ends"),
    "a hole": (
        lambda h: h.pop("layers.0.attn_norm.weight") and None,
        r"begins at byte \d+ of the data; the tensor before it ends at",
    ),
    "a tensor twice": (
        lambda h: json.dumps(h).encode()[:-1] + b', "norm.weight": {}}',
        "the header is not JSON that can be read: 'norm.weight' stands in it twice",
    ),
    "a note that is no text": (
        lambda h: h.update(__metadata__={"format": 1}),
        "__metadata__ is {'format': 1}; its values must be text",
    ),
    "a name that cannot be printed": (
        lambda h: {"a\nb\ud800" if n == "norm.weight" else n: e for n, e in h.items()},
        r"norm.weight is missing",
    ),
}


@pytest.mark.parametrize("damage", HEADERS)
def test_headers(broken, damage):
    change, pattern = HEADERS[damage]
    rewrite(shard(broken), change)
    refused(broken, pattern)


@pytest.mark.parametrize(
    ("index", "pattern"),
    [
        ({}, "index.json: weight_map is None; it must be a JSON object"),
        ({"weight_map": []}, r"index.json: weight_map is \[\]; it must be a JSON object"),
        ({"weight_map": {}}, "index.json: weight_map is empty"),
        ({"weight_map": {"norm.weight": 1}}, "weight_map.norm.weight is 1; it must be the name of"),
        ({"weight_map": {"norm.weight": "../x"}}, "weight_map.norm.weight is '../x'; it must be"),
    ],
)
def test_indexes(broken, index, pattern):
    (broken / INDEX).write_text(json.dumps(index))
    refused(broken, pattern)


def test_a_tensor_in_two_files(broken):
    index = json.loads((broken / INDEX).read_text())
    save_file({"more": torch.ones(128)}, broken / "other.safetensors")
    index["weight_map"] |= {"norm.weight": "other.safetensors"}
    (broken / INDEX).write_text(json.dumps(index))
    refused(broken, "norm.weight is in model-.*; model.safetensors.index.json says other.safe")
    save_file({"norm.weight": torch.ones(128)}, broken / "other.safetensors")
    (broken / INDEX).write_text(json.dumps(index))
    refused(broken, "norm.weight is in .* and in .*; allowed is one")
    (broken / INDEX).unlink()
    refused(broken, "norm.weight is in .* and in .*; allowed is one")


NAN = float("nan")
VALUES = {
    ("bf16", "norm.weight"): (NAN, "norm.weight has 128 values that are not finite among 128"),
    ("bf16", "layers.0.hc_attn_scale"): (NAN, "hc_attn_scale has 3 values that are not finite"),
    ("bf16", "layers.1.ffn.gate.bias"): (-torch.inf, "bias has 8 values that are not finite"),
    ("bf16", "layers.0.ffn.gate.tid2eid"): (8, "tid2eid names expert 8; n_routed_experts is 8, so"),
    ("base", "layers.0.attn.wq_a.scale"): (NAN, "wq_a.scale has .* scales that are not finite"),
    ("base", "layers.0.attn.wq_b.scale"): (0, "wq_b.scale has nothing but zeros"),
    ("base", "layers.0.ffn.experts.1.w1.scale"): (-1, "w1.scale has 1 negative scales"),
    ("fp8-fp4", "layers.0.attn.wkv.scale"): (255, "wkv.scale has .* scales that are not numbers"),
    ("fp8-fp4", "layers.0.ffn.experts.1.w1.scale"): (0, "w1.scale has nothing but zeros"),
    ("nvfp4", "layers.0.ffn.experts.1.w1.weight_scale"): (255, "scales that are not numbers"),
    ("nvfp4", "layers.0.ffn.experts.1.w2.weight_scale"): (129, "w2.weight_scale has .* negative"),
    ("nvfp4", "layers.0.ffn.experts.1.w3.weight_scale_2"): (
        NAN,
        "has 1 scales that are not finite",
    ),
}


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    directory = tmp_path_factory.mktemp("variants")
    for fmt in ("bf16", "base", "fp8-fp4", "nvfp4"):
        overrides = SMALL | A_LAYER_OF_EACH
        make_checkpoint(directory / fmt, "tiny", 1, overrides, tokenizer=False, fmt=fmt)
    return directory


@pytest.mark.parametrize(("fmt", "name"), VALUES, ids=lambda value: value)
def test_values(variants, tmp_path, fmt, name):
    value, pattern = VALUES[fmt, name]
    copy = tmp_path / "copy"
    shutil.copytree(variants / fmt, copy)
    info = read_headers(copy)[name]
    tensor = read_tensor(info)
    with info.file.open("r+b") as f:
        f.seek(info.offset)
        f.write(torch.full_like(tensor, value).reshape(-1).view(torch.uint8).numpy().tobytes())
    refused(copy, pattern)


def test_truncated_and_missing_files(broken):
    data = shard(broken).read_bytes()
    shard(broken).write_bytes(data[:-1])
    refused(broken, "is truncated")
    shard(broken).write_bytes(data[:5])
    refused(broken, "is truncated")
    shard(broken).unlink()
    refused(broken, f"is missing; {INDEX} names it", FileNotFoundError)
    (broken / INDEX).unlink()
    refused(broken, r"has no \*.safetensors", FileNotFoundError)
    refused(broken / "nowhere", "config.json does not exist", FileNotFoundError)


@pytest.mark.parametrize("prompt", [[], [512], [-1]])
def test_prompts(small, prompt):
    with pytest.raises(ValueError, match=r"prompts\[1\] must hold at least one id from 0 to 511"):
        load(small).generate([[1], prompt], max_new_tokens=1)


def test_tensor_parallel_sizes(small):
    config = ModelConfig.from_pretrained(small)
    config.require_tensor_parallel(2)
    with pytest.raises(ValueError, match="ranks is 3; it must divide num_attention"):
        config.require_tensor_parallel(3)


def test_make_leaves_nothing_half_done(tmp_path, capsys, monkeypatch):
    with pytest.raises(ValueError, match="preset is 'huge'; allowed are"):
        make_checkpoint(tmp_path / "a", "huge")
    with pytest.raises(ValueError, match="compress_ratios"):
        make_checkpoint(tmp_path / "a", "tiny", overrides={"compress_ratios": [5]})
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert main(["checkpoint", "make", "--preset", "tiny", "--out", str(tmp_path / "full")]) == 2
    assert re.search("full exists and is not empty", capsys.readouterr().err)


PUBLISHED = [
    path
    for path in sorted((SHARED / "configs").glob("*.config.*json"))
    if "inference" not in path.name  # the authors' own argument file, not a Hugging Face config
]
WRONG = (0, -1, 1e300, float("nan"), "", "text", True, [], [None], {}, {"type": "text"})


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_the_umask_says_who_may_read(tmp_path, mask):
    before = os.umask(mask)
    try:
        make_checkpoint(tmp_path / "made", "tiny", 1, SMALL | A_LAYER_OF_EACH, tokenizer=False)
        convert_checkpoint(tmp_path / "made", tmp_path / "converted", "base")
    finally:
        os.umask(before)
    for folder in (tmp_path / "made", tmp_path / "converted"):
        modes = {file.stat().st_mode & 0o777 for file in folder.iterdir()}
        assert modes == {0o666 & ~mask}


@needs_shared
@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_configs_are_read(path):
    hf = json.loads(path.read_text())
    config = ModelConfig.from_hf(hf)
    assert config.generation == ("0731" if "0731" in path.name else "april")
    assert len(config.compress_ratios) == config.num_hidden_layers
    for name, published in hf.items():
        for value in (*WRONG, f"{published}"):
            allowed = FIELDS.fields[name]
            if isinstance(allowed, Unread) or FREE.get(name) == value:
                assert ModelConfig.from_hf(hf | {name: value})
                continue
            if isinstance(allowed, Only | Whole) and allowed.permits(value):
                continue
            with pytest.raises(ValueError, match=name) as info:
                ModelConfig.from_hf(hf | {name: value})
            assert "\n" not in str(info.value)


FREE = {"quantization_config": {}, "architectures": []}
"""Empty is none: without the first the checkpoint is unquantised, and its tensors say otherwise."""


@needs_shared
def test_every_field_that_is_read_has_its_row():
    derived = {"yarn", "experts", "generation", "fp8_attention", "rounds_fp8_inputs"}
    derived |= {"int4_block", "int4_modules"}
    read = {f.name for f in dataclasses.fields(ModelConfig)} - derived - {"dspark"}
    read |= {"rope_scaling", "quantization_config", "expert_dtype", *DSPARK_FIELDS}
    assert read <= set(FIELDS.fields)


def test_what_transformers_saves_is_the_same(broken):
    from transformers.models.deepseek_v4 import DeepseekV4Config

    before = ModelConfig.from_pretrained(broken)
    DeepseekV4Config.from_pretrained(broken).save_pretrained(broken)
    saved = json.loads((broken / "config.json").read_text())
    assert "layer_types" in saved
    assert "compress_ratios" not in saved
    assert ModelConfig.from_pretrained(broken) == before
    edit(broken, compress_ratios=[0, 4, 128, 4, 4])
    refused(broken, r"compress_ratios is \[0, 4, 128, 4, 4\], but layer_types makes it")


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("{", "config.json is not JSON that can be read: Expecting property name"),
        ("[]", r"config.json is \[\]; it must be a JSON object"),
        ("[" * 100_000, "config.json is not JSON that can be read"),
        ('{"hc_mult": 4, "hc_mult": 5}', "config.json is .*'hc_mult' stands in it twice"),
        (b"\xff{}", "config.json is not JSON: it is not text in UTF-8"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "config.json is not JSON that can be read"),
    ],
)
def test_config_files(broken, text, pattern):
    path = broken / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(broken, pattern)


@pytest.mark.parametrize(
    ("exported", "pattern"),
    [
        ([], r"hf_quant_config.json is \[\]; it must be a JSON object"),
        ({"quantization": 4}, "hf_quant_config.json: quantization is 4; it must be a JSON object"),
        ({"quantization": {"quantized_layers": [1]}}, r"quantized_layers is \[1\]; it must be"),
        (
            {"quantization": {"quantized_layers": {"layers.0": {"quant_algo": "W4A8"}}}},
            "quantized_layers.layers.0 is 'W4A8'; allowed is 'NVFP4'",
        ),
    ],
)
def test_exported_files(broken, exported, pattern):
    (broken / "hf_quant_config.json").write_text(json.dumps(exported))
    refused(broken, pattern)


def test_a_tensor_that_an_engine_does_not_hand_over(small):
    """Engines read the files themselves: what they leave out is named, before it is used."""
    config = ModelConfig.from_pretrained(small)
    model = Transformer(config, LocalParallel(config, torch.float32))
    tensors = read_tensors(check_checkpoint(config, small), progress=False)
    handed = ((name, tensor) for name, tensor in tensors if name != "norm.weight")
    with pytest.raises(ValueError, match=r"lacks 1 tensors, norm\.weight among them"):
        load_weights(model, handed, needed=stored_tensors(config))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"device": "gpu"}, r"device is 'gpu'; allowed are cpu, cuda, cuda:0, cuda:1, \.\.\."),
        ({"device": "cuda:x"}, "device is 'cuda:x'; allowed are"),
        ({"device": "cuda:99"}, "device is 'cuda:99'; torch finds"),
    ],
)
def test_devices(small, given, sentence):
    refused(small, sentence, **given)
