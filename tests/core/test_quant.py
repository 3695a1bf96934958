"""Codecs: every code, ties, saturation, subnormals, NaN; block layouts; the recorded units."""

from __future__ import annotations

import math

import pytest
import torch
from safetensors.torch import load_file

from dsv4_plugin.quant import e2m1, e4m3
from lab.paths import SHARED, needs_shared

UNITS = SHARED / "golden" / "units"


def e4m3_value(code: int) -> float:
    """By the format's definition: bias 7, subnormals at exponent 0, no infinities."""
    sign, exponent, mantissa = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = torch.tensor([e4m3_value(c) for c in range(256)])


def test_every_e4m3_code():
    codes = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(e4m3.e4m3_values(codes).nan_to_num(7777), E4M3.nan_to_num(7777))
    finite = ~E4M3.isnan()
    assert torch.equal(e4m3.encode_e4m3(E4M3)[finite], codes[finite])
    assert e4m3.encode_e4m3(torch.tensor([math.nan])) & 0x7F == 0x7F
    ones = torch.ones(256, 1)
    assert torch.equal(e4m3.decode_e4m3(codes[:, None], ones, 1)[finite, 0], E4M3[finite])


def test_e4m3_ties_go_to_even_and_large_values_saturate():
    low, high = E4M3[:126], E4M3[1:127]
    even = torch.where(torch.arange(126) % 2 == 0, low, high)
    found = e4m3.e4m3_values(e4m3.encode_e4m3((low + high) / 2))
    assert torch.equal(found, even)
    big = torch.tensor([448.0, 460.0, 1e30, math.inf, -math.inf])
    assert e4m3.e4m3_values(e4m3.encode_e4m3(big)).tolist() == [448, 448, 448, 448, -448]


@pytest.mark.parametrize("block", [128, 64, 32])
def test_fast_rounding_equals_the_codec(block):
    x = torch.randn(64, 512) * torch.logspace(-8, 8, 64)[:, None]
    x[0], x[1, 3] = 0, 448.0
    ties = (E4M3[:126] + E4M3[1:127]) / 2
    x[2, :126], x[2, 126:], x[2, block - 1 :: block] = ties, 0, 448.0
    codes, scales = e4m3.quantise_e4m3(x, block)
    assert torch.equal(
        e4m3.round_e4m3(x, block), e4m3.decode_e4m3(codes, e4m3.decode_ue8m0(scales), block)
    )


@pytest.mark.parametrize("shape", [(256, 512), (128, 128), (130, 70), (1, 1), (200, 384)])
def test_weight_blocks(shape):
    weight = torch.randn(shape) * torch.logspace(-3, 3, shape[1])
    codes, scales = e4m3.quantise_e4m3_blocks(weight)
    assert scales.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    wide = e4m3.decode_ue8m0(scales).repeat_interleave(128, 0).repeat_interleave(128, 1)
    wide = wide[: shape[0], : shape[1]]
    assert torch.equal(e4m3.encode_e4m3(weight / wide), codes)
    tile = weight[:128, :128]
    expected = 2.0 ** math.ceil(math.log2(max(float(tile.abs().max()), 1e-4) / 448))
    assert float(wide[0, 0]) == expected


def test_every_ue8m0_byte():
    codes = torch.arange(255, dtype=torch.uint8)
    values = e4m3.decode_ue8m0(codes)
    assert torch.equal(values.double(), torch.exp2(codes.double() - 127))
    assert torch.equal(e4m3.encode_ue8m0(values), codes)
    assert e4m3.decode_ue8m0(torch.tensor([255], dtype=torch.uint8)).isnan()
    with pytest.raises(ValueError, match="not a power of two"):
        e4m3.encode_ue8m0(torch.tensor([3.0]))


def test_every_e2m1_code():
    codes = torch.arange(16, dtype=torch.uint8)
    values = e2m1.decode_e2m1(codes)
    assert values.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert torch.equal(e2m1.encode_e2m1(values), codes)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert e2m1.decode_e2m1(e2m1.encode_e2m1(ties)).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert e2m1.decode_e2m1(e2m1.encode_e2m1(-ties)).tolist() == [-0.0, -1, -1, -2, -2, -4, -4]
    odd = torch.tensor([math.inf, -math.inf, 7.0, math.nan])
    assert e2m1.encode_e2m1(odd).tolist() == [7, 15, 7, 0]


def test_the_low_nibble_is_the_even_index():
    codes = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    assert e2m1.pack_nibbles(codes).tolist() == [0x21, 0x43]
    assert torch.equal(e2m1.unpack_nibbles(e2m1.pack_nibbles(codes)), codes)


def test_mxfp4_blocks():
    x = torch.randn(5, 96) * torch.logspace(-30, 30, 5)[:, None]
    x[0, :32] = 0
    data, scales = e2m1.quantise_mxfp4(x)
    found = e2m1.decode_mxfp4(data, scales)
    blocks = x.double().view(5, 3, 32)
    amax = blocks.abs().amax(-1).clamp(min=6 * 2.0**-126)
    scale = torch.exp2(torch.ceil(torch.log2(amax / 6)))
    assert torch.equal(e4m3.decode_ue8m0(scales).double(), scale)
    error = (found.double().view(5, 3, 32) - blocks).abs() / scale[..., None]
    assert error.max() <= 1.0  # half the largest step, between 4 and 6


def test_nvfp4_blocks():
    x = torch.randn(7, 64) * torch.logspace(-2, 2, 7)[:, None]
    x[0] = 0
    top = e2m1.nvfp4_global_scale(x)
    data, scales = e2m1.quantise_nvfp4(x, top)
    assert data.shape == (7, 32)
    assert scales.shape == (7, 4)
    found = e2m1.decode_nvfp4(data, scales, top)
    step = e4m3.e4m3_values(scales).clamp(min=2.0**-9).repeat_interleave(16, -1) * top
    assert ((found - x).abs() / step).max() <= 1.0 + 2**-3  # the scale itself is rounded
    assert e4m3.e4m3_values(scales).max() == 448


@needs_shared
def test_recorded_activation_quantisation():
    unit = load_file(UNITS / "unit_act_quant.safetensors")
    assert torch.equal(e4m3.round_e4m3(unit["x"], int(unit["dims"][2])), unit["y_ref"])
    unit = load_file(UNITS / "unit_act_quant_fp4.safetensors")
    x = unit["x"].to(torch.bfloat16)  # what the kernel is given
    data, scales = e2m1.quantise_mxfp4(x, int(unit["dims"][2]))
    assert torch.equal(e2m1.decode_mxfp4(data, scales), unit["y_ref"])


def test_fast_fp4_rounding_and_reading_equal_the_codec():
    x = torch.randn(40, 256) * torch.logspace(-8, 8, 40)[:, None]
    x[0] = 0
    x[1, :7] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    x[1, 31::32] = 6.0
    data, scales = e2m1.quantise_mxfp4(x)
    values = e2m1.decode_mxfp4(data, scales)
    assert torch.equal(e2m1.round_mxfp4(x), values)
    found = e2m1.look_up_mxfp4(data, scales).float()
    assert torch.equal(found[values != 0], values[values != 0])
    assert found[values == 0].abs().max() < 2.0**-60 * x.abs().max()
