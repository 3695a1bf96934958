"""Quantised layers against the authors' recorded outputs, layer by layer."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from dsv4_plugin import load
from dsv4_plugin.batch import Batch
from dsv4_plugin.kernels.streams import spread
from dsv4_plugin.model import indexer
from lab.paths import SHARED, needs_shared
from tests.tolerances import QUANTISED

GOLDEN = SHARED / "golden" / "fp8_fp4"
TOKENS = 300


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def model():
    return load(GOLDEN, dtype="bfloat16", kv_dtype="fp8", index_dtype="fp4")


@needs_shared
@pytest.mark.parametrize("layer", range(4))
def test_recorded_layers(model, golden, layer, monkeypatch):
    """Each layer from the recorded output of the one before, and its FFN from the recorded output
    of its attention, with the recorded choices: a choice that tips over under another rounding
    would hide everything else."""

    def recorded(name: str) -> torch.Tensor | None:
        return golden.get(f"prefill.layer{layer}.{name}")

    network, block = model.model, model.model.layers[str(layer)]
    ids = golden["input_ids"].view(-1)[:TOKENS]
    before = golden.get(f"prefill.layer{layer - 1}.out")
    h = network.spread(ids) if before is None else before[0].to(torch.bfloat16)
    gate = recorded("gate_idx"), recorded("gate_w")
    monkeypatch.setattr(block.ffn.gate, "forward", lambda x, ids, position: gate)
    if recorded("topk_idx_plus_offset") is not None:
        chosen = (recorded("topk_idx_plus_offset")[0] - TOKENS).clamp(min=-1).int()
        monkeypatch.setattr(indexer, "choose", lambda *_: chosen)
    found = {}
    attn, ffn = block.attend, block.ffn.forward

    def attention_then_the_recorded(x, step, cache):
        found["attn_out"] = attn(x, step, cache)
        return recorded("attn_out")[0].to(torch.bfloat16)

    def remember(x, ids, step):
        found["ffn_out"] = ffn(x, ids, step)
        return found["ffn_out"]

    monkeypatch.setattr(block, "attend", attention_then_the_recorded)
    monkeypatch.setattr(block.ffn, "forward", remember)
    with torch.inference_mode():
        batch = Batch(network, model.layout, [TOKENS], TOKENS)
        step = batch.step(torch.tensor([0]), torch.tensor([TOKENS]))
        found["out"] = spread(*block((None, h, None), ids, step, batch.caches[layer]))
    for name, out in found.items():
        expected = recorded(name)[0]
        assert (out.float() - expected).norm() / expected.norm() < QUANTISED
