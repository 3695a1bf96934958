"""Decode steps of two data-parallel ranks that share the experts, each rank's captured as a whole:
vLLM's adapter, with threads as ranks."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from dsv4_plugin import load
from dsv4_plugin.checkpoint.files import check_checkpoint, read_tensors
from dsv4_plugin.checkpoint.load import load_weights
from dsv4_plugin.checkpoint.names import stored_tensors
from dsv4_plugin.kernels.step import StepBuilder
from dsv4_plugin.model.transformer import Transformer
from dsv4_plugin.tools.make import make_checkpoint
from lab.kit import mode
from lab.kit.graphs import RecordedGraph, recorded
from tests.conftest import A_LAYER_OF_EACH, SMALL
from tests.parallel.ranks import DataGroup, DataParallel, Ranks
from tests.triton.test_stages import REQUESTS, STEPS, tables

RANKS = 2


class Group(DataGroup):
    """Collectives do nothing while a graph is captured, and wait for the other ranks whenever it is
    replayed."""

    def all_gather(self, x, dim):
        return self._recorded(super().all_gather, self.world_size * len(x), x, dim)

    def all_reduce(self, x):
        return self._recorded(super().all_reduce, len(x), x)

    def _recorded(self, collective, rows, x, *args):
        graph = RecordedGraph.current
        assert graph is not None
        with _disable_current_modes():
            out = x.new_zeros(rows, *x.shape[1:])
        graph.record.append(lambda: out.copy_(collective(x, *args)))
        return out


class Rank:
    """A rank's model and step, as vLLM keeps them for a graph of as many rows as requests."""

    def __init__(self, whole, directory) -> None:
        config = whole.config
        self.model = Transformer(config, DataParallel(config, torch.bfloat16))
        headers = check_checkpoint(config, directory, False)
        tensors = read_tensors(headers, progress=False)
        load_weights(self.model, tensors, stored_tensors(config))
        self.state = State(whole, self.model)

    def capture(self) -> None:
        self.graph = RecordedGraph()
        self.graph.capture_begin()
        self.out = self.state.run(self.model, 512)
        self.graph.capture_end()


class State:
    """Requests in poisoned caches, and the buffers of a step's metadata."""

    def __init__(self, whole, model) -> None:
        self.caches, self.tables = tables(model, whole.layout)
        self.start = torch.arange(REQUESTS + 1, dtype=torch.int32)
        self.lengths = torch.ones(REQUESTS, dtype=torch.int32)
        self.ids = torch.zeros(REQUESTS, dtype=torch.int32)
        self.steps = StepBuilder(whole.config, whole.layout, REQUESTS, "cpu")

    def fill(self, ids: list[int], n: int) -> None:
        """Step n: a token for each request there is; the other rows are padding."""
        rows = len(ids)
        self.ids[:rows] = torch.tensor(ids)
        self.start.copy_(torch.arange(REQUESTS + 1).clamp(max=rows))
        self.lengths.copy_(torch.where(torch.arange(REQUESTS) < rows, n + 1, 0))

    def run(self, model, longest):
        step = self.steps.build(self.tables, self.start, self.lengths, REQUESTS, 1, longest)
        return model(self.ids, step, self.caches)


@pytest.mark.thorough
@pytest.mark.skipif(mode.NAMES[0] != "sm80", reason="vLLM's adapter, on one architecture")
@pytest.mark.parametrize("gpu", mode.NAMES[:1], indirect=True)
@torch.inference_mode()
def test_captured_ranks_give_the_whole_s_tokens(gpu, tmp_path, monkeypatch):
    """The first rank has a request in each row, the second one of padding."""
    from vllm.forward_context import override_forward_context

    from vllm_ext import parallel

    directory = tmp_path / "checkpoint"
    make_checkpoint(directory, "tiny", 2, SMALL | A_LAYER_OF_EACH, tokenizer=False)
    mode.kernels(monkeypatch, "triton")
    whole = load(directory, dtype="bfloat16", kv_dtype="fp8")
    ranks = Ranks(RANKS)
    groups = [Group(ranks, rank) for rank in range(RANKS)]
    monkeypatch.setattr(parallel, "get_dp_group", lambda: groups[ranks.mine.rank])
    emulate, lock = type(gpu).launch, threading.Lock()

    def one_at_a_time(*args):
        with lock:
            emulate(*args)

    monkeypatch.setattr(type(gpu), "launch", one_at_a_time)
    across = np.full(RANKS, REQUESTS)  # host memory, which a capture may read
    context = SimpleNamespace(dp_metadata=SimpleNamespace(num_tokens_across_dp_cpu=across))
    with recorded(gpu, monkeypatch):
        made = []
        for rank in range(RANKS):
            ranks.mine.rank = rank
            made.append(Rank(whole, directory))
            with override_forward_context(context):
                made[rank].capture()
        alone = [State(whole, whole.model) for _ in range(RANKS)]
        for n in range(STEPS):
            asked = [[7 * n + 3, 11 * n + 1], [13 * n + 5]]
            for ids, rank, other in zip(asked, made, alone, strict=True):
                rank.state.fill(ids, n)
                other.fill(ids, n)
            ranks.run(lambda rank: made[rank].graph.replay())
            for ids, rank, other in zip(asked, made, alone, strict=True):
                expected = other.run(whole.model, n + 1)[: len(ids)]
                found = rank.out[: len(ids)]
                assert (found - expected).abs().max() <= 0.02 * expected.abs().max()
                assert torch.equal(
                    whole.model.head(found).argmax(-1),
                    whole.model.head(expected).argmax(-1),
                )
