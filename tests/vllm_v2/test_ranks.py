"""Drafts over two ranks on the V2 runner: processes that are forked, so that they too have Triton's
interpreter in the GPU's place."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from dsv4_plugin import load
from dsv4_plugin.batch import Sampler
from dsv4_plugin.speculate import Speculator
from dsv4_plugin.tools.conversations import SKILLS, held_out
from dsv4_plugin.tools.mini import make_mini
from lab.kit import mode
from tests.vllm_v2.engine import counted, generate
from training.data import Renderer

NEW = 24


@pytest.mark.thorough
@pytest.mark.parametrize(("method", "n"), [("dspark", 5), ("mtp", 2)])
def test_two_ranks(method, n, tmp_path, monkeypatch):
    """Answers are those of one process without drafts, and as many drafts are kept as there."""
    from vllm import LLM
    from vllm.v1.executor import multiproc_executor

    mode.kernels(monkeypatch, "torch")
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiproc_executor, "get_mp_context", lambda: fork)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    make_mini(tmp_path / "mini", dspark=method == "dspark")
    renderer = Renderer()
    prompts = [
        renderer.prompt(c) for skill in SKILLS if skill != "memory" for c in held_out(skill, 1)
    ]
    local = Speculator(load(tmp_path / "mini", "float32", mtp=True), n)
    with torch.inference_mode():
        expected = local.generate(prompts, NEW, Sampler(0.0, None), 256, ignore_eos=True)
    llm = LLM(
        str(tmp_path / "mini"), skip_tokenizer_init=True, dtype="float32", max_model_len=2048,
        max_num_seqs=4, max_num_batched_tokens=256, kv_cache_memory_bytes=100 << 20,
        enforce_eager=True, disable_log_stats=False, tensor_parallel_size=2,
        speculative_config={"method": method, "num_speculative_tokens": n},
    )  # fmt: skip
    try:
        assert generate(llm, prompts, NEW) == expected
        found = counted(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
    kept = local.accepted / local.drafted
    assert kept > 0.5
    assert found["accepted"] / found["drafted"] == pytest.approx(kept, abs=0.05)
