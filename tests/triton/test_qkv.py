"""Query norm and RoPE, and the window row, byte for byte."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.cache.rows import BFloat16Rows, Float32Rows, FP8KVRows, RowPool
from dsv4_plugin.kernels.qkv import kernel, reference
from lab.kernels.inputs import angles, poisoned, untouched

pytestmark = pytest.mark.usefixtures("made_on_device")
EPS = 1e-6


def case(tokens, heads, d, rope, codec, dtype, seed=0):
    torch.manual_seed(seed)
    q = torch.randn(tokens, heads, d).to(dtype)
    kv = (torch.randn(tokens, d) * torch.logspace(-5, 4, tokens)[:, None]).to(dtype)
    weight = torch.rand(d) + 0.5
    address = torch.randperm(2 * tokens)[:tokens] * codec.words + 6
    address[tokens // 2 :: 3] = -1
    storage = poisoned((2 * tokens + 1) * codec.words + 8)
    return (q, kv, weight, EPS, angles(tokens, rope), address), storage


def check(inputs, storage, codec):
    expected, found = RowPool(storage.clone(), codec), RowPool(storage.clone(), codec)
    want = reference.qkv(*inputs, expected)
    got = kernel.qkv(*inputs, found)
    assert torch.equal(found.storage, expected.storage)
    torch.testing.assert_close(
        got, want, rtol=2**-8 if got.dtype == torch.bfloat16 else 1e-6, atol=1e-6
    )


CODECS = {"fp8": FP8KVRows(512, 64), "bfloat16": BFloat16Rows(512), "float32": Float32Rows(512)}


@pytest.mark.parametrize("kind", CODECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_real_rows(gpu, kind, dtype):
    inputs, storage = case(5, 6, 512, 64, CODECS[kind], dtype)
    check(inputs, storage, CODECS[kind])


@pytest.mark.parametrize(("tokens", "heads", "d", "rope"), [(1, 1, 64, 16), (3, 8, 512, 64)])
def test_other_sizes(gpu, tokens, heads, d, rope):
    codec = FP8KVRows(d, rope)
    inputs, storage = case(tokens, heads, d, rope, codec, torch.bfloat16)
    check(inputs, storage, codec)


def test_rows_beyond_two_gigabytes(gpu):
    codec = FP8KVRows(512, 64)
    inputs, _ = case(2, 1, 512, 64, codec, torch.bfloat16)
    address = torch.tensor([(1 << 29) + 10, (1 << 31) + 6])
    storage = untouched(int(address.max()) + codec.words)
    kernel.qkv(*inputs[:-1], address, RowPool(storage, codec))
    near = RowPool(poisoned(2 * codec.words), codec)
    reference.qkv(*inputs[:-1], torch.tensor([0, codec.words]), near)
    for i, a in enumerate(address.tolist()):
        mine = near.storage[i * codec.words :][: codec.words]
        assert torch.equal(storage[a : a + codec.words], mine)
