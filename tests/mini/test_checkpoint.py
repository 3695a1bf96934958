"""dsv4-mini's checkpoint: exported from a run, expanded, converted to every packed format."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dsv4_plugin.batch import Sampler
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.engine import load
from dsv4_plugin.speculate import Speculator
from dsv4_plugin.tools.conversations import SKILLS, held_out
from dsv4_plugin.tools.convert import CONVERSIONS, convert_checkpoint
from dsv4_plugin.tools.mini import COMPACT, DSPARK, UNUSED, VOCABULARY, WEIGHTS, expand, make_mini
from tests.conftest import random_ids
from tests.tolerances import LOGITS_STD
from training import dspark, export
from training.data import Renderer, Vocabulary
from training.mtp import FILE, Drafter
from training.network import build, hidden_states
from training.train import Finished


def test_expansion(mini):
    """Known tokens have rows of their own, all others share one; every id has two experts."""
    compact, full = load_file(COMPACT / WEIGHTS), load_file(mini / "model.safetensors")
    ids = torch.tensor(json.loads((COMPACT / VOCABULARY).read_text()))
    others = torch.ones(len(full["head.weight"]), dtype=torch.bool).index_fill(0, ids, False)
    for name in ("embed.weight", "head.weight"):
        assert torch.equal(full[name][ids], compact["embed.weight"])
    assert (full["head.weight"][others] == compact[UNUSED]).all()
    assert not full["embed.weight"][others].any()
    first, second = full["layers.0.ffn.gate.tid2eid"].unbind(1)
    assert (first != second).all()
    assert set(first.tolist()) == set(second.tolist()) == set(range(16))


def test_tensors_that_do_not_fit_are_named(mini):
    compact = load_file(COMPACT / WEIGHTS)
    compact.pop("norm.weight")
    ids = torch.tensor(json.loads((COMPACT / VOCABULARY).read_text()))
    with pytest.raises(ValueError, match=r"does not fit config.json: norm.weight"):
        expand(ModelConfig.from_pretrained(mini), compact, ids)


@pytest.mark.parametrize("fmt", CONVERSIONS)
def test_every_format_greets(mini, tmp_path, fmt):
    convert_checkpoint(mini, tmp_path / fmt, fmt)
    encoder = Renderer().encoder
    asked = [{"role": "user", "content": "Hello, I am Anna."}]
    prompt = encoder.encode(asked, thinking=False).ids
    (answer,) = load(tmp_path / fmt, kv_dtype="fp8").generate([prompt], 20)
    assert encoder.tokenizer.decode(answer) == "Hello, Anna! How can I help?"


def test_an_exported_run_computes_what_was_trained(tmp_path, monkeypatch):
    """The trainer's network and its MTP layer against the local engine on the exported weights."""
    vocabulary = Vocabulary.load(COMPACT / VOCABULARY)
    torch.manual_seed(3)
    model, drafter = build(vocabulary), Drafter(len(vocabulary.ids))
    for p in [*model.parameters(), *drafter.parameters()]:
        p.data = p.data.bfloat16().float()
    run, compact, out = (tmp_path / name for name in ("run", "compact", "out"))
    run.mkdir()
    compact.mkdir()
    torch.save({"model": model.state_dict(), "average": {}, "step": 0}, run / "trainer.pt")
    torch.save({"drafter": drafter.state_dict()}, run / FILE)
    vocabulary.save(run / VOCABULARY)
    monkeypatch.setattr("sys.argv", ["export", "--run", str(run), "--out", str(compact)])
    export.main()
    make_mini(out, compact)

    rows = random_ids(150, seed=5, vocab=len(vocabulary.ids))
    kept = []
    model.model.layers[-1].register_forward_hook(lambda _m, _i, output: kept.append(output))
    with torch.no_grad():
        expected = model.lm_head(hidden_states(model, rows[None])[0])
        following = model.model.embed_tokens(rows[None, 1:])
        drafted = model.lm_head(drafter(kept[0][:, :-1], following, model)[0])

    engine = load(out, "float32", mtp=True)
    ids = torch.tensor(vocabulary.ids)[rows]
    known = torch.tensor(vocabulary.ids)
    close(engine.logits(ids)[:, known], expected)
    speculator = Speculator(engine, 1)
    batch = speculator.batch([len(ids)], len(ids))
    with torch.inference_mode():
        step = batch.step(torch.tensor([0]), torch.tensor([len(ids) - 1]))
        h, means = speculator._main(batch, step, ids[:-1])
        h = speculator.drafts.follow(batch, step, h, means, ids[1:])
        found = engine.model.head(engine.drafter.collapse(h))
    close(found[:, known], drafted)


def test_what_the_shipped_drafters_are_worth(mini, tmp_path):
    """On held-out conversations, which they do not change: tokens per step of the MTP layer, and of
    blocks."""
    make_mini(tmp_path / "mini", dspark=True)
    renderer = Renderer()
    prompts = [renderer.prompt(c) for skill in SKILLS for c in held_out(skill, 2)]
    expected = load(mini, "float32").generate(prompts, 64)
    for directory, n, least in ((mini, 1, 1.8), (tmp_path / "mini", 5, 2.5)):
        speculator = Speculator(load(directory, "float32", mtp=True), n)
        with torch.inference_mode():
            assert speculator.generate(prompts, 64, Sampler(0.0, None), 256, False) == expected
        assert 1 + speculator.accepted / speculator.steps > least


def close(found, expected):
    assert (found - expected).abs().max() < LOGITS_STD * expected.std()


def test_a_trained_block_drafter_proposes_what_was_trained(tmp_path):
    """The trainer's stages, blocks at random tokens of two rows (one shorter than the window), and
    the confidence of each draft, against the local engine on the exported weights."""
    torch.manual_seed(4)
    run = Finished.shipped()
    drafter = dspark.Drafter(len(run.vocabulary.ids))
    for p in drafter.parameters():
        if not p.any():
            p.data.normal_(std=0.05)
        p.data = p.data.bfloat16().float()
    compact, out = tmp_path / "compact", tmp_path / "out"
    shutil.copytree(COMPACT, compact)
    dspark.save(drafter, compact / DSPARK)
    make_mini(out, compact, dspark=True)

    rows = random_ids(300, seed=6, vocab=len(run.vocabulary.ids)).view(2, 150)
    known = torch.tensor(run.vocabulary.ids)
    engine = load(out, "float32", mtp=True)
    speculator, who = Speculator(engine, 5), torch.tensor([0])
    speculator.drafts.pick = lambda logits: known[logits[:, known].argmax(-1)]
    for row, p in ((0, 40), (1, 140)):
        ids = known[rows[row]]
        batch = speculator.batch([len(ids)], len(ids))
        with torch.inference_mode():
            step = batch.step(who, torch.tensor([p + 1]))
            h, means = speculator._main(batch, step, ids[: p + 1])
            speculator.drafts.follow(batch, step, h, means, ids[1 : p + 2])
            y, found = speculator.drafts.block(batch, who, ids[p + 1 : p + 2])
        with torch.no_grad():
            _, read = dspark.read(run.model, drafter.targets, rows, 0)
            start = run.model.model.embed_tokens(rows[row, p + 1 : p + 2])
            rope = run.model.model.rotary_emb
            expected = drafter(read, torch.tensor([row]), torch.tensor([p]), start, rope)
            before = torch.cat([ids[p + 1 : p + 2], found.drafts[0, :-1]])
            before = torch.searchsorted(known, before)[None]
            logits, sure = drafter.heads(run.model, expected, before)
        close(y, expected)
        close(found.logits[..., known], logits[..., :-1])
        close(found.confidence, sure)
