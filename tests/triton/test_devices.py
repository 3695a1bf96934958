"""The kernels' tests run on cards: what they make, they make where kernels run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dsv4_plugin.cache.rows import FP8KVRows
from dsv4_plugin.config import CSA, HCA
from lab.kernels import inputs
from tests.triton import test_compress, test_qkv, test_streams

HERE = Path(__file__).parent
FILES = sorted(
    path.name for path in HERE.glob("test_*.py") if re.search(r"\bgpu[,)]", path.read_text())
)


@pytest.mark.parametrize("name", FILES)
def test_a_file_s_inputs_follow_the_device(name):
    """Either by naming mode.DEVICE, or by the fixture, which knows nothing of generators."""
    text = (HERE / name).read_text()
    by_fixture = 'usefixtures("made_on_device")' in text
    assert by_fixture or "mode.DEVICE" in text or "mode.NAMES[0]" in text
    if by_fixture:
        assert not re.search(r"Generator\(|from_numpy|device=.cpu|\.cpu\(\)", text)
        assert not re.search(r"^[A-Z_]+ = torch\.", text, re.MULTILINE)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [t for v in value for t in tensors(v)]
    return tensors(vars(value)) if hasattr(value, "__dict__") else []


@pytest.mark.parametrize("ratio", [CSA, HCA])
def test_on_a_device_that_is_no_cpu(ratio):
    """Torch's `meta` in its place: no input is left behind on the CPU."""
    with torch.device("meta"):
        made = [
            test_compress.Layer(test_compress.SMALL, ratio, "fp8", 2, 3),
            test_compress.Layer(test_compress.SMALL, ratio, "fp8", 2, 3).products(5),
            test_qkv.case(5, 6, 512, 64, FP8KVRows(512, 64), torch.bfloat16),
            test_streams.case(3, 4, 72, torch.float32),
            test_streams.mixer_of(4, 72, 24),
            inputs.angles(3, 16),
            inputs.poisoned(7),
        ]
    found = [tensors(value) for value in made]
    assert all(found)
    assert {t.device.type for part in found for t in part} == {"meta"}
