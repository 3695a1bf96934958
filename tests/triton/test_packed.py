"""FP8 linears: few and many rows, by bits and by codes, cut and whole sums, merged and rounded."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv4_plugin.kernels import launch
from dsv4_plugin.kernels.norm import kernel as norm
from dsv4_plugin.kernels.norm import reference as norm_reference
from dsv4_plugin.kernels.packed import Both, FP8Matrix, Inputs, Rounded, fp8, reference
from dsv4_plugin.kernels.packed.fp8 import EIGHT, LINEARS, Launch, Tile, Tiles, Way
from dsv4_plugin.kernels.streams import Mixer
from dsv4_plugin.kernels.streams import kernel as streams
from dsv4_plugin.quant.e4m3 import e4m3_values
from lab.kernels.cases import generator
from lab.kit import mode, order
from lab.kit.mode import interpreted_first
from tests.tolerances import BF16_SUM, OP_FP32

LIMIT = 1.0
WAYS = ["bits", "codes"]
"""How products are made on chips that have those of e4m3 codes: by bits on others."""


@pytest.fixture(params=WAYS)
def way(request, monkeypatch) -> str:
    """Tables of a chip with products of codes and of one without."""
    here = launch.pick(LINEARS)
    if request.param == "codes" and here.codes is None and not mode.INTERPRET:
        pytest.skip("this chip has no products of e4m3 codes")
    codes = (here.codes or EIGHT) if request.param == "codes" else None
    for family in LINEARS:
        monkeypatch.setitem(LINEARS, family, replace(here, codes=codes))
    return request.param


def inputs(rows: int, width: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    x = torch.randn(rows, width, generator=generator(rows + width + seed))
    return x.to(dtype).to(mode.DEVICE)


def weight(n_out: int, n_in: int, height: int = 128, seed: int = 0) -> FP8Matrix:
    """Scales are no powers of two and differ from block to block."""
    g = generator(n_out + n_in + seed)
    codes = torch.randint(0, 256, (n_out, n_in), generator=g, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0  # NaN
    scale = torch.rand(-(-n_out // height), -(-n_in // 128), generator=g) / 1000
    return FP8Matrix(codes.to(mode.DEVICE), scale.to(mode.DEVICE), height)


def whole(rows: int, n_out: int, n_in: int) -> tuple[Tensor, FP8Matrix]:
    """Small numbers, whose sums within a block are exact: only the order of blocks shows, in
    float32. (Compiled, where these are no tensor cores' products, in bfloat16.)"""
    matrix = weight(n_out, n_in)
    matrix.codes.bitwise_and_(0x87).bitwise_or_(0x38)
    x = torch.randint(-3, 4, (rows, n_in), generator=generator(rows))
    return x.to(mode.DEVICE, torch.float32 if mode.INTERPRET else torch.bfloat16), matrix


def values(x: Inputs) -> Tensor:
    return x.values() if isinstance(x, Rounded) else x


def close(found: Inputs, expected: Inputs) -> None:
    found, expected = values(found), values(expected)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    error = (found.float() - expected.float()).abs()
    tolerance = OP_FP32 if found.dtype == torch.float32 else BF16_SUM
    assert error.max() <= tolerance * expected.float().abs().max()


def close_rounded(found: Inputs, expected: Inputs) -> None:
    """Other orders of sums make a value here and there its neighbour."""
    found, expected = values(found).float(), values(expected).float()
    error = (found - expected).abs()
    assert (error > 0).sum() <= max(4, 0.01 * error.numel())
    assert error.max() <= 0.07 * expected.abs().max()


def cut(programs: int, least: int = 128):
    """Tables whose pieces are as small as can be."""
    return {k: replace(v, programs=programs, least=least) for k, v in LINEARS.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, interpreted_first(torch.float32)])
@pytest.mark.parametrize(
    ("rows", "n_in", "n_out"),
    [(1, 384, 130), interpreted_first(17, 32, 96), interpreted_first(130, 160, 200)],
)
def test_product(gpu, way, rows, n_in, n_out, dtype):
    """Rounded inputs, in every tile; blocks and tiles that are not full."""
    matrix, x = weight(n_out, n_in), inputs(rows, n_in, dtype)
    expected = reference.product(reference.round_rows(x), matrix)
    found = fp8.product(fp8.round_rows(x), fp8.arranged(matrix, True))
    close(found, expected)


@pytest.mark.parametrize("rows", [1, interpreted_first(40), interpreted_first(130)])
def test_inputs_as_they_are(gpu, way, rows):
    """Of a checkpoint that does not round: by bits on every chip."""
    matrix, x = weight(136, 256), inputs(rows, 256)
    found = fp8.product(x, fp8.arranged(matrix, False))
    close(found, reference.product(x, matrix))


def test_every_code(gpu, way):
    """Each e4m3 value comes out exactly, from its own place."""
    byte = torch.arange(256, dtype=torch.uint8, device=mode.DEVICE)
    number = byte.where(byte & 0x7F != 0x7F, 0).view(2, 128)
    matrix = FP8Matrix(number, torch.full((1, 1), 2.0**-9, device=mode.DEVICE))
    x = torch.eye(128, device=mode.DEVICE)
    found = fp8.product(fp8.round_rows(x), fp8.arranged(matrix, True))
    assert torch.equal(found.t(), e4m3_values(number) * 2.0**-9)


@pytest.mark.parametrize("rows", [1, interpreted_first(40)])
@pytest.mark.parametrize("programs", [2, 4, 1000])
def test_pieces(gpu, way, rows, programs, monkeypatch):
    """Of 1, 2 and 4 blocks, whoever comes last: merged in order, whatever the programs' order."""
    for family, row in cut(programs).items():
        monkeypatch.setitem(LINEARS, family, row)
    x, matrix = whole(rows, 64, 512)
    arranged, given = fp8.arranged(matrix, True), fp8.round_rows(x)
    found = []
    for seed in range(4):
        with order.seeded(seed):
            found.append(fp8.product(given, arranged))
    assert all(torch.equal(found[0], other) for other in found[1:])
    close(found[0], reference.product(reference.round_rows(x), matrix))


def test_pieces_follow_from_the_weight():
    table = Launch(EIGHT, None, 192)
    for tiles, inputs_, expected in (
        (24, 4096, 8), (512, 1024, 1), (64, 8192, 4), (16, 4096, 8), (1, 512, 1), (1, 640, 1),
        (1, 1 << 20, 16),
    ):  # fmt: skip
        assert fp8.pieces(tiles, inputs_, table) == expected


@pytest.mark.parametrize("chip", [*launch.FAMILY, "gfx1100"])
def test_chips_multiply_codes_from_sm89_on(chip, monkeypatch):
    monkeypatch.setattr(launch, "architecture", lambda: chip)
    eight = chip.startswith("sm") and int(chip[2:]) >= 89
    assert (launch.pick(LINEARS).codes is not None) == eight


def test_alone_and_in_company(gpu, way):
    """The same bits in every company up to the line, and in every one beyond."""
    line = launch.pick(LINEARS).line
    x, matrix = whole(line + 2, 130, 1024)
    matrix = fp8.arranged(matrix, True)
    few = [1, 16, 17, line] if mode.INTERPRET else [1, 17]
    first = [fp8.product(fp8.round_rows(x[:n]), matrix)[0] for n in few]
    assert all(torch.equal(first[0], other) for other in first[1:])
    if mode.INTERPRET:
        many = fp8.product(fp8.round_rows(x), matrix)
        turned = fp8.product(fp8.round_rows(x.flip(0)), matrix)
        assert torch.equal(many, turned.flip(0))


@pytest.mark.parametrize("rows", [1, interpreted_first(130)])
def test_two_weights_of_one_input(gpu, way, rows):
    """Each result is a tensor of its own."""
    matrix, x = weight(128 + 72, 256), inputs(rows, 256)
    found = fp8.products(fp8.round_rows(x), fp8.arranged(matrix, True), (128, 72))
    expected = reference.products(reference.round_rows(x), matrix, (128, 72))
    for f, e in zip(found, expected, strict=True):
        assert f.is_contiguous()
        close(f, e)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 128), interpreted_first(40, 256), interpreted_first(130, 128)]
)
def test_gated_product(gpu, way, rows, width, rounded):
    """The clamped SwiGLU of a shared expert."""
    matrix, x = weight(2 * width, 1024), inputs(rows, 1024)
    found = fp8.gated_product(fp8.round_rows(x), fp8.arranged(matrix, True), LIMIT, rounded)
    expected = reference.gated_product(reference.round_rows(x), matrix, LIMIT, rounded)
    assert isinstance(found, Rounded) == rounded
    (close_rounded if rounded else close)(found, expected)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(
    ("rows", "n"), [(5, 40), interpreted_first(2, 128), interpreted_first(130, 256)]
)
def test_grouped_product(gpu, way, rows, n, rounded):
    """wo_a: inputs of a group from a wider row, a scale for every row of the weight; rounded for
    wo_b, also where a group ends within a block."""
    matrix = weight(3 * n, 160, height=1)
    x = inputs(rows, 4 * 160).view(rows, 4, 160)[:, 1:]
    found = fp8.grouped_product(x, fp8.arranged(matrix, False), rounded)
    expected = reference.grouped_product(x, matrix, rounded)
    assert isinstance(found, Rounded) == rounded
    (close_rounded if rounded else close)(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", [96, 128, 1300])
def test_rounded_rows(gpu, way, width, dtype):
    """Bit for bit, as values and as codes; tiny rows and zeros too."""
    x = torch.cat([inputs(4, width, dtype), inputs(2, width, dtype) * 1e-4, inputs(1, width) * 0])
    x = x.to(dtype)
    expected = reference.round_rows(x)
    found = fp8.round_rows(x)
    assert (found.scale is None) == (way == "bits")
    assert torch.equal(found.values(), expected.values())
    assert torch.equal(fp8.round_inputs(x), expected.values())


@pytest.mark.parametrize("width", [48, 128, 1536])
def test_rounded_norm(gpu, way, width):
    """As rounding the norm's result."""
    x, by = inputs(3, width + 8)[:, 8:], torch.rand(width, device=mode.DEVICE) + 0.5
    found = norm.rounded_norm(x, by, 1e-6)
    assert torch.equal(found.values(), reference.round_rows(norm.rms_norm(x, by, 1e-6)).values())
    close_rounded(found, norm_reference.rounded_norm(x, by, 1e-6))


@pytest.mark.parametrize("width", [96, 264])
def test_the_input_of_a_sublayer_also_rounded(gpu, way, width):
    """As rounding what leaves the streams, in slabs too."""
    mixer = Mixer(
        inputs(24, 4 * width, torch.float32, 1) * width**-0.5,
        inputs(1, 24, torch.float32)[0], torch.ones(24, device=mode.DEVICE),
        inputs(1, width, torch.float32, 2)[0], 3, 1e-6, 1e-6, rounds=True,
    )  # fmt: skip
    h = inputs(9, 4 * width).view(9, 4, width)
    _, found, by = streams.streams(None, h, None, mixer)
    _, x, same = streams.streams(None, h, None, replace(mixer, rounds=False))
    assert torch.equal(found.plain, x)
    assert torch.equal(by.mixing, same.mixing)
    assert (found.rounded.scale is None) == (way == "bits")
    assert torch.equal(found.rounded.values(), reference.round_rows(x).values())
    again = Both.of(*found.tensors()).rounded
    assert torch.equal(again.values(), found.rounded.values())


def test_torch_reads_arranged_weights(gpu, way):
    """And arranging them again changes nothing."""
    for width in (256, 160):
        matrix = weight(40, width)
        arranged = fp8.arranged(matrix, True)
        assert fp8.arranged(arranged, True) is arranged
        assert arranged.shape == matrix.shape
        rows = arranged.rows(8, 40, torch.float32).clone()
        assert torch.equal(rows, matrix.rows(8, 40, torch.float32))


def test_weights_of_the_other_kind_are_refused(gpu, way):
    x, matrix = inputs(1, 128), weight(64, 128)
    with pytest.raises(AssertionError, match="arranged at load"):
        fp8.product(x, matrix)
    if way == "codes":
        with pytest.raises(AssertionError, match="other kind"):
            fp8.product(x, fp8.arranged(matrix, True))


def test_a_tile_may_turn(gpu, monkeypatch):
    """Rows as the left operand give the same."""
    if not mode.INTERPRET and launch.pick(LINEARS).codes is None:
        pytest.skip("this chip has no products of e4m3 codes")
    matrix, x = weight(72, 256), inputs(20, 256)
    found = []
    for turned in (False, True):
        tile = Tile(64, 32, 4, 3, turned)
        tiles = Tiles(tile, tile, tile)
        for family, row in LINEARS.items():
            row = replace(row, codes=Way(tiles, tiles, tiles))
            monkeypatch.setitem(LINEARS, family, row)
        found.append(fp8.product(fp8.round_rows(x), fp8.arranged(matrix, True)))
    close(*found)
    close(found[1], reference.product(reference.round_rows(x), matrix))
