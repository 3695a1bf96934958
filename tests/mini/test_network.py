"""The trainer's network is transformers', its checkpoint is the native layout's."""

import copy
import math

import pytest
import torch
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4ForCausalLM

from dsv4_plugin.engine import load
from dsv4_plugin.tools.conversations import SKILLS, held_out
from dsv4_plugin.tools.mini import COMPACT
from tests.conftest import random_ids
from training.data import Renderer, Vocabulary
from training.indexer import Watch
from training.muon import orthogonal
from training.network import build, hidden_states, leave_out_indexer
from training.train import MIX, Trainer


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.load(COMPACT / "vocabulary.json")


@pytest.fixture(scope="module")
def twins(vocabulary):
    """The trainer's network and transformers' own, with the same weights."""
    torch.manual_seed(0)
    ours = build(vocabulary)
    theirs = DeepseekV4ForCausalLM(ours.config)
    state = {k: v for k, v in ours.state_dict().items() if k != "unused"}
    theirs.load_state_dict(state)
    theirs.set_attn_implementation("eager")
    theirs.set_experts_implementation("eager")
    return ours, theirs


@pytest.mark.parametrize("length", [12, 260])
def test_values_and_gradients_are_transformers(twins, length):
    ours, theirs = twins
    ids = random_ids(2 * length, seed=1).view(2, length)
    weight = torch.randn(128, generator=torch.Generator().manual_seed(2))
    found = hidden_states(ours, ids)
    expected = theirs.model(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    for model, out in ((ours, found), (theirs, expected)):
        model.zero_grad()
        (out @ weight).square().sum().backward()
    gradients = dict(ours.named_parameters())
    for name, p in theirs.named_parameters():
        if p.grad is not None and p.grad.norm() > 0:
            error = (gradients[name].grad - p.grad).norm() / p.grad.norm()
            assert error < 1e-3, name


def test_a_shared_prefix_changes_nothing(twins):
    ours, _ = twins
    ids = random_ids(2 * 400, seed=3).view(2, 400)
    ids[1, :204] = ids[0, :204]
    with torch.no_grad():
        whole, split = hidden_states(ours, ids), hidden_states(ours, ids, prefix=204)
    torch.testing.assert_close(split, whole[:, 204:], atol=2e-5, rtol=1e-4)


def test_an_indexer_in_training_scores_as_transformers(twins):
    ours, theirs = twins
    model = copy.deepcopy(ours)
    ids = random_ids(2 * 150, seed=4).view(2, 150)
    expected = []
    hooks = [
        layer.self_attn.compressor.indexer.scorer.register_forward_hook(
            lambda _m, _i, out: expected.append(out)
        )
        for layer in theirs.model.layers
        if hasattr(layer.self_attn.compressor, "indexer")
    ]
    indexers = leave_out_indexer(model)
    watches = [
        Watch(model.get_submodule(n.split(".compressor")[0]), m) for n, m in indexers.items()
    ]
    for watch in watches:
        watch.positions = torch.tensor([3, 77, 149])
    with torch.no_grad():
        theirs.model(ids, use_cache=False)
        hidden_states(model, ids)
        for watch, scores in zip(watches, expected, strict=True):
            found = watch.scores()
            visible = found > -torch.inf
            assert visible.sum(-1).tolist() == [[1, 19, 37]] * 2
            wanted = scores[:, watch.positions]
            torch.testing.assert_close(found[visible], wanted[visible], atol=1e-5, rtol=1e-4)
            assert (watch.shares[~visible] == 0).all()
            assert watch.shares.sum(-1).max() < 1  # the window and the sink have the rest
    for hook in hooks:
        hook.remove()


def test_orthogonal():
    for shape in ((64, 24), (3, 24, 64)):
        g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        values = torch.linalg.svdvals(orthogonal(g))
        assert values.min() > 0.5
        assert values.max() < 1.4


@pytest.mark.thorough
def test_training_goes_on_where_it_stopped(tmp_path, vocabulary, monkeypatch):
    few = tuple((rows, skills) for rows, (_, skills) in zip((2, 1, 1), MIX[0], strict=True))
    monkeypatch.setattr("training.train.MIX", {0: few})
    vocabulary.save(tmp_path / "vocabulary.json")
    first = Trainer(tmp_path, 3, 0, 0.02, bf16=False)
    losses = [first._step({skill: [] for skill in SKILLS}) for _ in range(2)]
    first._save()
    again = Trainer(tmp_path, 3, 0, 0.02, bf16=False)
    assert again.step == 2
    for name, p in first.model.named_parameters():
        assert torch.equal(p, dict(again.model.named_parameters())[name])
    last = [t._step({skill: [] for skill in SKILLS}) for t in (first, again)]
    assert last[0] == last[1]
    assert all(map(math.isfinite, losses))


def test_the_preset_has_every_feature(mini):
    c = load(mini, dtype="float32").config
    assert (c.head_dim, c.qk_rope_head_dim, c.sliding_window) == (512, 64, 128)
    assert set(c.compress_ratios) == {0, 4, 128}
    assert (c.index_n_heads, c.index_head_dim) == (32, 128)
    assert (c.hc_mult, c.num_hash_layers, c.n_shared_experts) == (4, 1, 1)
    assert (c.n_routed_experts, c.num_experts_per_tok) == (16, 2)
    sizes = {f.name: f.stat().st_size for f in COMPACT.iterdir()}
    assert sizes.pop("dspark.safetensors") < 6e6
    assert sum(sizes.values()) < 16e6


def test_greedy_answers_are_transformers(mini):
    """One conversation per skill, with every token of the vocabulary in the running."""
    renderer = Renderer()
    theirs = DeepseekV4ForCausalLM.from_pretrained(mini, dtype=torch.float32).eval()
    ours = load(mini, dtype="float32")
    prompts = [renderer.prompt(c) for skill in SKILLS for c in held_out(skill, 1)]
    for prompt, answer in zip(prompts, ours.generate(prompts, 48), strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt + answer])
            hidden = theirs.model(ids, use_cache=False).last_hidden_state
            logits = theirs.lm_head(hidden[0, len(prompt) - 1 : -1])
        assert logits.argmax(-1).tolist() == answer


def test_sampling_stays_on_the_trained_rows(mini, vocabulary):
    prompt = Renderer().prompt(next(held_out("greet", 1)))
    known = set(vocabulary.ids)
    model = load(mini, dtype="float32")
    for seed in range(5):
        (ids,) = model.generate([prompt], 12, temperature=1.0, seed=seed)
        assert set(ids) <= known
