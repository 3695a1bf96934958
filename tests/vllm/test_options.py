"""vLLM's options: what is refused, in one sentence and before any weight is read; what is taken."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from vllm.config.cache import CacheDType
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

import vllm_ext
from dsv4_plugin.cache.rows import BFloat16Rows, Float32Rows, FP8KVRows
from dsv4_plugin.tools.make import make_checkpoint
from lab.paths import ROOT
from tests.conftest import SMALL
from tests.refusals import named
from tests.vllm_chat.server import Server
from vllm_ext._compat import end_streams_at_shutdown
from vllm_ext.config import _KV_DTYPES, PAGE_SIZE, cache_layout, model_config_of

MTP = {"method": "mtp", "num_speculative_tokens": 1}


@pytest.fixture(autouse=True)
def registered():
    vllm_ext.register()


def configure(directory, **options):
    options = {"dtype": "float32", "skip_tokenizer_init": True, "max_model_len": 2048} | options
    return EngineArgs(model=str(directory), **options).create_engine_config()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"block_size": 96}, "--block-size is 96; it must be a multiple of 128"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype is 'fp8_e5m2'; allowed are auto, bfl"),
        ({"dtype": "float16"}, "--dtype is 'float16'; allowed are float32 and bfloat16"),
        (
            {"enable_lora": True, "enforce_eager": True},
            "--enable-lora is given; dsv4-plugin does not support it so far, so leave it out",
        ),
        ({"tensor_parallel_size": 8}, "--tensor-parallel-size is 8; it must divide num_attention"),
        (
            {"enable_expert_parallel": True, "tensor_parallel_size": 2, "data_parallel_size": 5},
            "--enable-expert-parallel over 10 ranks needs an expert for each; n_routed_experts is",
        ),
        (
            {"speculative_config": MTP},
            "a checkpoint that has 1, so leave --speculative-config",
        ),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 1}},
            "--speculative-config.method is 'ngram'; dsv4-plugin drafts with 'mtp' and 'dspark', "
            "whichever a checkpoint has",
        ),
        ({"quantization": "fp8"}, "--quantization is 'fp8'; dsv4-plugin takes it from the checkpo"),
        (
            {"decode_context_parallel_size": 2, "tensor_parallel_size": 2},
            "--decode-context-parallel-size is given; dsv4-plugin does not support it so far",
        ),
    ],
)
def test_refused_options(small, options, sentence):
    with pytest.raises((ValueError, NotImplementedError), match=sentence):
        configure(small, **options)


def test_drafts_on_pipeline_stages_are_refused(tmp_path):
    fields = SMALL | {"num_nextn_predict_layers": 1}
    make_checkpoint(tmp_path / "drafting", "tiny", 1, fields, tokenizer=False)
    sentence = "--pipeline-parallel-size is 2 and --speculative-config is given; vLLM's model run"
    with pytest.raises(NotImplementedError, match=sentence):
        configure(tmp_path / "drafting", speculative_config=MTP, pipeline_parallel_size=2)


def test_refusals_name_options():
    assert not named(AsyncEngineArgs.__dataclass_fields__, "vllm_ext", "dsv4_plugin")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("DSV4_MODEL", "mine", "DSV4_MODEL is 'mine'; allowed are auto, plugin, native"),
        ("DSV4_CHAT", "mine", "DSV4_CHAT is 'mine'; allowed are plugin, native"),
        ("DSV4_KERNELS", "triton", "DSV4_KERNELS is 'triton', but Triton finds no GPU driver here"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_a_server_s_last_words_are_the_refusal(small, tmp_path, variable, value, sentence):
    server = Server(small, tmp_path / "log", "--skip-tokenizer-init", {variable: value})
    server.launch()
    try:
        assert server.process.wait(120) == 1
    finally:
        server.stop()
    log = server.read_log()
    assert sentence in "".join(log.splitlines()[-3:])
    assert log.count("Traceback") == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"compress_ratios": [0, 4, 7, 4, 128]}, r"compress_ratios\[2\] is 7; allowed are 0, 4"),
        ({"hidden_size": 64}, "embed.weight has shape"),
    ],
)
def test_refused_checkpoints(small, tmp_path, change, sentence):
    broken = tmp_path / "broken"
    shutil.copytree(small, broken)
    path = broken / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=sentence):
        configure(broken)


def test_a_truncated_shard_is_refused(small, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(small, broken)
    shard = next(broken.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is truncated"):
        configure(broken)


@pytest.mark.parametrize(
    ("options", "codec"),
    [
        ({}, Float32Rows),
        ({"dtype": "bfloat16"}, BFloat16Rows),
        ({"kv_cache_dtype": "bfloat16"}, BFloat16Rows),
        ({"kv_cache_dtype": "fp8"}, FP8KVRows),
        ({"dtype": "bfloat16", "kv_cache_dtype": "fp8"}, FP8KVRows),
    ],
)
def test_cache_dtypes(small, options, codec):
    config = configure(small, **options)
    layout = cache_layout(model_config_of(config), config)
    assert isinstance(layout.window.parts["kv"].codec, codec)


def test_offered_cache_dtypes_are_those_that_vllm_takes():
    assert set(_KV_DTYPES) <= set(get_args(CacheDType))
    row = re.search(
        r"^\| `--kv-cache-dtype` \| ([^|]+)", (ROOT / "docs/engines.md").read_text(), re.M
    )
    assert re.findall(r"`(\w+)`", row[1]) == list(_KV_DTYPES)


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("DSV4_DEFAULT_EFFORT", "foo", "DSV4_DEFAULT_EFFORT is 'foo'; allowed are none, minimal"),
        ("DSV4_KERNELS", "triton", "DSV4_KERNELS is 'triton', but Triton finds no GPU driver here"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_variables_are_checked_at_start(small, monkeypatch, variable, value, sentence):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=sentence):
        configure(small)


def test_requests_hear_of_the_engines_end(monkeypatch):
    """Even where vLLM's own messenger is cancelled first."""

    async def server() -> list[Exception]:
        async def messenger():
            await asyncio.sleep(60)

        told: list[Exception] = []
        engine = SimpleNamespace(
            output_handler=asyncio.create_task(messenger()),
            output_processor=SimpleNamespace(propagate_error=told.append),
        )
        await asyncio.to_thread(AsyncLLM.shutdown, engine)
        await asyncio.sleep(0)
        return told

    def stopped(self, timeout=None):
        self.output_handler.get_loop().call_soon_threadsafe(self.output_handler.cancel)

    monkeypatch.setattr(AsyncLLM, "shutdown", stopped)
    assert asyncio.run(server()) == []
    end_streams_at_shutdown()
    end_streams_at_shutdown()
    assert [type(error) for error in asyncio.run(server())] == [EngineDeadError]


def test_block_size_and_batch_limits(small):
    assert configure(small).cache_config.block_size == PAGE_SIZE
    config = configure(small, block_size=128, max_num_seqs=1024, max_model_len=-1)
    assert config.cache_config.block_size == 128
    assert config.scheduler_config.max_num_seqs == 1024
    assert config.cache_config.enable_prefix_caching
    assert config.scheduler_config.enable_chunked_prefill
