"""Split networks equal the whole one: any number of ranks, groups that do not divide, stages."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from vllm.forward_context import override_forward_context

import vllm_ext.parallel
from dsv4_plugin.batch import Batch
from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.checkpoint.files import check_checkpoint, read_tensors
from dsv4_plugin.checkpoint.load import load_weights
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.engine import load
from dsv4_plugin.model.parallel import LocalParallel
from dsv4_plugin.model.transformer import Transformer
from dsv4_plugin.tools.make import make_checkpoint, preset_fields
from tests.conftest import A_LAYER_OF_EACH, SMALL, random_ids
from tests.parallel.ranks import DataGroup, DataParallel, Ranks
from tests.tolerances import LOGITS_STD


def logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """Prefill in two chunks, then 4 decoded tokens."""
    batch = Batch(model, CacheLayout.of(model.config, "float32"), [len(ids)], 300, poison=True)
    cuts = [0, 300, len(ids) - 4, *range(len(ids) - 3, len(ids) + 1)]
    hidden = [batch.run([(0, ids[a:b])]) for a, b in pairwise(cuts)]
    return model.head(torch.cat(hidden))


def whole_logits(ranks: Ranks, models: list[Transformer], ids: torch.Tensor) -> torch.Tensor:
    """Of ranks that have a part of the vocabulary each."""
    return torch.cat(ranks.run(lambda rank: logits(models[rank], ids)), -1)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.std())


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_equal_one(small, size, expert_parallel):
    """tiny has 4 heads in 2 output groups: over 4 ranks a group is split inside."""
    ids = random_ids(500, seed=2)
    ranks = Ranks(size)
    models = ranks.load(small, expert_parallel)
    expected = load(small, "float32").logits(ids)
    assert error(whole_logits(ranks, models, ids), expected) < LOGITS_STD


def test_data_parallel_ranks_share_the_experts(small, monkeypatch):
    """Each with half of them and prompts of its own, in steps of as many rows as it has."""
    ranks = Ranks(2)
    groups = [DataGroup(ranks, rank) for rank in range(2)]
    monkeypatch.setattr(vllm_ext.parallel, "get_dp_group", lambda: groups[ranks.mine.rank])
    config = ModelConfig.from_pretrained(small)
    headers = check_checkpoint(config, small)

    def one(rank: int) -> torch.Tensor:
        model = Transformer(config, DataParallel(config, torch.float32))
        load_weights(model, read_tensors(headers, progress=False))
        return logits(model, asked[rank])

    asked = [random_ids(n, seed=n) for n in (500, 420)]
    most = SimpleNamespace(max=lambda: 300)  # rows of the longest step of any rank
    metadata = SimpleNamespace(dp_metadata=SimpleNamespace(num_tokens_across_dp_cpu=most))
    with override_forward_context(metadata):
        found = ranks.run(one)
    for ids, result in zip(asked, found, strict=True):
        assert error(result, load(small, "float32").logits(ids)) < LOGITS_STD


def test_heads_that_straddle_groups(tmp_path):
    """12 heads in 4 groups of 3, over 6 ranks of 2; 32 indexer heads do not split by 6."""
    odd = {
        "num_attention_heads": 12, "o_groups": 4, "moe_intermediate_size": 96, "vocab_size": 516,
    }  # fmt: skip
    make_checkpoint(tmp_path / "odd", "tiny", seed=4, overrides=SMALL | odd, tokenizer=False)
    ids = random_ids(500, seed=3)
    ranks = Ranks(6)
    models = ranks.load(tmp_path / "odd")
    expected = load(tmp_path / "odd", "float32").logits(ids)
    assert error(whole_logits(ranks, models, ids), expected) < LOGITS_STD


def test_a_rank_holds_its_part(small):
    """Output groups and experts (the other products are packed out of sight)."""

    def nbytes(model: Transformer) -> int:
        split = ("wo_a", ".experts.")
        return sum(
            p.nbytes for n, p in model.named_parameters() if any(part in n for part in split)
        )

    whole = load(small, "float32").model
    for expert_parallel in (False, True):
        part = Ranks(2).load(small, expert_parallel)[0]
        assert nbytes(part) * 2 == nbytes(whole)


@pytest.mark.parametrize(("experts", "size"), [(33, 2), (33, 4), (104, 4)])
def test_any_number_of_experts_is_spread(tmp_path, experts, size):
    """Ranks hold as many as others or one less, and every expert is somewhere."""
    hf = SMALL | A_LAYER_OF_EACH | {"n_routed_experts": experts, "num_experts_per_tok": 4}
    make_checkpoint(tmp_path / "odd", "tiny", 1, hf, tokenizer=False)
    ids = random_ids(320, seed=4)
    ranks = Ranks(size)
    models = ranks.load(tmp_path / "odd", expert_parallel=True)
    counts = [model.layers["1"].ffn.experts.count for model in models]
    assert sum(counts) == experts
    assert max(counts) - min(counts) <= 1
    expected = load(tmp_path / "odd", "float32").logits(ids)
    assert error(whole_logits(ranks, models, ids), expected) < LOGITS_STD


def test_five_ranks_of_33_experts():
    config = ModelConfig.from_hf(preset_fields("tiny") | {"n_routed_experts": 33})
    parts = [config.experts_of_rank(rank, 5) for rank in range(5)]
    assert [expert for part in parts for expert in part] == list(range(33))
    assert {len(part) for part in parts} == {6, 7}
    config.require_expert_parallel(33)
    with pytest.raises(ValueError, match=r"over 34 ranks needs an expert for each; n_ro.* is 33"):
        config.require_expert_parallel(34)


@pytest.mark.parametrize("cut", [1, 2, 4])
def test_stages_equal_the_whole(small, cut):
    """Two stages with caches of their own; the streams travel between them."""
    config = ModelConfig.from_pretrained(small)
    ids = random_ids(400, seed=5)
    headers = check_checkpoint(config, small)
    layout = CacheLayout.of(config, "float32")
    stages = []
    for layers in (range(cut), range(cut, config.num_hidden_layers)):
        model = Transformer(config, LocalParallel(config, torch.float32), layers)
        load_weights(model, read_tensors(headers, progress=False))
        stages.append(Batch(model, layout, [len(ids)], 150, poison=True))
    with torch.inference_mode():
        found = []
        for start in range(0, len(ids), 150):
            part = ids[start : start + 150]
            h = stages[0].model.spread(part)
            for batch in stages:
                step = batch.step(torch.tensor([0]), torch.tensor([len(part)]))
                h = batch.model.run(h, part, step, batch.caches)
            found.append(stages[1].model.head(stages[1].model.collapse(h)))
    assert error(torch.cat(found), load(small, "float32").logits(ids)) < LOGITS_STD
