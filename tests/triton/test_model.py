"""Whole steps of the tiny model, as a GPU runs them."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin import load
from dsv4_plugin.cache.device_step import DeviceStepBuilder
from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.cache.step import BlockTables
from dsv4_plugin.checkpoint.make import make_checkpoint
from dsv4_plugin.engine import Batch
from tests.conftest import random_ids
from tests.kit import mode
from tests.tolerances import BF16, LOGITS_STD

PADDING = 3


class DeviceBatch(Batch):
    """A batch whose steps are the device's, with rows of padding."""

    def _step(self, requests, counts):
        self.lengths[requests] += counts
        t = self.tables
        tables = BlockTables(
            t.window[requests].int(), t.page[requests].int(), t.ring[requests].int(),
            t.window_stride, t.page_stride, t.ring_stride,
        )  # fmt: skip
        start = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        rows = int(start[-1]) + PADDING
        builder = DeviceStepBuilder(self.model.config, self.builder.layout, rows, "cpu")
        lengths = self.lengths[requests]
        longest = int(lengths.max()), int(counts.max())
        return builder.build(tables, start, lengths.int(), rows, longest[1], longest[0])

    def run(self, work):
        requests = torch.tensor([b for b, _ in work])
        counts = torch.tensor([len(ids) for _, ids in work])
        step = self._step(requests, counts)
        ids = torch.cat([*(ids for _, ids in work), torch.zeros(PADDING, dtype=torch.int64)])
        return self.model(ids, step, self.caches)[:-PADDING]


WORK = [
    [(0, 140), (1, 3), (2, 290)],  # computed by the ordinary path alike
    [(0, 1), (1, 20), (2, 6)],
    [(0, 1), (1, 1), (2, 1)],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("device") / "checkpoint"
    make_checkpoint(
        directory, "tiny", seed=1, overrides={"vocab_size": 512, "index_topk": 64}, tokenizer=False
    )
    return load(directory, dtype="bfloat16")


@pytest.mark.parametrize("gpu", mode.NAMES[:1], indirect=True)
@torch.inference_mode()
def test_steps_give_torch_s_tokens(gpu, model, monkeypatch):
    layout = CacheLayout.of(model.config, "fp8")
    ids = random_ids(600, seed=3)
    lengths = [200, 100, 400]
    expecting = DeviceBatch(model.model, layout, lengths, 256, poison=True)
    finding = DeviceBatch(model.model, layout, lengths, 256, poison=True)
    for n, counts in enumerate(WORK):
        work = [(b, ids[100 * b + 7 * n :][:count]) for b, count in counts]
        monkeypatch.setenv("DSV4_KERNELS", "torch")
        expected = expecting.run(work).float()
        # The long first chunks as plain torch: the compiled code gets what follows.
        monkeypatch.setenv("DSV4_KERNELS", "torch" if n == 0 else "triton")
        found = finding.run(work).float()
        assert (found - expected).abs().mean() / expected.std() < BF16
        logits = model.model.head(expected)
        best = logits.topk(2).values
        clear = best[:, 0] - best[:, 1] > 0.1 * logits.std()
        same = model.model.head(found).argmax(-1) == logits.argmax(-1)
        assert clear.any()
        assert same[clear].all()


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float32"])
@torch.inference_mode()
def test_the_device_s_path_is_the_ordinary_one(unchosen, kv_dtype, monkeypatch):
    """In float32 and plain torch, but for the indexer."""
    monkeypatch.setenv("DSV4_KERNELS", "torch")
    model = load(unchosen, dtype="float32")
    layout = CacheLayout.of(model.config, kv_dtype)
    ids = random_ids(600, seed=3)
    lengths = [200, 100, 400]
    ordinary = Batch(model.model, layout, lengths, 256, poison=True)
    device = DeviceBatch(model.model, layout, lengths, 256, poison=True)
    for n, counts in enumerate(WORK):
        work = [(b, ids[100 * b + 7 * n :][:count]) for b, count in counts]
        expected, found = ordinary.run(work), device.run(work)
        tolerance = LOGITS_STD if kv_dtype == "float32" else BF16 / 10
        assert (found - expected).abs().max() < tolerance * expected.std()
