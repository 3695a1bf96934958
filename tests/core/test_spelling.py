"""Checkpoints whose tensors have other names: one to one, or refused."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4ForCausalLM

from dsv4_plugin import load
from dsv4_plugin.checkpoint.names import expected_tensors
from dsv4_plugin.checkpoint.spelling import native
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.tools.make import make_checkpoint
from tests.conftest import A_LAYER_OF_EACH, SMALL, random_ids

IDS = random_ids(140, seed=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spelling")
    for fmt in ("bf16", "fp8-fp4", "base", "nvfp4", "gptq"):
        make_checkpoint(folder / fmt, "tiny", 1, SMALL | A_LAYER_OF_EACH, tokenizer=False, fmt=fmt)
    return folder


def renamed(source, folder, rename):
    """A copy of a checkpoint, its tensors called rename(name)."""
    folder.mkdir()
    tensors = load_file(next(source.glob("*.safetensors")))
    save_file({rename(name): t for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


def test_every_name_of_transformers_is_known(made):
    """Its module's own names, but for the fused experts, which are no one tensor here."""
    config = ModelConfig.from_pretrained(made / "bf16")
    model = DeepseekV4ForCausalLM.from_pretrained(made / "bf16")
    names = {name for name in model.state_dict() if ".mlp.experts." not in name}
    expected = {name for name in expected_tensors(config) if ".ffn.experts." not in name}
    assert {native(config, name) for name in names} == expected
    assert {native(config, name) for name in expected_tensors(config)} == {
        *expected_tensors(config)
    }
    expert = "layers.1.mlp.experts.3"
    for theirs, own in {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}.items():
        found = native(config, f"model.{expert}.{theirs}.weight")
        assert found == f"layers.1.ffn.experts.3.{own}.weight"


def to_transformers(name):
    """The other way, for the names that a test writes."""
    for pattern, text in (
        (r"\.attn\.indexer\.compressor\.", ".self_attn.compressor.indexer."),
        (r"\.attn\.indexer\.wq_b", ".self_attn.compressor.indexer.q_b_proj"),
        (r"\.attn\.indexer\.weights_proj", ".self_attn.compressor.indexer.scorer.weights_proj"),
        (r"\.attn\.", ".self_attn."),
        (r"\.ffn\.", ".mlp."),
        (r"\.attn_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"hc_(attn|ffn)_(fn|base|scale)$", r"\1_hc.\2"),
        (r"hc_head_(fn|base|scale)$", r"hc_head.hc_\1"),
        (r"(compressor.*)\.norm\.", r"\1.kv_norm."),
        (r"\.q_norm\.", ".q_a_norm."),
        (r"\.attn_sink$", ".sinks"),
        (r"\.ape$", ".position_bias"),
        (r"\.wq_a\.", ".q_a_proj."),
        (r"\.wq_b\.", ".q_b_proj."),
        (r"\.wkv\.", ".kv_proj."),
        (r"\.wgate\.", ".gate_proj."),
        (r"\.w(o_[ab])\.", r".\1_proj."),
        (r"\.w1\.", ".gate_proj."),
        (r"\.w2\.", ".down_proj."),
        (r"\.w3\.", ".up_proj."),
        (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
        (r"^embed\.", "embed_tokens."),
        (r"^head\.", "lm_head."),
    ):
        name = re.sub(pattern, text, name)
    return name if name.startswith("lm_head") else f"model.{name}"


@pytest.mark.parametrize("fmt", ["bf16", "fp8-fp4", "nvfp4", "gptq"])
def test_a_checkpoint_by_transformers_names(made, tmp_path, fmt):
    copy = renamed(made / fmt, tmp_path / "hf", to_transformers)
    names = set(load_file(copy / "model.safetensors"))
    assert "model.layers.1.self_attn.compressor.indexer.gate_proj.weight" in names
    assert not [name for name in names if re.search(r"\.w[123qko]|\.attn\.|\.ffn\.", name)]
    assert torch.equal(load(copy).logits(IDS), load(made / fmt).logits(IDS))


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("fmt", ["fp8-fp4", "base"])
def test_scales_by_other_names(made, tmp_path, fmt, suffix):
    copy = renamed(
        made / fmt, tmp_path / "copy", lambda name: re.sub(r"\.scale$", f".{suffix}", name)
    )
    assert torch.equal(load(copy).logits(IDS), load(made / fmt).logits(IDS))


def test_scales_of_bfloat16(made, tmp_path):
    """Of FP8 blocks, the same where they are powers of two."""
    copy = renamed(made / "base", tmp_path / "copy", lambda name: name)
    tensors = load_file(copy / "model.safetensors")
    for name in tensors:
        if name.endswith(".scale"):
            tensors[name] = tensors[name].bfloat16()
    save_file(tensors, copy / "model.safetensors")
    assert torch.equal(load(copy).logits(IDS), load(made / "base").logits(IDS))


def changed(source, folder, **tensors):
    copy = renamed(source, folder, lambda name: name)
    found = load_file(copy / "model.safetensors")
    save_file(found | tensors, copy / "model.safetensors")
    return copy


def test_scales_that_nothing_is_multiplied_by_are_skipped(made, tmp_path, caplog):
    extra = {
        "layers.0.attn.compressor.wkv.weight_scale": torch.ones(1),  # no such module: unexpected
        "layers.1.attn.compressor.wkv.weight_scale": torch.ones(1, 1),
        "layers.1.attn.wq_a.input_scale": torch.ones(()),
        "layers.1.ffn.shared_experts.w1.input_global_scale": torch.ones(1),
    }
    copy = changed(made / "fp8-fp4", tmp_path / "copy", **extra)
    with pytest.raises(ValueError, match=r"layers.0.attn.compressor.wkv.scale is unexpected$"):
        load(copy)
    extra.popitem()
    del extra["layers.0.attn.compressor.wkv.weight_scale"]
    copy = changed(made / "fp8-fp4", tmp_path / "again", **extra)
    with caplog.at_level(logging.INFO, "dsv4_plugin"):
        found = load(copy).logits(IDS)
    assert f"{len(extra)} scales are skipped: what they belong to is not rounded" in caplog.text
    assert torch.equal(found, load(made / "fp8-fp4").logits(IDS))
