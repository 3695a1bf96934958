"""What a user can get wrong: one sentence that names the field and what is allowed."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv4_plugin import load
from dsv4_plugin.checkpoint.files import INDEX, check_checkpoint, read_tensors
from dsv4_plugin.checkpoint.load import load_weights
from dsv4_plugin.checkpoint.make import make_checkpoint
from dsv4_plugin.checkpoint.names import stored_tensors
from dsv4_plugin.cli import main
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.model.parallel import LocalParallel
from dsv4_plugin.model.transformer import Transformer
from tests.paths import SHARED, needs_shared


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


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"compress_ratios": [0, 4, 7, 4, 128]}, r"compress_ratios\[2\] is 7; allowed are 0, 4"),
        ({"compress_ratios": [0, 4]}, "compress_ratios has 2 entries"),
        ({"model_type": "llama"}, "model_type is 'llama'.*'deepseek_v4'"),
        ({"o_groups": 3}, "o_groups is 3; it must divide num_attention_heads"),
        ({"head_dim": 16}, "head_dim is 16; it must exceed"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be a positive integer"),
        ({"q_lora_rank": None}, "lacks q_lora_rank"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_scaling type is 'linear'"),
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
        ({"quant_method": "awq"}, "quantization_config.quant_method is 'awq'; allowed is 'fp8'"),
        ({"fmt": "e5m2"}, "quantization_config.fmt is 'e5m2'; allowed is 'e4m3'"),
        ({"weight_block_size": [64, 64]}, r"weight_block_size is \[64, 64\]; allowed is \[128, 12"),
        ({"quant_method": None}, "quantization_config.quant_method is None; allowed is 'fp8'"),
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
    refused(broken, "moe_intermediate_size is 72; fp4 experts .* a multiple of 32")


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
    with pytest.raises(ValueError, match="tensor_parallel_size is 3; it must divide num_attention"):
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


@needs_shared
@pytest.mark.parametrize("path", sorted((SHARED / "configs").glob("*.config.*json")))
def test_published_configs_are_read(path):
    if "inference" in path.name:
        pytest.skip("the authors' own argument file, not a Hugging Face config")
    config = ModelConfig.from_hf(json.loads(path.read_text()))
    assert config.generation == ("0731" if "0731" in path.name else "april")
    assert len(config.compress_ratios) == config.num_hidden_layers


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
