"""The shared expert's clamped SwiGLU."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.kernels.swiglu import cpu, kernel, reference
from tests.tolerances import OP_FP32

pytestmark = pytest.mark.usefixtures("made_on_device")


@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 2048), (5, 333)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_swiglu(gpu, tokens, width, dtype):
    torch.manual_seed(0)
    gate, up = (6 * torch.randn(tokens, width).to(dtype) for _ in range(2))
    gate[0, 0] = -90.0  # whose sigmoid is nothing
    expected = reference.swiglu(gate, up, 7.0, dtype)
    assert expected.float().abs().max() <= 49.0
    for found in (kernel.swiglu(gate, up, 7.0, dtype), cpu.swiglu(gate, up, 7.0, dtype)):
        assert found.dtype == dtype
        tolerance = OP_FP32 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-6)
