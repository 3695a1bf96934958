"""vLLM's DSpark drafter as on a GPU, with the emulator in the GPU's place. (The runner that drives
it has kernels of its own, which the emulator does not run: tests/vllm_v2 interprets them.)"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv4_plugin.tools.formats import dspark_fields
from dsv4_plugin.tools.make import make_checkpoint, preset_fields
from dsv4_plugin.warmup import compiled
from lab.kit import mode
from tests.conftest import A_LAYER_OF_EACH, SMALL

REQUESTS, ROWS, WIDTH, BLOCKS = 4, 64, 5, 16
pytestmark = pytest.mark.skipif(mode.NAMES[0] != "sm80", reason="a drafter, on one architecture")


@contextmanager
def drafter(checkpoint: Path, tmp_path: Path) -> Iterator[tuple[Any, Any]]:
    """vLLM's configuration, and its drafter in an engine of one process."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    config = EngineArgs(
        model=str(checkpoint), skip_tokenizer_init=True, dtype="bfloat16", kv_cache_dtype="fp8",
        max_model_len=512, max_num_seqs=REQUESTS, max_num_batched_tokens=ROWS, enforce_eager=True,
        speculative_config={"method": "dspark", "num_speculative_tokens": WIDTH},
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        meeting = f"file://{tmp_path / 'meeting'}"
        parallel_state.init_distributed_environment(1, 0, meeting, 0, "gloo")
        parallel_state.initialize_model_parallel(1, 1)
        try:
            of_drafts = config.speculative_config.draft_model_config
            yield config, get_model(vllm_config=config, model_config=of_drafts)
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()


@pytest.mark.thorough
@pytest.mark.parametrize("gpu", mode.NAMES[:1], indirect=True)
def test_nothing_is_compiled_after_the_warm_up(gpu, tmp_path, monkeypatch):
    """Which caches set off: window rows of prompts and of verified drafts, and blocks of few
    requests and many."""
    checkpoint = tmp_path / "blocks"
    fields = SMALL | A_LAYER_OF_EACH
    fields |= dspark_fields(preset_fields("tiny") | fields)
    make_checkpoint(checkpoint, "tiny", 2, fields, tokenizer=False)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    mode.kernels(monkeypatch, "triton")
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.models import registry

    from vllm_ext.cache import GroupMetadata

    # What vLLM's build for CPUs lacks, and a process of its own, where no emulator would be.
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())
    with drafter(checkpoint, tmp_path) as (config, model), torch.inference_mode():
        model.cache.bind_kv_cache(torch.full((BLOCKS, 1, 1, model.cache.words), -1).int())
        model.model.embed_tokens = torch.nn.Embedding(512, model.config.hidden_size).bfloat16()
        width = len(model.network.dspark.target_layer_ids) * model.config.hidden_size
        block = model.layout.window_block
        table = torch.arange(1, BLOCKS, dtype=torch.int32)[: 3 * REQUESTS].view(REQUESTS, -1)
        with compiled() as late:
            for rows in (1, WIDTH + 1, ROWS):
                main = model.combine_hidden_states(torch.randn(rows, width).bfloat16())
                positions = torch.arange(rows) % (2 * block)
                slots = table[0, positions // block].long() * block + positions % block
                model.precompute_and_store_context_kv(main, positions, [slots])
            for requests in (1, REQUESTS):
                ends = torch.arange(requests + 1, dtype=torch.int32) * WIDTH
                lengths = torch.full((requests,), WIDTH, dtype=torch.int32)
                step = GroupMetadata(table[:requests], ends, lengths, WIDTH, WIDTH)
                ids = torch.arange(requests * WIDTH, dtype=torch.int32)
                found = {model.cache.prefix: step}
                with set_forward_context(found, config, num_tokens=len(ids)):
                    y = model(ids, ids.long())
                assert y.shape == (len(ids), model.config.hidden_size)
                assert y.isfinite().all()
        assert not late
