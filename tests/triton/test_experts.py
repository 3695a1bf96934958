"""Experts and packed products: every format, ragged shapes, idle experts, pairs of nobody."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv4_plugin.config import INT4_BLOCKS
from dsv4_plugin.kernels.experts import cpu as plain
from dsv4_plugin.kernels.experts import kernel, product
from dsv4_plugin.kernels.experts.product import operand
from dsv4_plugin.kernels.launch import pick
from dsv4_plugin.kernels.packed import FP4Matrix, FP8Matrix, Int4Matrix, Matrix, NVFP4Matrix
from dsv4_plugin.kernels.packed import cpu as packed_cpu
from dsv4_plugin.kernels.packed import kernel as packed_kernel
from dsv4_plugin.model.parallel import OwnExperts, SplitExperts
from dsv4_plugin.quant.e2m1 import decode_mxfp4, decode_nvfp4
from dsv4_plugin.quant.e4m3 import e4m3_values
from dsv4_plugin.quant.int4 import decode_int4
from dsv4_plugin.tools.kernel_work import World
from lab.kernels.cases import generator
from lab.kernels.inputs import untouched
from lab.kit import mode
from lab.kit.mode import interpreted_first
from lab.kit.order import seeded
from tests.tolerances import BF16_SUM, OP_FP32, QUANTISED

KINDS = ("fp8", "fp4", "nvfp4", "int4")
LIMIT = 1.0


def stack(kind: str, e: int, n_out: int, n_in: int, seed: int = 0) -> Matrix:
    """Random codes of e experts; scales that differ from block to block."""
    g = generator(seed)

    def byte(low: int, high: int, *shape: int) -> Tensor:
        drawn = torch.randint(low, high, shape, generator=g, dtype=torch.uint8)
        return drawn.to(mode.DEVICE)

    if kind == "fp8":
        codes = byte(0, 256, e, n_out, n_in)
        codes[codes & 0x7F == 0x7F] = 0  # NaN
        scale = torch.rand(e, -(-n_out // 128), -(-n_in // 128), generator=g) / 1000
        return FP8Matrix(codes, scale.to(mode.DEVICE))
    data = byte(0, 256, e, n_out, n_in // 2)
    if kind == "int4":
        block = next(b for b in INT4_BLOCKS if n_in % b == 0)
        scale = (torch.rand(e, n_out, n_in // block, generator=g) / 100).bfloat16()
        return Int4Matrix(data, scale.to(mode.DEVICE))
    if kind == "fp4":
        return FP4Matrix(data, byte(118, 124, e, n_out, n_in // 32))
    top = (torch.rand(e, generator=g) + 0.5).to(mode.DEVICE) / 500
    return NVFP4Matrix(data, byte(0, 0x7F, e, n_out, n_in // 16), top)


def choose(tokens: int, e: int, k: int) -> tuple[Tensor, Tensor]:
    g = generator(tokens + e)
    ids = torch.rand(tokens, e, generator=g).topk(k).indices
    return ids.to(mode.DEVICE), torch.rand(tokens, k, generator=g).to(mode.DEVICE)


def inputs(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.randn(rows, width, generator=generator(rows + width))
    return x.to(dtype).to(mode.DEVICE)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    tolerance = OP_FP32 if found.dtype == torch.float32 else BF16_SUM
    error = (found.float() - expected.float()).abs().max()
    assert error <= tolerance * expected.float().abs().max()


def packed_layer(kind: str, e: int, d: int, f: int) -> tuple[Matrix, Matrix, Matrix]:
    return stack(kind, e, f, d, 1), stack(kind, e, f, d, 2), stack(kind, e, d, f, 3)


def plain_layer(e: int, d: int, f: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    g = generator(e + d)
    w13 = torch.randn(e, d, 2 * f, generator=g) * d**-0.5
    w2 = torch.randn(e, f, d, generator=g) * f**-0.5
    return w13.to(dtype).to(mode.DEVICE), w2.to(dtype).to(mode.DEVICE)


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("rounding", [False, True])
@pytest.mark.parametrize("tokens", [1, 23, 700])
def test_every_pair_gets_a_place(gpu, tokens, rounding, rows):
    """In blocks of its expert, in order; idle experts and pairs of nobody have none."""
    ids, _ = choose(tokens, 9, 3)
    ids[ids == 4] = -1
    ids[ids == 7] = 9
    found = kernel.Blocks.room(ids, 9, rows)
    kernel.prepared(inputs(tokens, 1100), ids, found, 1, rounding)
    flat = ids.flatten().tolist()
    expert_of, row_of, expected = [], [], []
    for e in range(9):
        pairs = [i for i, id in enumerate(flat) if id == e]
        pairs += [-1] * (-len(pairs) % rows)
        expected += pairs
        expert_of += [e] * (len(pairs) // rows)
    used = int(found.used[0])
    row_of = found.row_of[: used * rows].tolist()
    assert used == len(expert_of) <= found.most
    assert found.expert_of[:used].tolist() == expert_of
    assert row_of == expected


def test_there_is_room_for_the_worst():
    """One pair of each expert, and all others of one."""
    for pairs, e, rows in ((1, 8, 16), (8, 8, 16), (100, 8, 16), (9, 384, 16), (5000, 256, 64)):
        busy = min(pairs, e)
        worst = busy - 1 + -(-(pairs - busy + 1) // rows)
        assert worst <= kernel.blocks_of(pairs, e, rows) <= worst + busy


@pytest.mark.parametrize("dtype", [torch.bfloat16, interpreted_first(torch.float32)])
@pytest.mark.parametrize(("tokens", "e", "d", "f"), [(5, 8, 96, 40), (40, 2, 136, 24)])
def test_plain_experts(gpu, tokens, e, d, f, dtype):
    x, (w13, w2) = inputs(tokens, d, dtype), plain_layer(e, d, f, dtype)
    ids, weight = choose(tokens, e, 2)
    expected = plain.experts(x.cpu(), ids.cpu(), weight.cpu(), w13.cpu(), w2.cpu(), LIMIT)
    found = kernel.experts(x, ids, weight, w13, w2, LIMIT)
    close(found.cpu(), expected)
    also = inputs(tokens, d, dtype).flip(0).contiguous()
    assert torch.equal(kernel.experts(x, ids, weight, w13, w2, LIMIT, also), found + also)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "e", "d", "f"), [interpreted_first(1, 8, 256, 64), (40, 3, 160, 96)]
)
def test_packed_experts(gpu, kind, tokens, e, d, f):
    """In float32, where nothing else rounds: inputs as they are."""
    x, layer = inputs(tokens, d, torch.float32), packed_layer(kind, e, d, f)
    ids, weight = choose(tokens, e, 2)
    expected = plain.packed_experts(x, ids, weight, *layer, LIMIT, rounding=False)
    close(kernel.packed_experts(x, ids, weight, *layer, LIMIT, rounding=False), expected)


@pytest.mark.skipif(not mode.INTERPRET, reason="replaces what is known at compile time")
@pytest.mark.parametrize("kind", ["fp4", "fp8"])
def test_packed_experts_in_the_order_of_wgmma(gpu, kind, monkeypatch):
    """As on Hopper, whose products are not emulated: who stores inputs and who multiplies agree."""
    asked = []
    monkeypatch.setattr(product, "_neighbours", lambda words: asked.append(words) or words // 4)
    test_packed_experts(gpu, kind, 1, 8, 256, 64)
    assert asked


@pytest.mark.parametrize("kind", KINDS)
def test_packed_experts_as_served(gpu, kind):
    """bfloat16, inputs rounded as the format asks for: a sum in another order may round to the
    neighbouring e4m3 value."""
    x, layer = inputs(4, 256), packed_layer(kind, 3, 256, 160)
    ids, weight = choose(4, 3, 2)
    rounding = kind in ("fp4", "fp8")
    expected = plain.packed_experts(x, ids, weight, *layer, LIMIT, rounding)
    found = kernel.packed_experts(x, ids, weight, *layer, LIMIT, rounding)
    assert (found - expected).norm() / expected.norm() < QUANTISED


@pytest.mark.parametrize("tokens", [3, 70])
def test_all_tokens_on_one_expert(gpu, tokens):
    """Others idle, in particular the first and the last."""
    x, layer = inputs(tokens, 64, torch.float32), packed_layer("fp4", 4, 64, 64)
    ids = torch.full((tokens, 1), 2, device=mode.DEVICE)
    weight = torch.ones(tokens, 1, device=mode.DEVICE)
    expected = plain.packed_experts(x, ids, weight, *layer, LIMIT, rounding=False)
    close(kernel.packed_experts(x, ids, weight, *layer, LIMIT, rounding=False), expected)


def test_pairs_of_nobody(gpu):
    """-1 and experts of other ranks add nothing; a token without any expert here gets zeros."""
    x, (w13, w2) = inputs(10, 64, torch.float32), plain_layer(4, 64, 32, torch.float32)
    ids, weight = choose(10, 4, 3)
    foreign = ids == 2
    foreign[5] = True
    expected = plain.experts(x, ids, weight * ~foreign, w13, w2, LIMIT)
    for stranger in (-1, 4, 300):
        found = kernel.experts(x, ids.masked_fill(foreign, stranger), weight, w13, w2, LIMIT)
        close(found, expected)
        assert not found[5].any()


def test_experts_of_this_rank(gpu, monkeypatch):
    """Expert parallelism: the halves of two ranks add up, in kernels as in torch."""
    whole = World.of(torch.device("cpu"), 1, 1, 1).config
    c = replace(whole, hidden_size=64, n_routed_experts=8, moe_intermediate_size=32)
    ids, weight = choose(9, c.n_routed_experts, 2)
    x = inputs(9, c.hidden_size, torch.float32)
    w13, w2 = plain_layer(c.n_routed_experts, c.hidden_size, c.moe_intermediate_size, torch.float32)
    parts = []
    for rank in range(2):
        own = OwnExperts(c, rank, 2, lambda part: SplitExperts(part, torch.float32))
        mine = slice(rank * own.count, (rank + 1) * own.count)
        own.experts.w13.data, own.experts.w2.data = w13[mine].clone(), w2[mine].clone()
        mode.kernels(monkeypatch, "torch")
        expected = own(x, ids, weight)
        mode.kernels(monkeypatch, "triton")
        parts.append(own(x, ids, weight))
        close(parts[-1], expected)
    close(parts[0] + parts[1], plain.experts(x, ids, weight, w13, w2, c.swiglu_limit))


@pytest.mark.parametrize(
    ("kind", "d"),
    [
        ("fp4", 768),
        interpreted_first("fp8", 640),
        interpreted_first("nvfp4", 640),
        interpreted_first("int4", 768),
    ],
)
def test_alone_and_in_company(gpu, monkeypatch, kind, d):
    """Few rows an expert: a token has the same bits where each piece of a sum is a program's, in
    whatever order these arrive, and where a program goes through all of them."""
    few = replace(pick(kernel.LAUNCHES), piece=256, split=4)
    monkeypatch.setattr(kernel, "LAUNCHES", {"any": few})
    # Rounded to bfloat16, sums of another order seldom differ; compiled, float32 takes minutes.
    dtype = torch.float32 if mode.INTERPRET else torch.bfloat16
    x, layer = inputs(6, d, dtype), packed_layer(kind, 3, d, 160)
    ids, weight = choose(6, 3, 2)
    rounding = kind in ("fp4", "fp8")
    together = kernel.packed_experts(x, ids, weight, *layer, LIMIT, rounding)
    expected = plain.packed_experts(x, ids, weight, *layer, LIMIT, rounding)
    assert (together - expected).norm() / expected.norm() < QUANTISED
    for t in (0, 5):
        one = slice(t, t + 1)
        with seeded(t):
            alone = kernel.packed_experts(x[one], ids[one], weight[one], *layer, LIMIT, rounding)
        assert torch.equal(alone[0], together[t])


@pytest.mark.parametrize("tokens", [8, interpreted_first(128)])
def test_every_code_of_experts(gpu, tokens):
    """Each value comes out exactly, under scales of any size that is in use."""
    byte = torch.arange(256, dtype=torch.uint8, device=mode.DEVICE)
    number = byte.where(byte & 0x7F != 0x7F, 0)  # without NaN
    pairs = byte.view(1, 4, 64).repeat(1, 16, 1)
    top = torch.tensor([2.0**-7], device=mode.DEVICE)
    fp8 = FP8Matrix(number.view(1, 2, 128), torch.full((1, 1, 1), 2.0**-9, device=mode.DEVICE))
    mx = FP4Matrix(pairs, byte.clamp(70, 190).view(1, 64, 4))
    nv = NVFP4Matrix(pairs[:, :32], number.view(1, 32, 8), top)
    exact: list[tuple[Matrix, Tensor]] = [
        (fp8, e4m3_values(fp8.codes[0]) * 2.0**-9),
        (mx, decode_mxfp4(mx.data[0], mx.scale[0])),
        (nv, decode_nvfp4(nv.data[0], nv.scale[0], nv.top[0])),
    ]
    for block in INT4_BLOCKS:
        scale = 2.0 ** (torch.arange(64 * 128 // block, device=mode.DEVICE) % 90 - 60.0)
        int4 = Int4Matrix(pairs, scale.view(1, 64, -1).bfloat16())
        exact.append((int4, decode_int4(int4.data[0], int4.scale[0])))
    which = torch.arange(tokens, device=mode.DEVICE) * 128 // tokens
    x = torch.eye(128, device=mode.DEVICE)[which]
    ids = torch.zeros(tokens, 1, dtype=torch.int64, device=mode.DEVICE)
    for matrix, values in exact:
        w = operand(matrix)
        products = kernel.Products.of(ids, ids.float(), w, LIMIT, False)
        found = products.multiply(products.prepared(x, w), w, w, 1)
        assert torch.equal(found, values.t()[which])


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("kind", [interpreted_first("fp8"), "fp4", interpreted_first("nvfp4")])
def test_many_rows(gpu, monkeypatch, kind, turned):
    """Both ways to multiply, whichever the chip's table has: straight, of bfloat16 inputs in
    one stage, since tiles of float32 ones, or of more stages, take more than 99 KiB."""
    stages = pick(kernel.LAUNCHES).many.stages if turned else 1
    many = replace(pick(kernel.LAUNCHES).many, rows=64, turned=turned, stages=stages)
    launch = replace(pick(kernel.LAUNCHES), many=many, many_fp8=many, limit=0)
    monkeypatch.setattr(kernel, "LAUNCHES", {"any": launch})
    x, layer = inputs(40, 160), packed_layer(kind, 2, 160, 96)
    x = x if turned else x.bfloat16()
    ids, weight = choose(40, 2, 2)
    rounding = kind != "nvfp4"
    expected = plain.packed_experts(x.float(), ids, weight, *layer, LIMIT, rounding)
    found = kernel.packed_experts(x, ids, weight, *layer, LIMIT, rounding)
    assert (found - expected).norm() / expected.norm() < QUANTISED


@pytest.mark.parametrize(("rows", "n_in", "n_out"), [(1, 160, 130), interpreted_first(70, 32, 96)])
def test_int4_product(gpu, rows, n_in, n_out):
    matrix = stack("int4", 1, n_out, n_in).of(0)
    x = inputs(rows, n_in, torch.float32)
    close(packed_kernel.product(x, matrix), packed_cpu.product(x, matrix))
    narrow = x.bfloat16()
    found = packed_kernel.product(narrow, matrix)
    close(found, packed_cpu.product(narrow.float(), matrix).bfloat16())


def test_every_code_of_int4(gpu):
    """Under scales of any size that is in use."""
    pairs = torch.arange(256, dtype=torch.uint8, device=mode.DEVICE).view(4, 64).repeat(16, 1)
    x = torch.eye(128, device=mode.DEVICE)
    for block in INT4_BLOCKS:
        scale = 2.0 ** (torch.arange(64 * 128 // block, device=mode.DEVICE) % 90 - 60.0)
        int4 = Int4Matrix(pairs, scale.view(64, -1).bfloat16())
        found = packed_kernel.product(x, int4)
        assert torch.equal(found.t(), decode_int4(int4.data, int4.scale))
        assert torch.equal(packed_kernel.product(x.bfloat16(), int4), found.bfloat16())


def test_addresses_of_gigabytes(gpu):
    """The last expert's weights lie beyond 2^33 bytes."""
    small = stack("fp4", 5, 64, 64)
    words = 1 << 29
    far = untouched(4 * words + 1024).view(torch.uint8)
    data = far.as_strided((5, 64, 32), (4 * words, 32, 1))
    data[4].copy_(small.data[4])
    wide = FP4Matrix(data.to(mode.DEVICE), small.scale)
    x = inputs(2, 64, torch.float32)
    ids = torch.full((2, 1), 4, device=mode.DEVICE)
    weight = torch.ones(2, 1, device=mode.DEVICE)
    expected = kernel.packed_experts(x, ids, weight, small, small, small, LIMIT, rounding=False)
    found = kernel.packed_experts(x, ids, weight, wide, wide, wide, LIMIT, rounding=False)
    assert torch.equal(found, expected)
