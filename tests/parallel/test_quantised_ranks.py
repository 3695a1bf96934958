"""Packed weights over ranks: each takes its own blocks; where one would be cut it is refused."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.config import CSA
from dsv4_plugin.engine import load
from dsv4_plugin.tools.make import make_checkpoint
from tests.conftest import SMALL, random_ids
from tests.parallel.ranks import Ranks
from tests.parallel.test_ranks import whole_logits
from tests.tolerances import ROUNDED_AGAIN

ALIGNED = SMALL | {
    "hidden_size": 256,
    "head_dim": 128,
    "q_lora_rank": 128,
    "o_lora_rank": 128,
    "moe_intermediate_size": 256,
    "index_head_dim": 64,
}


@pytest.fixture(scope="module", params=["fp8-fp4", "base", "nvfp4", "ct-w4a16", "gptq"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks") / request.param
    make_checkpoint(folder, "tiny", 5, ALIGNED, tokenizer=False, fmt=request.param)
    return folder


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_two_ranks_equal_one(checkpoint, expert_parallel):
    """The mean, because sums in another order now and then round to another e4m3 neighbour."""
    ids = random_ids(320, seed=2)
    ranks = Ranks(2)
    models = ranks.load(checkpoint, expert_parallel)
    whole = load(checkpoint, "float32")
    expected = whole.logits(ids)
    found = whole_logits(ranks, models, ids)
    assert (found - expected).abs().mean() / expected.std() < ROUNDED_AGAIN
    assert models[0].weight_bytes.packed < 0.7 * whole.model.weight_bytes.packed


def test_a_group_split_inside(tmp_path):
    """Four heads of 128 in two groups over four ranks: wo_a's columns are cut at block edges, and
    wo_b's are repeated. Ranks round their parts of wo_b's input, not its sum: twice the noise."""
    wide = ALIGNED | {"moe_intermediate_size": 512}
    make_checkpoint(tmp_path / "wide", "tiny", 6, wide, tokenizer=False, fmt="fp8-fp4")
    ids = random_ids(320, seed=3)
    ranks = Ranks(4)
    models = ranks.load(tmp_path / "wide")
    expected = load(tmp_path / "wide", "float32").logits(ids)
    found = whole_logits(ranks, models, ids)
    assert (found - expected).abs().mean() / expected.std() < 2 * ROUNDED_AGAIN


def test_cut_blocks_are_refused(tmp_path):
    make_checkpoint(tmp_path / "tiny", "tiny", overrides=SMALL, tokenizer=False, fmt="fp8-fp4")
    with pytest.raises(ValueError, match=r"2 tensor-parallel ranks cannot share .* blocks of 128"):
        Ranks(2).load(tmp_path / "tiny")


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_of_one_input_lie_on_top_of_each_other(tmp_path, ranks):
    """And are no copies, also where the checkpoint is loaded by ranks."""
    make_checkpoint(tmp_path / "it", "tiny", 5, ALIGNED, tokenizer=False, fmt="fp8-fp4")
    for model in Ranks(ranks).load(tmp_path / "it"):
        codes = model.layers["0"].attn.down.matrix.codes
        model.finalize_weights()
        assert model.layers["0"].attn.down.matrix.codes is codes
        layers = [layer for layer in model.layers.values() if layer.attn.ratio == CSA]
        assert layers
        for layer in layers:
            attn, shared = layer.attn, layer.ffn.shared_experts
            for both, first, second in (
                (attn.down, attn.wq_a, attn.wkv),
                (attn.up, attn.wq_b, attn.indexer.wq_b),
                (shared.gated, shared.w1, shared.w3),
            ):
                assert len(both.matrix.codes) == len(first.weight) + len(second.weight)
                for part in (first.weight, second.weight, first.stored().codes):
                    assert part.untyped_storage().data_ptr() == both.matrix.codes.data_ptr()
                x = torch.randn(3, first.weight.shape[1])
                assert all(map(torch.equal, both(x), (first(x), second(x))))


def test_the_weights_are_bytes(checkpoint):
    layer = load(checkpoint).model.layers["0"]
    assert next(layer.attn.wq_b.parameters()).dtype == torch.uint8
    assert layer.ffn.experts.get_parameter("w1_weight").dtype == torch.uint8
