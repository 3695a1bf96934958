"""The real vLLM engine in float32 against transformers: chunks, hits, preemption, company."""

from __future__ import annotations

import os

import pytest
import torch

from tests.conftest import random_ids
from tests.tolerances import LOGPROB, TIE

NEW = 64
POOL = 90
"""Blocks: about 10 of the 16 requests fit to their end, so some are preempted."""


@pytest.fixture(scope="module")
def llm(small):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vllm import LLM

    engine = LLM(
        str(small),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1024,
        max_num_batched_tokens=96,
        max_num_seqs=16,
        kv_cache_memory_bytes=200 << 20,
        num_gpu_blocks_override=POOL,
        enforce_eager=True,
        disable_log_stats=False,
    )
    engine.apply_model(poison)
    yield engine
    engine.llm_engine.engine_core.shutdown()


def poison(model) -> None:
    """Fill the caches with NaN: whatever is read before it was written shows."""
    storage = model.caches.window.storage.untyped_storage()
    torch.empty(0).set_(storage)[:] = float("nan")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """16 prompts of 6 to 700 tokens; some share a prefix of 300 or 520 tokens."""
    shared = random_ids(520, seed=20).tolist()
    alone = [random_ids(n, seed=n).tolist() for n in (6, 40, 127, 128, 129, 255, 256, 257, 700)]
    return alone + [
        shared[:n] + random_ids(7 + n % 13, seed=n).tolist()
        for n in (300, 301, 512, 513, 520, 256, 40)
    ]


def counters(llm) -> dict[str, float]:
    names = ("num_preemptions", "prefix_cache_hits", "prompt_tokens")
    found = {m.name.removeprefix("vllm:"): m for m in llm.get_metrics()}
    return {name: found[name].value for name in names}


def generate(llm, prompts):
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=NEW, logprobs=0, prompt_logprobs=0, ignore_eos=True,
        detokenize=False,
    )  # fmt: skip
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def check(reference, small, prompt, output) -> None:
    """Every token is the reference's best (ties aside), every log-probability its own."""
    ids = list(output.outputs[0].token_ids)
    expected = reference(small, torch.tensor(prompt + ids)).log_softmax(-1)
    answer = expected[len(prompt) - 1 : -1]
    picked = answer.gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert (answer.max(-1).values - picked).max() < TIE
    found = torch.tensor(
        [step[t].logprob for step, t in zip(output.outputs[0].logprobs, ids, strict=True)]
    )
    assert (found - picked).abs().max() < LOGPROB
    if output.prompt_logprobs is not None:
        asked = torch.tensor(prompt[1:])
        found = torch.tensor(
            [
                step[int(t)].logprob
                for step, t in zip(output.prompt_logprobs[1:], asked, strict=True)
            ]
        )
        truth = expected[: len(prompt) - 1].gather(1, asked[:, None])[:, 0]
        assert (found - truth).abs().max() < LOGPROB


def test_the_plugin_serves_with_chunks_and_prefixes(llm):
    config = llm.llm_engine.vllm_config
    assert not config.model_config.use_mla
    assert config.cache_config.enable_prefix_caching
    assert config.scheduler_config.enable_chunked_prefill


def test_alone(llm, small, reference, prompts):
    """One after another; 700 tokens come in chunks of at most 96."""
    for prompt in (prompts[4], prompts[8]):
        check(reference, small, prompt, generate(llm, [prompt])[0])


def test_sixteen_at_once_in_a_small_pool(llm, small, reference, prompts):
    before = counters(llm)
    outputs = generate(llm, prompts)
    assert counters(llm)["num_preemptions"] > before["num_preemptions"]
    for prompt, output in zip(prompts, outputs, strict=True):
        check(reference, small, prompt, output)


def test_prefix_hits(llm, small, reference, prompts):
    """Asking for prompt_logprobs recomputes prompts in vLLM, so hits are shown without."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=NEW, logprobs=0, ignore_eos=True, detokenize=False
    )
    llm.generate([{"prompt_token_ids": prompts[12]}], params, use_tqdm=False)
    before = counters(llm)
    output = llm.generate([{"prompt_token_ids": prompts[13]}], params, use_tqdm=False)[0]
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
