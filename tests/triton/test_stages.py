"""A decode step over two pipeline stages, each captured, their streams in buffers as vLLM keeps
them."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin import load
from dsv4_plugin.batch import allocate
from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.checkpoint.files import check_checkpoint, read_tensors
from dsv4_plugin.checkpoint.load import load_weights
from dsv4_plugin.checkpoint.names import stored_tensors
from dsv4_plugin.kernels.step import StepBuilder
from dsv4_plugin.model.parallel import LocalParallel
from dsv4_plugin.model.transformer import Transformer
from dsv4_plugin.tools.make import make_checkpoint
from lab.kit import mode
from lab.kit.graphs import RecordedGraph, recorded
from tests.conftest import A_LAYER_OF_EACH, SMALL

REQUESTS, STEPS = 2, 3


def tables(model, layout):
    """Requests of one block each of every kind, in poisoned caches."""
    caches, strides = allocate(model.ratios, layout, REQUESTS, REQUESTS, REQUESTS, True)
    block = torch.arange(REQUESTS, dtype=torch.int32)
    return caches, BlockTables(block[:, None], block[:, None], block, *strides)


@pytest.mark.thorough
@pytest.mark.skipif(mode.INTERPRET or mode.DEVICE != "cpu", reason="graphs are recorded emulated")
@pytest.mark.parametrize("gpu", mode.NAMES[:1], indirect=True)
@torch.inference_mode()
def test_captured_stages_give_the_whole_s_bits(gpu, tmp_path, monkeypatch):
    directory = tmp_path / "checkpoint"
    make_checkpoint(directory, "tiny", 2, SMALL | A_LAYER_OF_EACH, tokenizer=False)
    mode.kernels(monkeypatch, "triton")
    whole = load(directory, dtype="bfloat16", kv_dtype="fp8")
    headers = check_checkpoint(whole.config, directory, False)
    start = torch.arange(REQUESTS + 1, dtype=torch.int32)
    lengths = torch.ones(REQUESTS, dtype=torch.int32)
    ids = torch.zeros(REQUESTS, dtype=torch.int32)

    def builder(model, own):
        steps = StepBuilder(whole.config, whole.layout, REQUESTS, "cpu")
        return lambda longest: steps.build(own, start, lengths, REQUESTS, 1, longest)

    stages = []
    for layers in (range(2), range(2, 3)):
        stage = Transformer(whole.config, LocalParallel(whole.config, torch.bfloat16), layers)
        tensors = read_tensors(headers, progress=False)
        load_weights(stage, tensors, stored_tensors(whole.config))
        stages.append((stage, *tables(stage, whole.layout)))
    with recorded(gpu, monkeypatch):
        graphs, streams = [], None
        for stage, caches, own in stages:
            graph = RecordedGraph()
            graph.capture_begin()
            step = builder(stage, own)(512)
            h = stage.spread(ids) if stage.first else streams
            streams = stage.run(h, ids, step, caches)
            graph.capture_end()
            graphs.append(graph)
        caches, own = tables(whole.model, whole.layout)
        build = builder(whole.model, own)
        for n in range(STEPS):
            lengths.fill_(n + 1)
            ids.copy_(torch.tensor([7 * n + 3, 11 * n + 1]))
            for graph in graphs:
                graph.replay()
            expected = whole.model(ids, build(n + 1), caches)
            found = stages[1][0].collapse(streams)
            assert torch.equal(found, expected)
