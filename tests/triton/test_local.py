"""The local engine on a device: its steps are the device's, and its tokens torch's."""

from __future__ import annotations

import pytest

from dsv4_plugin import load
from dsv4_plugin.batch import Batch
from dsv4_plugin.tools.make import make_checkpoint
from lab.kit import mode
from tests.conftest import A_LAYER_OF_EACH, SMALL, random_ids
from tests.tolerances import clear_choices

NEW = 3


@pytest.mark.thorough
@pytest.mark.skipif(mode.INTERPRET, reason="compiled code is sooner done")
@pytest.mark.parametrize("gpu", mode.NAMES[:1], indirect=True)
def test_generating_on_the_device(gpu, tmp_path, monkeypatch):
    """Greedy tokens of two requests; where two logits nearly tie, either may be chosen."""
    make_checkpoint(tmp_path / "it", "tiny", 2, SMALL | A_LAYER_OF_EACH, tokenizer=False)
    mode.kernels(monkeypatch, "triton")
    steps = []
    build = Batch.step
    monkeypatch.setattr(Batch, "step", lambda *args: steps.append(build(*args)) or steps[-1])
    model = load(tmp_path / "it", dtype="bfloat16", kv_dtype="fp8", device=mode.DEVICE)
    prompts = [random_ids(n, seed=n).tolist() for n in (12, 5)]
    found = model.generate(prompts, NEW, ignore_eos=True)
    assert len(steps) == NEW
    mode.kernels(monkeypatch, "torch")
    plain = load(tmp_path / "it", dtype="bfloat16", kv_dtype="fp8")
    clear = [clear_choices(plain, *pair) for pair in zip(prompts, found, strict=True)]
    assert sum(clear) >= NEW
