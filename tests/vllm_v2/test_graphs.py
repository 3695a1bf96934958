"""Drafting and verifying, each one captured graph a batch size, or graphs that break at attention:
by vLLM's own graph managers, with a recorder in CUDA's place and Triton's interpreter in the GPU's.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager, nullcontext

import pytest

from dsv4_plugin.tools.make import make_checkpoint
from lab.kit import mode
from lab.kit.graphs import RecordedGraph, recorded_interpreter
from tests.conftest import SMALL, random_ids
from tests.vllm_v2.engine import Watch, engine, generate, runner

PROMPT = 5
"""Its tokens."""


def graphs_of(manager):
    """Whole ones, and the pieces of those that break, with how often these do."""
    found, breaks = list(manager.graphs.values()), set()
    if manager.breakable_cg_runner is not None:
        for entry in manager.breakable_cg_runner.entries.values():
            found += [piece.__self__ for piece in entry.capture.segments[::2]]
            breaks.add(entry.capture.num_eager_breaks)
    return found, breaks


@contextmanager
def capturing(monkeypatch):
    """Inside, vLLM's managers capture and replay recorded graphs; yields how often each was."""
    from vllm.compilation import breakable_cudagraph
    from vllm.v1.worker.gpu import cudagraph_utils

    replays = Counter()

    @contextmanager
    def graph(into, pool, stream):
        into.capture_begin()
        yield
        into.capture_end()

    replay = RecordedGraph.replay

    def counted(self):
        replays[self] += 1
        replay(self)

    with recorded_interpreter(monkeypatch), monkeypatch.context() as patch:
        import torch

        platform = cudagraph_utils.current_platform
        patch.setattr(type(platform), "get_global_graph_pool", lambda self: None)
        patch.setattr(cudagraph_utils, "graph_capture", lambda device: nullcontext())
        patch.setattr(cudagraph_utils, "capture_pool", lambda pool, config: nullcontext())
        patch.setattr(cudagraph_utils, "current_stream", lambda: None)
        patch.setattr(torch.cuda, "graph", graph)
        for module in (breakable_cudagraph, torch.accelerator):
            for name in ("weak_ref_tensor", "weak_ref_tensors", "empty_cache"):
                if hasattr(module, name):
                    patch.setattr(module, name, lambda *given: given[0] if given else None)
        patch.setattr(breakable_cudagraph, "capture_pool", lambda pool, config: nullcontext())
        patch.setattr(RecordedGraph, "replay", counted)
        yield replays


def capture(llm, mode):
    """As the runner does for a GPU, which here was told that it has none: for one request, or in
    graphs that break for as many rows as the prompt has."""
    from vllm.compilation.monitor import set_cudagraph_capturing_enabled
    from vllm.config import CUDAGraphMode
    from vllm.v1.worker.gpu.attn_utils import init_attn_backend
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    run = runner(llm)
    compilation = run.compilation_config
    breaks = mode == "PIECEWISE"
    compilation.cudagraph_mode = CUDAGraphMode[mode]
    compilation.cudagraph_capture_sizes = [PROMPT if breaks else 1]
    compilation.max_cudagraph_capture_size = 16
    _, support, _ = init_attn_backend(
        run.kv_cache_config, run.vllm_config, run.device,
        draft_layer_names=run.speculator.draft_attn_layer_names,
    )  # fmt: skip
    found = compilation.resolve_cudagraph_mode_and_sizes(
        support.min_cg_support, support.min_cg_attn_backend, run.decode_query_len,
        use_v2_model_runner=True, kv_cache_config=run.kv_cache_config,
        max_num_reqs=run.max_num_reqs, is_profiling=False, piecewise_capture_available=breaks,
    )  # fmt: skip
    assert found == CUDAGraphMode[mode]
    run.cudagraph_manager = ModelCudaGraphManager(
        run.vllm_config, run.device, found, decode_query_len=run.decode_query_len
    )
    run.speculator.init_cudagraph_manager(found)
    set_cudagraph_capturing_enabled(True)
    run.cudagraph_manager.capture(
        run.model, run.model_state, run.input_buffers, None, run.block_tables, run.attn_groups,
        run.kv_cache_config, use_aux_hidden_state_outputs=run.use_aux_hidden_state_outputs,
    )  # fmt: skip
    run.speculator.capture()
    return run


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NaN in the interpreter
@pytest.mark.parametrize(
    ("method", "n", "graphs", "expected"),
    [
        (
            "dspark",
            5,
            "FULL_DECODE_ONLY",
            {"cudagraph_manager": (2, set()), "query_cudagraph_manager": (3, set())},
        ),
        (
            "mtp",
            2,
            "FULL_DECODE_ONLY",
            {
                "cudagraph_manager": (2, set()),
                "prefill_cudagraph_manager": (2, set()),
                "decode_cudagraph_manager": (3, set()),
            },
        ),
        # Graphs break at the step's metadata and each layer's attention. vLLM captures no pass
        # over blocks that way, and no draft behind the first.
        (
            "mtp",
            2,
            "PIECEWISE",
            {"cudagraph_manager": (3, {1 + 2}), "prefill_cudagraph_manager": (3, {1 + 1})},
        ),
    ],
)
def test_replayed_graphs_give_what_steps_give(method, n, graphs, expected, tmp_path, monkeypatch):
    """Answers and every proposal: of a prompt's step, and two more. No draft holds."""
    mode.kernels(monkeypatch, "triton")
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", str(int(graphs == "PIECEWISE")))
    monkeypatch.setattr("vllm_ext.config.require_driver", lambda: None)  # but an interpreter
    for module in ("model", "draft"):
        monkeypatch.setattr(f"vllm_ext.{module}.warm_up", lambda *given: None)
    fields = SMALL | {"num_nextn_predict_layers": 1}
    fields |= {"num_hidden_layers": 2, "compress_ratios": [0, 4]}
    fmt = "0731" if method == "dspark" else "bf16"
    make_checkpoint(tmp_path / "blocks", "tiny", 2, fields, tokenizer=False, fmt=fmt)
    prompt = [random_ids(PROMPT, seed=5, vocab=512).tolist()]
    with engine(
        tmp_path / "blocks", method, n, dtype="bfloat16", kv_cache_dtype="fp8", max_num_seqs=2,
        max_num_batched_tokens=24,
    ) as llm:  # fmt: skip
        watch = Watch(llm, monkeypatch)
        answer = generate(llm, prompt, 3)
        proposed, watch.found = watch.found, []
        with capturing(monkeypatch) as replays:
            run = capture(llm, graphs)
            llm.reset_prefix_cache()
            assert generate(llm, prompt, 3) == answer
        assert watch.found == proposed
        for name, (count, breaks) in expected.items():
            owner = run if name == "cudagraph_manager" else run.speculator
            found, broken = graphs_of(getattr(owner, name))
            assert {replays[graph] for graph in found} == {count}
            assert broken == breaks
