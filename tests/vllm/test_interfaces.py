"""What the adapter needs of vLLM, checked by importing it: also runs on another version's unpacked
wheel (`PYTHONPATH=UNPACKED VLLM_PLUGINS= pytest tests/vllm/test_interfaces.py`)."""

from __future__ import annotations

import inspect
from importlib import import_module
from operator import attrgetter

import pytest

ADAPTER = (
    "active registration config cache graphs model parallel choice chat_renderer tokenizer "
    "tool_parser reasoning_parser"
)


@pytest.mark.parametrize("module", ADAPTER.split())
def test_the_adapter_imports(module):
    import_module(f"vllm_ext.{module}")


@pytest.mark.parametrize(
    ("path", "needed"),
    [
        ("vllm.model_executor.layers.linear:ColumnParallelLinear", "bias prefix return_bias"),
        ("vllm.model_executor.layers.linear:RowParallelLinear", "prefix reduce_results"),
        ("vllm.model_executor.layers.linear:ReplicatedLinear", "bias prefix return_bias"),
        (
            "vllm.v1.kv_cache_interface:FullAttentionSpec",
            "block_size num_kv_heads head_size dtype tokens_per_state state_content_bytes",
        ),
        ("vllm.v1.kv_cache_interface:SlidingWindowSpec", "sliding_window state_content_bytes"),
        ("vllm.v1.kv_cache_interface:CircularBufferSpec", "tokens_per_state state_content_bytes"),
        (
            "vllm.v1.attention.backend:CommonAttentionMetadata",
            "query_start_loc seq_lens num_reqs block_table_tensor",
        ),
        (
            "vllm.v1.attention.backend:AttentionMetadataBuilder.get_cudagraph_support",
            "vllm_config kv_cache_spec",
        ),
    ],
)
def test_arguments(path, needed):
    module, name = path.split(":")
    signature = inspect.signature(attrgetter(name)(import_module(module)))
    assert set(needed.split()) <= set(signature.parameters)


def test_the_configuration_hook_runs_before_the_platforms():
    source = inspect.getsource(import_module("vllm.config.vllm").VllmConfig.__post_init__)
    ours, theirs = "try_verify_and_update_config()", "check_and_update_config("
    assert 0 < source.index(ours) < source.index(f"current_platform.{theirs}")
