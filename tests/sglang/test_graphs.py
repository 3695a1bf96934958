"""Decode steps as SGLang's CUDA graph runner drives them, on a CPU: a recorder stands in for CUDA's
graphs, the emulator for the GPU. Buffers, padding and the order of calls are that runner's."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig, PhaseConfig
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from dsv4_plugin import load
from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.kernels import dispatch
from dsv4_plugin.kernels.step import StepBuilder
from dsv4_plugin.tools.make import make_checkpoint
from dsv4_plugin.warmup import compiled
from lab.kit import mode
from lab.kit.gpu import EmulatedGPU
from lab.kit.graphs import RecordedGraph, recorded
from sglang_ext import backend, config
from sglang_ext.backend import Backend
from sglang_ext.pool import KVPool
from tests.conftest import A_LAYER_OF_EACH, SMALL, random_ids

PAGE, CONTEXT, REQUESTS, SIZE = 128, 512, 4, 4
"""Tokens of a page, of a request; request rows; decode steps that are captured, padded to."""


class Runner:
    """What the backend asks of SGLang's model runner. Blocks of requests are interleaved."""

    def __init__(self, local):
        self.model = SimpleNamespace(model=local.model, parallel=SimpleNamespace(rank=0, size=1))
        self.config, self.layout, self.device = local.config, local.layout, "cpu"
        self.server_args = SimpleNamespace(chunked_prefill_size=256, max_prefill_tokens=256)
        blocks = torch.arange(CONTEXT // PAGE)[None] * REQUESTS + torch.arange(REQUESTS)[:, None]
        slots = (1 + blocks)[..., None] * PAGE + torch.arange(PAGE)
        self.req_to_token_pool = SimpleNamespace(
            req_to_token=slots.view(REQUESTS, CONTEXT).int(), size=REQUESTS
        )
        self.bind()

    def bind(self):
        """Pools anew, full of NaN; the SWA tier hands out other blocks than the full one."""
        tokens = REQUESTS * CONTEXT
        ratios = self.model.model.ratios
        pool = KVPool(self.config, self.layout, ratios, tokens, tokens, REQUESTS, "cpu")
        blocks = tokens // PAGE
        swa = torch.cat([torch.tensor([0]), blocks - torch.arange(blocks)])
        mapping = swa[:, None] * PAGE + torch.arange(PAGE)
        pool.register_mapping(mapping.view(-1))
        for part in (pool.window, pool.page, pool.ring):
            part.storage.fill_(-1)
        self.token_to_kv_pool = pool


def batch(rows, lengths, counts=None):
    """A ForwardBatch of these request rows; counts: their new tokens, None in a decode step."""
    counts_or_one = counts or [1] * len(rows)
    return SimpleNamespace(
        forward_mode=ForwardMode.DECODE if counts is None else ForwardMode.EXTEND,
        req_pool_indices=torch.tensor(rows), seq_lens=torch.tensor(lengths),
        seq_lens_cpu=torch.tensor(lengths), extend_seq_lens=torch.tensor(counts_or_one),
        extend_seq_lens_cpu=counts_or_one, input_ids=torch.zeros(sum(counts_or_one)),
    )  # fmt: skip


class Engine:
    """Requests in the backend's hands: prompts, then decode steps, replayed or not."""

    def __init__(self, local):
        self.runner = Runner(local)
        self.backend = Backend(self.runner)
        self.local = local

    def forward(self, ids):
        step, pool = self.backend.forward_metadata, self.backend.token_to_kv_pool
        return self.local.model(ids.int(), step, pool.layers)

    def token(self, hidden):
        return self.local.model.head(hidden).argmax(-1)

    def prompt(self, row, ids):
        """By torch's operations, which are sooner done than emulated ones."""
        self.backend.init_forward_metadata(batch([row], [len(ids)], [len(ids)]))
        os.environ["DSV4_KERNELS"] = "torch"
        dispatch.choose_again()
        found = int(self.token(self.forward(torch.tensor(ids))[-1:]))
        os.environ["DSV4_KERNELS"] = "triton"
        dispatch.choose_again()
        return found

    def decode(self, rows, lengths, ids):
        self.backend.init_forward_metadata(batch(rows, lengths))
        return self.token(self.forward(torch.tensor(ids))).tolist()

    def capture(self):
        """As the runner does for its largest size: in its own buffers, all rows padding."""
        self.backend.init_cuda_graph_state(SIZE, SIZE)
        fill = self.backend.get_cuda_graph_seq_len_fill_value()
        self.buffers = batch([0] * SIZE, [fill] * SIZE)
        self.ids = torch.zeros(SIZE, dtype=torch.int32)
        self.backend.init_forward_metadata_out_graph(self.buffers, in_capture=True)
        self.graph = RecordedGraph()
        self.graph.capture_begin()
        self.backend.init_forward_metadata_in_graph(self.buffers)
        self.out = self.forward(self.ids)
        self.graph.capture_end()

    def replay(self, rows, lengths, ids):
        b, n = self.buffers, len(rows)
        pad = SIZE - n
        fill = self.backend.get_cuda_graph_seq_len_fill_value()
        b.req_pool_indices.copy_(torch.tensor(rows + [0] * pad))
        b.seq_lens.copy_(torch.tensor(lengths + [fill] * pad))
        b.seq_lens_cpu.copy_(b.seq_lens)
        self.ids.copy_(torch.tensor(ids + [0] * pad))
        self.backend.init_forward_metadata_out_graph(b)
        self.graph.replay()
        return self.token(self.out[:n]).tolist()


PROMPTS = [random_ids(n, seed=n).tolist() for n in (140, 20, 5)]
BATCHES = [[2, 0, 1], [1], [0, 2]]
"""Request rows of three decode steps."""


def generate(engine, step):
    """Greedy tokens of the prompts in rows 2, 0 and 1, then of BATCHES by `step`."""
    rows = BATCHES[0]
    texts = {row: [*p, engine.prompt(row, p)] for row, p in zip(rows, PROMPTS, strict=True)}
    for chosen in BATCHES:
        found = step(chosen, [len(texts[r]) for r in chosen], [texts[r][-1] for r in chosen])
        for row, token in zip(chosen, found, strict=True):
            texts[row].append(token)
    return texts


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    directory = tmp_path_factory.mktemp("graphs") / "checkpoint"
    make_checkpoint(directory, "tiny", 2, SMALL | A_LAYER_OF_EACH, tokenizer=False)
    found = load(directory, dtype="bfloat16", kv_dtype="fp8")
    found.layout = CacheLayout.of(found.config, "fp8", PAGE, window_block=PAGE)
    return found


@torch.inference_mode()
@pytest.mark.thorough
def test_replayed_steps_give_the_ordinary_ones_tokens(local, monkeypatch):
    """From pools that are bound anew too. The warm-up compiles everything; the builder is made
    once."""
    mode.kernels(monkeypatch, "triton")
    monkeypatch.setattr(backend, "drafts", lambda: 0)
    made = []
    build = StepBuilder.__init__
    monkeypatch.setattr(StepBuilder, "__init__", lambda *args: made.append(args) or build(*args))
    with EmulatedGPU("sm80") as gpu, recorded(gpu, monkeypatch):
        engine = Engine(local)
        with compiled() as late:
            expected = generate(engine, engine.decode)
            old = engine.runner.token_to_kv_pool.window.storage
            engine.runner.bind()
            old.fill_(-1)
            assert generate(engine, engine.decode) == expected
            assert (old == -1).all()
            engine.runner.bind()
            engine.capture()
            assert generate(engine, engine.replay) == expected
        assert not late
        assert len(made) == 2  # for ordinary steps, and for graphs


@pytest.mark.parametrize(
    ("device", "kernels", "mtp", "given", "left"),
    [
        ("cuda", "triton", False, ("full", "breakable"), ("full", "disabled")),
        ("cuda", "triton", False, ("breakable", "full"), ("full", "disabled")),
        ("cuda", "triton", False, ("disabled", "breakable"), ("disabled", "disabled")),
        ("cuda", "triton", True, ("full", "breakable"), ("disabled", "disabled")),
        ("cuda", "torch", False, ("full", "breakable"), ("disabled", "disabled")),
        ("cpu", "triton", False, ("full", "breakable"), ("disabled", "disabled")),
    ],
)
def test_the_server_s_options_decide(monkeypatch, device, kernels, mtp, given, left):
    """Whole graphs of decode steps unless they are left out, of the sizes asked for; none where
    tokens are drafted."""
    mode.kernels(monkeypatch, kernels)
    decode, prefill = (PhaseConfig(backend=b, bs=[1, 2, 8]) for b in given)
    found = config._graphs(CudaGraphConfig(decode, prefill), device, mtp)
    assert (found.decode.backend, found.prefill.backend) == left
    assert found.decode.bs == [1, 2, 8]
