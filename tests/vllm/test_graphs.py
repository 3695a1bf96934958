"""What vLLM is told of CUDA graphs, and what a captured step would read when it is replayed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import AttentionCGSupport

from lab.kit import mode
from vllm_ext.cache import MetadataBuilder
from vllm_ext.config import PluginConfig


def config() -> SimpleNamespace:
    return SimpleNamespace(
        device_config=SimpleNamespace(device="cpu"),
        model_config=SimpleNamespace(max_model_len=4096),
    )


@pytest.mark.parametrize(("kernels", "supported"), [("triton", True), ("torch", False)])
def test_decode_steps_of_the_device(monkeypatch, kernels, supported):
    """Without a word from the user, with drafts and without, in every layout of GPUs."""
    mode.kernels(monkeypatch, kernels)
    found = MetadataBuilder.get_cudagraph_support(config(), None)
    assert found == (AttentionCGSupport.UNIFORM_BATCH if supported else AttentionCGSupport.NEVER)


def test_a_captured_step_reads_vllm_s_buffers(monkeypatch):
    """Not copies of them, and is made for the longest request there may be."""
    mode.kernels(monkeypatch, "triton")
    builder = MetadataBuilder(None, [], config(), torch.device("cpu"))
    given = SimpleNamespace(
        num_reqs=3, max_query_len=1, max_seq_len=7,
        block_table_tensor=torch.zeros(8, 4, dtype=torch.int32),
        query_start_loc=torch.arange(9, dtype=torch.int32),
        seq_lens=torch.ones(8, dtype=torch.int32),
    )  # fmt: skip
    found = builder.build_for_cudagraph_capture(given)
    assert found.longest == 4096
    assert found.longest_query == 1
    for mine, theirs in (
        (found.table, given.block_table_tensor),
        (found.query_start, given.query_start_loc),
        (found.seq_lens, given.seq_lens),
    ):
        assert mine.data_ptr() == theirs.data_ptr()
    assert [len(found.table), len(found.query_start), len(found.seq_lens)] == [3, 4, 3]


@pytest.mark.parametrize("kernels", ["torch", "reference", "auto"])
def test_steps_in_torch_are_not_captured(small, monkeypatch, kernels):
    """Whatever is asked for; what a GPU may do with its own is left to vLLM."""
    mode.kernels(monkeypatch, kernels)
    config = EngineArgs(
        model=str(small), skip_tokenizer_init=True, max_model_len=512,
    ).create_engine_config()  # fmt: skip
    config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE  # not vLLM's, on a CPU
    PluginConfig.verify_and_update_config(config)
    left = CUDAGraphMode.PIECEWISE if kernels == "auto" else CUDAGraphMode.NONE
    assert config.compilation_config.cudagraph_mode == left
