"""Row formats, page layouts, and caches of fewer bits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsv4_plugin import load
from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.cache.rows import (
    BFloat16Rows,
    Float32Rows,
    FP4IndexRows,
    FP8IndexRows,
    FP8KVRows,
    RowPool,
)
from dsv4_plugin.config import CSA, HCA, SWA
from dsv4_plugin.kernels.step import StepBuilder
from dsv4_plugin.quant.e2m1 import decode_mxfp4, quantise_mxfp4
from dsv4_plugin.tools.kernel_work import flash
from lab.kit import mode
from tests.conftest import random_ids
from tests.tolerances import BF16, FP8_KV


def test_an_fp8_row_of_the_real_size_has_584_bytes():
    assert 4 * FP8KVRows(512, 64).words == 584
    assert 4 * FP8IndexRows(128).words == 132
    assert 4 * FP4IndexRows(128).words == 68
    assert 4 * BFloat16Rows(512).words == 1024


@pytest.mark.parametrize("codec", [Float32Rows(48), BFloat16Rows(47), FP8KVRows(48, 16)])
def test_rows_survive_at_any_address(codec):
    """Blocks with gaps, written out of order, beside rows that must not change."""
    storage = torch.randint(0, 2**30, (5000,), dtype=torch.int32)
    before = storage.clone()
    pool = RowPool(storage[3:], codec)
    x = torch.randn(6, codec.width).to(torch.bfloat16).float()
    address = torch.tensor([1000, 0, 2000, 77 + codec.words, 77, 4000])
    pool.write(address, x)
    found = pool.read(address[:4].view(2, 2), torch.float32)
    assert found.shape == (2, 2, codec.width)
    exact = slice(codec.nope, None) if isinstance(codec, FP8KVRows) else slice(None)
    assert torch.equal(found.view(4, -1)[:, exact], x[:4, exact])
    written = torch.zeros(5000, dtype=torch.bool)
    for a in address.tolist():
        written[3 + a : 3 + a + codec.words] = True
    assert torch.equal(storage[~written], before[~written])


def test_fp8_values_are_rounded_to_e4m3_under_a_power_of_two():
    codec = FP8KVRows(512, 64)
    x = torch.randn(9, 512) * torch.logspace(-6, 6, 9)[:, None]
    x[0] = 0
    found = codec.decode(codec.encode(x), torch.float32)
    blocks = x[:, :448].view(9, 7, 64)
    scale = torch.exp2(torch.ceil(torch.log2(blocks.abs().amax(-1).clamp(min=1e-4) / 448)))
    expected = (blocks / scale[..., None]).to(torch.float8_e4m3fn).float() * scale[..., None]
    assert torch.equal(found[:, :448].view(9, 7, 64), expected)
    assert torch.equal(found[:, 448:], x[:, 448:].to(torch.bfloat16).float())


@pytest.mark.parametrize("width", [128, 32, 64, 160])
def test_fp4_values_are_rounded_to_e2m1_under_a_power_of_two(width):
    codec = FP4IndexRows(width)
    x = torch.randn(9, width) * torch.logspace(-6, 6, 9)[:, None]
    rows = codec.encode(x)
    assert rows.shape == (9, codec.words)
    found = codec.decode(rows.view(3, 3, -1), torch.float32).view(9, width)
    data, scales = quantise_mxfp4(x)
    expected = decode_mxfp4(data, scales)
    assert (found - expected).abs().max() <= 2.0**-60 * x.abs().max()
    assert (found - expected).abs()[expected != 0].max() == 0


def test_fp4_indexer_keys_halve_the_index(small):
    ratios = [CSA] * 4
    grown = {
        dtype: CacheLayout.of(flash(ratios), "fp8", index_dtype=dtype).growth(ratios)
        for dtype in ("auto", "fp4")
    }
    assert grown["auto"] - grown["fp4"] == 4 * (132 - 68) / CSA
    with pytest.raises(ValueError, match="index_dtype is 'int4'; allowed are auto, bfloat16, fp8,"):
        load(small, index_dtype="int4")


def test_fp4_indexer_keys_stay_close(small, reference):
    """400 tokens have 100 entries, of which 64 are chosen: with FP4 keys some are others."""
    ids = random_ids(400, seed=5)
    found = load(small, dtype="float32", index_dtype="fp4").logits(ids)
    expected = reference(small, ids)
    assert 0 < (found - expected).abs().mean() / expected.std() < FP8_KV
    assert not torch.equal(found, load(small, dtype="float32").logits(ids))


def test_flash_takes_what_the_design_says():
    """Bytes per token of the growing pages, and per request of ring and window rows."""
    ratios = [0, 0] + [4 if i % 2 == 0 else 128 for i in range(41)]
    config = flash(ratios)
    layout = CacheLayout.of(config, "fp8", page_size=256)
    growing = sum(layout.page[r].nbytes for r in ratios if r) / 256
    assert 4200 < growing < 4300
    assert layout.page[CSA].parts["kv"].rows == 64
    assert layout.page[HCA].parts["kv"].rows == 2


@pytest.mark.parametrize(
    ("dtype", "kv_dtype", "tolerance"),
    [("float32", "fp8", FP8_KV), ("float32", "bfloat16", BF16), ("bfloat16", "auto", BF16)],
)
def test_fewer_bits_stay_close(small, reference, dtype, kv_dtype, tolerance):
    """The mean, because a choice of the indexer that tips over moves a single row far."""
    ids = random_ids(300, seed=2)
    expected = reference(small, ids)
    found = load(small, dtype=dtype, kv_dtype=kv_dtype).logits(ids)
    assert (found - expected).abs().mean() / expected.std() < tolerance


def test_fp8_does_not_depend_on_the_chunk(small):
    ids = random_ids(300, seed=2)
    model = load(small, dtype="float32", kv_dtype="fp8")
    whole, parts = model.logits(ids, chunk=300), model.logits(ids, chunk=7)
    assert (whole - parts).abs().mean() / whole.std() < FP8_KV / 4


def test_formats_that_kernels_do_not_have_are_refused(monkeypatch):
    wide = replace(flash([CSA]), index_head_dim=256)
    with pytest.raises(ValueError, match="index_head_dim is 256; fp4 keys have 32, 64 or 128"):
        CacheLayout.of(wide, "fp8", index_dtype="fp4")
    mode.kernels(monkeypatch, "triton")
    config = flash([SWA])
    with pytest.raises(ValueError, match="KV rows are float32, which Triton's kernels do not read"):
        StepBuilder(config, CacheLayout.of(config, "float32"), 1, "cpu")
