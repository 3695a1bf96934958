"""Quantised checkpoints in vLLM: every variant answers as the local engine does; the options."""

from __future__ import annotations

import json
import os
import re

import pytest
import torch
from vllm.config.attention import AttentionConfig

import vllm_ext
from dsv4_plugin import load
from dsv4_plugin.cache.rows import BFloat16Rows, FP4IndexRows, FP8IndexRows, FP8KVRows
from dsv4_plugin.config import CSA, V41_REFUSED
from dsv4_plugin.tools.make import make_checkpoint
from tests.conftest import SMALL, random_ids, v41_fields
from tests.tolerances import LOGPROB
from tests.vllm.test_options import configure
from tests.vllm_chat.server import MODEL, Server
from vllm_ext._compat import FP4_INDEXER
from vllm_ext.active import VISION_ARCHITECTURE
from vllm_ext.config import SERVED_TYPE, cache_layout, model_config_of

VARIANTS = ("fp8-fp4", "base", "nvfp4", "0731", "vision", "ct-nvfp4", "ct-w4a16", "gptq")
GUIDE = (
    "--trust-remote-code --kv-cache-dtype fp8 --block-size 256 --max-num-batched-tokens 65536 "
    "--max-num-seqs 1024 --attention_config.use_fp4_indexer_cache=True "
    '--compilation-config {"cudagraph_mode":"FULL_AND_PIECEWISE","custom_ops":["all"]} '
    "--tokenizer-mode deepseek_v4 --tool-call-parser deepseek_v4 --enable-auto-tool-choice "
    "--reasoning-parser deepseek_v4"
)
"""The vendors' single-node command line, without the number of GPUs."""


@pytest.fixture(autouse=True)
def registered():
    vllm_ext.register()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    for fmt in VARIANTS:
        make_checkpoint(folder / fmt, "tiny", 1, SMALL, tokenizer=False, fmt=fmt)
    return folder


@pytest.mark.parametrize(
    "fmt", ["fp8-fp4", *(pytest.param(f, marks=pytest.mark.thorough) for f in VARIANTS[1:])]
)
def test_every_variant_answers_as_the_local_engine(made, fmt):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(made / fmt), skip_tokenizer_init=True, dtype="float32", max_model_len=512,
        max_num_batched_tokens=512, max_num_seqs=4, kv_cache_memory_bytes=50 << 20,
    )  # fmt: skip
    prompt = random_ids(40, seed=3).tolist()
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
    out = engine.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)[0].outputs[0]
    assert engine.llm_engine.vllm_config.model_config.quantization is None
    engine.llm_engine.engine_core.shutdown()
    logits = load(made / fmt, "float32").logits(torch.tensor([*prompt, *out.token_ids]))
    answer = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    picked = answer.gather(1, torch.tensor(list(out.token_ids))[:, None])[:, 0]
    assert (answer.max(-1).values - picked).max() < LOGPROB


def test_variants_are_refused_before_weights_are_read(made, tmp_path):
    shard = next((made / "base").glob("*.safetensors"))
    (tmp_path / shard.name).write_bytes(shard.read_bytes())
    hf = json.loads((made / "base" / "config.json").read_text()) | {"expert_dtype": "fp4"}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match=r"w1.weight is F8_E4M3, .*FP4 experts.* asks for I8"):
        configure(tmp_path)
    with pytest.raises(ValueError, match="--quantization is 'fp8'; dsv4-plugin takes it from the"):
        configure(made / "fp8-fp4", quantization="fp8")


def test_v41_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(v41_fields()))
    with pytest.raises(Exception, match=re.escape(V41_REFUSED)):
        configure(tmp_path)


def test_vision_exp_is_the_plugin_s_for_text(made):
    """vLLM gives its model another name, and knows of no images in it."""
    config = configure(made / "vision").model_config
    assert config.architectures == [VISION_ARCHITECTURE]
    assert config.hf_config.model_type == SERVED_TYPE
    assert not config.is_multimodal_model


@pytest.mark.parametrize(
    ("asked", "kv", "codec"),
    [
        ({}, "fp8", FP8IndexRows),
        ({FP4_INDEXER: True}, "fp8", FP4IndexRows),
        ({FP4_INDEXER: True}, "bfloat16", FP4IndexRows),
        ({FP4_INDEXER: False}, "fp8", FP8IndexRows),
        ({"indexer_kv_dtype": "bf16"}, "fp8", BFloat16Rows),
    ],
)
def test_indexer_rows(made, asked, kv, codec):
    config = configure(made / "fp8-fp4", kv_cache_dtype=kv, attention_config=asked)
    layout = cache_layout(model_config_of(config), config)
    assert isinstance(layout.page[CSA].parts["key"].codec, codec)
    assert isinstance(layout.window.parts["kv"].codec, FP8KVRows) == (kv == "fp8")


def test_the_guides_name_still_needs_help():
    """When this fails, vLLM knows the option again and the shim in _compat can go."""
    assert FP4_INDEXER not in AttentionConfig.__dataclass_fields__
    with pytest.raises(ValueError, match="nvfp4"):
        AttentionConfig(indexer_kv_dtype="int4")


@pytest.mark.thorough
def test_the_vendors_command_line(tmp_path_factory):
    """As it stands in the guides, on the tiny checkpoint: FP8 + FP4 weights, fp8 rows, FP4 keys."""
    folder = tmp_path_factory.mktemp("guide")
    make_checkpoint(folder / "tiny", "tiny", fmt="fp8-fp4")
    flags = GUIDE + " --max-model-len 4096"
    memory = {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with Server(folder / "tiny", folder / "server.log", flags, memory) as server:
        body = {"prompt": "Hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        answer = server.post("/v1/completions", {"model": MODEL} | body)
        log = server.read_log()
    assert answer["usage"]["completion_tokens"] == 4
    assert "FP8KV rows" in log
    assert "FP4Index keys" in log
    assert re.search(r"\d+ bytes per token .* tokens fit", log)
    assert "GiB of them packed" in log
