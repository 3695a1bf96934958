"""The vLLM adapter as on a GPU, with the emulator in the GPU's place: chunks, mixes, decoding."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from dsv4_plugin import load
from dsv4_plugin.kernels.dispatch import use_triton
from dsv4_plugin.model.attention import Attention
from dsv4_plugin.tools.make import make_checkpoint
from dsv4_plugin.warmup import compiled
from lab.kit import mode
from lab.kit.graphs import RecordedGraph, recorded
from tests.conftest import A_LAYER_OF_EACH, SMALL, random_ids
from tests.tolerances import clear_choices
from tests.vllm.engine import rebind

NEW = 4
pytestmark = pytest.mark.skipif(mode.NAMES[0] != "sm80", reason="an engine, on one architecture")


def generate(engine, prompts):
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": p} for p in prompts]
    found = engine.generate(asked, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in found]


class Graphs:
    """vLLM's model, captured at the first step of its kind and replayed at that and all later ones.

    Kinds are vLLM's two modes: whole graphs of steps of one token a request, for the longest
    request there may be; any others' as graphs that break, by number of rows.
    """

    def __init__(self, model):
        self.model, self.captured, self.replays = model, {}, Counter()

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, **inputs):
        from vllm.forward_context import get_forward_context

        context = get_forward_context()
        metadata = context.attn_metadata
        rows = len(inputs["input_ids"])
        if metadata is None:
            return self.model(**inputs)
        groups = list(metadata.values())
        whole = len(groups[0].seq_lens) == rows
        given = [inputs["input_ids"]]
        if whole:
            given += [t for g in groups for t in (g.table, g.query_start, g.seq_lens)]
        addresses = [t.data_ptr() for t in given]
        if (whole, rows) not in self.captured:
            longest = {k: replace(g, longest=512) for k, g in metadata.items()} if whole else None
            context.attn_metadata = longest  # for graphs that break there is none so far
            graph, out = self._capture(whole, inputs)
            context.attn_metadata = metadata
            self.captured[whole, rows] = graph, addresses, out
        graph, known, out = self.captured[whole, rows]
        assert addresses == known
        graph.replay()
        self.replays[whole, rows] += 1
        return out

    def _capture(self, whole, inputs):
        from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture

        if whole:
            graph = RecordedGraph()
            graph.capture_begin()
            out = self.model(**inputs)
            graph.capture_end()
            return graph, out
        with BreakableCUDAGraphCapture() as graph:
            out = self.model(**inputs)
        return graph, out


@pytest.mark.parametrize("gpu", mode.NAMES[:1], indirect=True)
@pytest.mark.parametrize("fmt", ["bf16", pytest.param("fp8-fp4", marks=pytest.mark.thorough)])
def test_the_engine_gives_torch_s_tokens(gpu, fmt, tmp_path, monkeypatch):
    """Greedy tokens; where two logits nearly tie, either may be chosen. From replayed graphs, whole
    ones and, with vLLM's own recorder, breaking ones, come the same, from caches bound anew."""
    checkpoint = tmp_path / "three"
    make_checkpoint(checkpoint, "tiny", 2, SMALL | A_LAYER_OF_EACH, tokenizer=False, fmt=fmt)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    mode.kernels(monkeypatch, "triton")
    from vllm import LLM
    from vllm.compilation import breakable_cudagraph

    monkeypatch.setattr(breakable_cudagraph, "weak_ref_tensor", lambda tensor: tensor)
    stops = Counter()
    attend = Attention.forward

    def stopping(self, *given):
        stops[use_triton(given[0].device)] += 1
        return attend(self, *given)

    monkeypatch.setattr(Attention, "forward", stopping)  # as a debugger would see it
    prompts = [random_ids(n, seed=n).tolist() for n in (5, 140, 20, 12, 8)]
    mixed, batches = prompts[:3], [prompts[2:3], prompts[3:]]  # of 20 rows each
    engine = LLM(
        str(checkpoint), skip_tokenizer_init=True, dtype="bfloat16", kv_cache_dtype="fp8",
        max_model_len=512, max_num_seqs=4, max_num_batched_tokens=128, enforce_eager=True,
        kv_cache_memory_bytes=100 << 20, num_gpu_blocks_override=40,
    )  # fmt: skip
    try:
        with compiled() as late:
            found = generate(engine, mixed)
        assert not late  # the warm-up compiled whatever these need
        untouched = rebind(engine)
        expected = [generate(engine, batch) for batch in batches]
        assert expected[0] == found[2:]
        with recorded(gpu, monkeypatch):
            runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
            runner.model = graphs = Graphs(runner.model)
            assert [generate(engine, batch) for batch in batches] == expected
        assert untouched()
    finally:
        engine.llm_engine.engine_core.shutdown()
    assert graphs.replays == {(False, 20): 2, (True, 1): NEW - 1, (True, 2): NEW - 1}
    breaking = graphs.captured[False, 20][0]
    assert breaking.num_eager_breaks == 1 + 3  # the step's metadata, and each layer's attention
    assert all(graph.__self__.launches for graph in breaking.segments[2::2])
    mode.kernels(monkeypatch, "torch")
    model = load(checkpoint, dtype="bfloat16", kv_dtype="fp8")
    clear = [clear_choices(model, *pair) for pair in zip(mixed, found, strict=True)]
    assert sum(clear) >= NEW
    assert min(stops[True], stops[False]) >= 3 * len(mixed)  # the emulated engine's, and the CPU's


@pytest.mark.thorough
@pytest.mark.parametrize("gpu", mode.NAMES[:1], indirect=True)
def test_drafts_change_nothing(gpu, tmp_path, monkeypatch):
    """MTP drafts by the kernels: the tokens are those without, from rings that go back."""
    checkpoint = tmp_path / "three"
    overrides = SMALL | A_LAYER_OF_EACH | {"num_nextn_predict_layers": 1}
    make_checkpoint(checkpoint, "tiny", 2, overrides, tokenizer=False)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    mode.kernels(monkeypatch, "triton")
    from vllm import LLM

    prompts = [random_ids(n, seed=n).tolist() for n in (5, 20)]
    found = []
    for drafts in (None, {"method": "mtp", "num_speculative_tokens": 2}):
        engine = LLM(
            str(checkpoint), skip_tokenizer_init=True, dtype="bfloat16", kv_cache_dtype="fp8",
            max_model_len=512, max_num_seqs=4, max_num_batched_tokens=128, enforce_eager=True,
            kv_cache_memory_bytes=100 << 20, num_gpu_blocks_override=40,
            **({} if drafts is None else {"speculative_config": drafts}),
        )  # fmt: skip
        try:
            with compiled() as late:
                found.append(generate(engine, prompts))
            assert not late  # the drafter's warm-up is one of its own
        finally:
            engine.llm_engine.engine_core.shutdown()
    mode.kernels(monkeypatch, "torch")
    model = load(checkpoint, dtype="bfloat16", kv_dtype="fp8")
    for answers in found:
        clear = [clear_choices(model, *pair) for pair in zip(prompts, answers, strict=True)]
        assert sum(clear) >= NEW
