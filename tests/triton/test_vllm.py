"""The vLLM adapter as on a GPU, with the emulator in the GPU's place: chunks, mixes, decoding."""

from __future__ import annotations

import pytest

from dsv4_plugin import load
from dsv4_plugin.warmup import compiled
from tests.conftest import random_ids
from tests.kit import mode
from tests.tolerances import clear_choices

NEW = 4
pytestmark = pytest.mark.skipif(mode.NAMES[0] != "sm80", reason="an engine, on one architecture")


@pytest.mark.parametrize("gpu", mode.NAMES[:1], indirect=True)
def test_the_engine_gives_torch_s_tokens(gpu, small, monkeypatch):
    """Greedy tokens of three requests; where two logits nearly tie, either may be chosen."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("DSV4_KERNELS", "triton")
    from vllm import LLM, SamplingParams

    prompts = [random_ids(n, seed=n).tolist() for n in (5, 140, 20)]
    engine = LLM(
        str(small), skip_tokenizer_init=True, dtype="bfloat16", kv_cache_dtype="fp8",
        max_model_len=512, max_num_batched_tokens=128, max_num_seqs=4,
        kv_cache_memory_bytes=100 << 20, num_gpu_blocks_override=40, enforce_eager=True,
    )  # fmt: skip
    try:
        params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": p} for p in prompts]
        with compiled() as late:
            found = engine.generate(asked, params, use_tqdm=False)
    finally:
        engine.llm_engine.engine_core.shutdown()
    assert not late  # the warm-up compiled whatever these need
    monkeypatch.setenv("DSV4_KERNELS", "torch")
    model = load(small, dtype="bfloat16", kv_dtype="fp8")
    clear = [
        clear_choices(model, prompt, list(output.outputs[0].token_ids))
        for prompt, output in zip(prompts, found, strict=True)
    ]
    assert sum(clear) >= NEW
