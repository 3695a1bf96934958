"""dsv4-mini through the real vLLM engine: the local engine's greedy answers, all in company."""

import os

import pytest

from dsv4_plugin.engine import load
from dsv4_plugin.tools.conversations import SKILLS, held_out
from training.data import Renderer

NEW = 64


@pytest.mark.thorough
def test_greedy_answers(mini):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vllm import LLM, SamplingParams

    renderer = Renderer()
    prompts = [renderer.prompt(c) for skill in SKILLS for c in held_out(skill, 3)]
    expected = load(mini, dtype="float32").generate(prompts, NEW)
    engine = LLM(
        str(mini),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1024,
        max_num_batched_tokens=300,
        max_num_seqs=8,
        kv_cache_memory_bytes=200 << 20,
        enforce_eager=True,
    )
    params = SamplingParams(temperature=0, max_tokens=NEW, stop_token_ids=[1], detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)
    engine.llm_engine.engine_core.shutdown()
    assert [list(o.outputs[0].token_ids) for o in outputs] == expected
