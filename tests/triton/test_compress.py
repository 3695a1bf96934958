"""The compressor: entries, carries and rings byte for byte, in any chunks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.config import CSA, HCA
from dsv4_plugin.kernels.compress import kernel, of_cache, reference
from dsv4_plugin.tools.kernel_work import flash
from lab.kernels.inputs import Caches, step_of, untouched
from lab.kit.mode import interpreted_first

pytestmark = pytest.mark.usefixtures("made_on_device")
EPS = 1e-6
FLASH = flash([CSA, HCA])
SMALL = replace(FLASH, head_dim=64, qk_rope_head_dim=16, index_head_dim=32)


class Layer:
    """Caches of one compressed layer, random weights, and what has been run on it."""

    def __init__(self, config, ratio, kv_dtype, requests, pages, page_size=256, drafts=0):
        torch.manual_seed(requests)
        config = replace(config, compress_ratios=(ratio,), num_hidden_layers=1)
        self.ratio, self.config = ratio, config
        kind, index = (kv_dtype, "auto") if kv_dtype != "fp4" else ("fp8", "fp4")
        self.layout = CacheLayout.of(
            config, kind, page_size, num_speculative_tokens=drafts, index_dtype=index
        )
        self.dtype = torch.float32 if kv_dtype == "float32" else torch.bfloat16
        rope = config.qk_rope_head_dim
        self.caches = Caches.of(self.layout, ratio, rope, requests, pages)
        d, di = config.head_dim, config.index_head_dim
        self.halves, self.channels = (2, d + di) if ratio == CSA else (1, d)
        self.ape = torch.randn(ratio, self.halves, self.channels)
        self.weights = torch.rand(d) + 0.5, torch.rand(di) + 0.5

    def copy(self):
        caches = self.caches
        out = object.__new__(Layer)
        out.__dict__ = self.__dict__ | {
            "caches": replace(caches, page=caches.page.clone(), ring=caches.ring.clone())
        }
        return out

    def run(self, op, y, counts, before, rows=None):
        c = self.caches
        cache = LayerCache.bind(self.layout, self.ratio, c.window, c.page, c.ring)
        targets, state = of_cache(cache, self.weights)
        step = step_of(counts, before, c, rows)
        op(y, self.ape, EPS, step, self.ratio, targets, state, self.dtype)

    def products(self, rows, dtype=torch.float32):
        return (3 * torch.randn(rows, 2, self.halves, self.channels)).to(dtype)


def both(layer, y, counts, before, rows=None):
    expected, found = layer.copy(), layer
    expected.run(reference.compress, y, counts, before, rows)
    found.run(kernel.compress, y, counts, before, rows)
    assert torch.equal(found.caches.ring, expected.caches.ring)
    assert torch.equal(found.caches.page, expected.caches.page)


@pytest.mark.parametrize(
    "kv_dtype", ["fp8", interpreted_first("bfloat16"), interpreted_first("float32")]
)
def test_csa(gpu, kv_dtype):
    """Steps of every kind in a row, on pages of 32 tokens."""
    layer = Layer(SMALL, CSA, kv_dtype, 4, 4, 32)
    for counts, before in [
        ([7, 1, 4, 0], [0, 0, 0, 0]),  # a window and a half, one token, one window, nothing
        ([1, 1, 1, 1], [7, 1, 4, 0]),  # decode: closing, open, opening, fresh
        ([2, 9, 1, 3], [8, 2, 5, 1]),  # mixed
        ([1, 5, 6, 1], [10, 11, 6, 4]),
        ([15, 19, 20, 1], [11, 16, 12, 5]),  # past a page's end, and exactly to it
        ([1, 1, 1, 1], [26, 35, 32, 6]),
    ]:
        rows = sum(counts) + 2  # two of padding
        both(layer, layer.products(rows), counts, before, rows)


@pytest.mark.parametrize("kv_dtype", ["fp8", "bfloat16", "float32"])
def test_hca(gpu, kv_dtype):
    layer = Layer(SMALL, HCA, kv_dtype, 3, 2, 128)
    layer.run(reference.compress, layer.products(250), [120, 1, 129], [0, 0, 0])
    for counts, before in [([7, 1, 2], [120, 1, 129]), ([2, 3, 1], [127, 2, 131])]:
        rows = sum(counts) + 2
        both(layer, layer.products(rows), counts, before, rows)


@pytest.mark.parametrize("decoding", [False, True])
def test_a_page_filled_in_the_same_step(gpu, decoding, monkeypatch):
    """Requests that start from a page which another fills: the second and fourth from the first's,
    the third from the second's; decoding: the third and fourth from the second's."""
    monkeypatch.setattr(kernel, "SCAN", 2)  # requests are looked through two at a time
    layer = Layer(SMALL, CSA, "fp8", 4, 3, 32)
    page = layer.caches.tables.page
    page[1:, 0] = page[0, 0]
    page[2:, 1] = page[1, 1]
    layer.run(reference.compress, layer.products(30), [30, 0, 0, 0], [0, 0, 0, 0])
    if not decoding:
        both(layer, layer.products(38), [2, 33, 1, 2], [30, 32, 64, 32])
        return
    layer.run(reference.compress, layer.products(33), [2, 31, 0, 0], [30, 32, 0, 0])
    both(layer, layer.products(4), [1, 1, 1, 1], [32, 63, 64, 64])


@pytest.mark.parametrize("ratio", [CSA, HCA])
def test_a_window_without_a_page_is_kept_in_the_ring_alone(gpu, ratio):
    layer = Layer(SMALL, ratio, "fp8", 2, 1, 128)
    layer.run(reference.compress, layer.products(252), [126, 126], [0, 0])
    layer.caches.tables.page[0, 0] = -1
    both(layer, layer.products(4), [2, 2], [126, 126])


@pytest.mark.parametrize("ratio", [CSA, HCA])
@pytest.mark.parametrize("drafts", [interpreted_first(1), 5])
def test_rings_keep_what_rejected_drafts_go_back_to(gpu, ratio, drafts):
    layer = Layer(SMALL, ratio, "float32", 3, 2, 128, drafts)
    layer.run(reference.compress, layer.products(135), [7, 126, 2], [0, 0, 0])
    for counts, before in [
        ([drafts + 1, drafts + 1, 1], [7, 126, 2]),
        ([drafts + 1, 2, drafts + 1], [8, 127, 3]),  # the first took one token of its drafts
    ]:
        both(layer, layer.products(sum(counts)), counts, before)


@pytest.mark.parametrize(
    ("ratio", "kind"), [interpreted_first(CSA, "fp8"), (CSA, "fp4"), (HCA, "fp8")]
)
def test_real_sizes(gpu, ratio, kind):
    layer = Layer(FLASH, ratio, kind, 2, 2)
    layer.run(reference.compress, layer.products(257), [252, 5], [0, 0])
    both(layer, layer.products(9, torch.bfloat16), [6, 3], [252, 5])


def test_entries_do_not_depend_on_chunks():
    """The reference alone: the kernel equals it."""
    y = None
    pages = []
    for chunks in [[70], [1] * 70, [33, 3, 34]]:
        layer = Layer(SMALL, CSA, "float32", 1, 3, 32)
        y = layer.products(70) if y is None else y
        done = 0
        for n in chunks:
            layer.run(reference.compress, y[done : done + n], [n], [done])
            done += n
        pages.append(layer.caches)
    for other in pages[1:]:
        assert torch.equal(other.page, pages[0].page)
        assert torch.equal(other.ring, pages[0].ring)


def test_pages_and_rings_beyond_two_gigabytes(gpu):
    """What a request writes there is what it writes nearby."""
    near = Layer(SMALL, CSA, "fp8", 1, 2, 32)
    far = near.copy()
    stride = (1 << 29) + 2
    tables = replace(
        near.caches.tables,
        page=torch.tensor([[5, 1]]).int(), page_stride=stride,
        ring=torch.tensor([5]).int(), ring_stride=stride,
    )  # fmt: skip
    # Zeros that take memory only where they are written.
    page, ring = untouched(6 * stride), untouched(6 * stride)
    far.caches = replace(near.caches, tables=tables, page=page, ring=ring)
    y = near.products(33)
    near.run(reference.compress, y, [33], [0])
    far.run(kernel.compress, y, [33], [0])
    words = near.layout.page[CSA].words
    first = int(near.caches.tables.page[0, 0]) * near.caches.tables.page_stride
    assert torch.equal(page[5 * stride :][:words], near.caches.page[first:][:words])
    words = near.layout.ring[CSA].words
    assert torch.equal(ring[5 * stride :][:words], near.caches.ring[:words])
