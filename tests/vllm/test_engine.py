"""The real vLLM engine in float32 against transformers: chunks, hits, preemption, company."""

from __future__ import annotations

import pytest

from tests.vllm.engine import check, counters, engine, generate, rebind, sixteen_prompts

POOL = 90
"""Blocks: about 10 of the 16 requests fit to their end, so some are preempted."""


@pytest.fixture(scope="module")
def llm(small):
    with engine(small, POOL) as running:
        yield running


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return sixteen_prompts()


def test_the_plugin_serves_with_chunks_and_prefixes(llm):
    config = llm.llm_engine.vllm_config
    assert not config.model_config.use_mla
    assert config.cache_config.enable_prefix_caching
    assert config.scheduler_config.enable_chunked_prefill


@pytest.mark.thorough
def test_alone(llm, small, reference, prompts):
    """One after another; 700 tokens come in chunks of at most 96."""
    for prompt in (prompts[4], prompts[8]):
        (output,) = generate(llm, [prompt], prompt_logprobs=0)
        check(reference, small, prompt, output)


def test_sixteen_at_once_in_a_small_pool(llm, small, reference, prompts):
    before = counters(llm)
    outputs = generate(llm, prompts, prompt_logprobs=0)
    assert counters(llm)["num_preemptions"] > before["num_preemptions"]
    for prompt, output in zip(prompts, outputs, strict=True):
        check(reference, small, prompt, output)


def test_caches_are_bound_again(llm, small, reference, prompts):
    """No view of the set that was there before is used, however often that happens."""
    for _ in range(2):
        untouched = rebind(llm)
        for prompt, output in zip(prompts[3:6], generate(llm, prompts[3:6]), strict=True):
            check(reference, small, prompt, output)
        assert untouched()


def test_only_the_set_that_serves_is_reported(llm, monkeypatch):
    """vLLM knows its number of blocks before it binds it, and none while it measures graphs."""
    reported = []
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    monkeypatch.setattr(model, "_report", lambda: reported.append(model.caches.window.blocks))
    config = llm.llm_engine.vllm_config.cache_config
    monkeypatch.setattr(config, "num_gpu_blocks", None)
    rebind(llm, 4)
    assert reported == []
    monkeypatch.setattr(config, "num_gpu_blocks", POOL)
    rebind(llm, POOL)
    assert reported == [POOL]


def test_prefix_hits(llm, small, reference, prompts):
    """Asking for prompt_logprobs recomputes prompts in vLLM, so hits are shown without."""
    generate(llm, prompts[12:13])
    before = counters(llm)
    (output,) = generate(llm, prompts[13:14])
    assert counters(llm)["prefix_cache_hits"] - before["prefix_cache_hits"] == 512
    check(reference, small, prompts[13], output)


def test_abort_frees_everything(llm, prompts):
    from vllm import SamplingParams

    engine = llm.llm_engine
    for i, prompt in enumerate(prompts[:4]):
        engine.add_request(
            f"abort-{i}",
            {"prompt_token_ids": prompt},
            SamplingParams(max_tokens=500, detokenize=False),
        )
    for _ in range(5):
        engine.step()
    engine.abort_request([f"abort-{i}" for i in range(4)])
    while engine.has_unfinished_requests():
        engine.step()
    engine.step()
    usage = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    assert usage["vllm:kv_cache_usage_perc"] == 0
