"""DSpark through vLLM's own speculator: it proposes what the local engine proposes, whatever the
chunks, the company and the cache; and no draft changes an answer."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin import load
from dsv4_plugin.speculate import Speculator
from dsv4_plugin.tools.formats import dspark_fields
from dsv4_plugin.tools.make import make_checkpoint, preset_fields
from lab.kit import mode
from tests.conftest import SMALL, random_ids
from tests.vllm.test_options import configure
from tests.vllm_v2.engine import NEW, Watch, counted, engine, generate

WIDTH = 5
KINDS = {"num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4]}


@pytest.fixture(scope="module")
def drafting(tmp_path_factory):
    """vLLM takes method `mtp` for `dspark` where a path says so: this one does not."""
    directory = tmp_path_factory.mktemp("blocks") / "0731"
    make_checkpoint(directory, "tiny", 1, SMALL | KINDS, tokenizer=False, fmt="0731")
    return directory


@pytest.fixture(scope="module")
def local(drafting):
    return load(drafting, "float32", mtp=True)


@pytest.fixture(scope="module")
def llm(drafting):
    with engine(drafting, "dspark", WIDTH) as running:
        yield running


@pytest.fixture(autouse=True)
def torch_s_kernels(monkeypatch):
    """vLLM's own kernels are Triton's; ours are in tests/triton."""
    mode.kernels(monkeypatch, "torch")


@pytest.fixture(scope="module")
def prompts():
    shared = random_ids(300, seed=20, vocab=512).tolist()
    alone = [random_ids(n, seed=n + 1, vocab=512).tolist() for n in (3, 40, 127, 129, 200)]
    return [*alone, [*shared, 7], [*shared, 9, 8]]


def proposals(local, text):
    """The local engine's, at the anchor that ends the text."""
    speculator = Speculator(local, WIDTH)
    batch = speculator.batch([len(text) + WIDTH], 256)
    ids = torch.tensor(text)
    with torch.inference_mode():
        for part in ids[:-1].split(256):
            step = batch.step(torch.tensor([0]), torch.tensor([len(part)]))
            h, means = speculator._main(batch, step, part)
            speculator.drafts.follow(batch, step, h, means, part)
        _, found = speculator.drafts.block(batch, torch.tensor([0]), ids[-1:])
    return found.drafts[0].tolist()


def check(local, watch, some=1):
    """Of every so manieth proposal, but for one: FP8 linears round their inputs, and between two
    values that are as near the sums of another chunk may decide."""
    assert len(watch.found) > 3
    checked = watch.found[::some]
    others = [p for p in checked if p.drafts != proposals(local, p.text)]
    assert len(others) <= min(1, len(checked) // 4)


def test_what_is_proposed(llm, local, prompts, monkeypatch):
    """Prompts in chunks beside others that decode; then two that share a prefix with one before."""
    watch = Watch(llm, monkeypatch)
    expected = local.generate(prompts, NEW, ignore_eos=True)
    assert generate(llm, prompts[:6]) == expected[:6]
    check(local, watch, 7)
    before, watch.found = counted(llm)["hits"], []
    assert generate(llm, prompts[6:]) == expected[6:]
    assert counted(llm)["hits"] > before
    check(local, watch, 3)


@pytest.mark.parametrize(("wrong", "kept"), [(WIDTH, 5.0), (0, 0.0), (2, 2.0)])
def test_drafts_forced_right_and_wrong(llm, local, prompts, monkeypatch, wrong, kept):
    """And what the drafter proposes after them is what it would have been."""
    some = prompts[1:4]
    longer = local.generate(some, NEW + 2 * WIDTH, ignore_eos=True)
    watch = Watch(llm, monkeypatch)
    watch.truth = [p + e for p, e in zip(some, longer, strict=True)]
    watch.wrong, before = wrong, counted(llm)
    assert generate(llm, some) == [e[:NEW] for e in longer]
    steps = (counted(llm)["drafted"] - before["drafted"]) / WIDTH
    mean = (counted(llm)["accepted"] - before["accepted"]) / steps
    assert mean == pytest.approx(kept, abs=0.7)
    check(local, watch, 5)


def test_preemption(drafting, local, monkeypatch):
    """In a pool that does not hold all requests."""
    prompts = [random_ids(n, seed=n, vocab=512).tolist() for n in (40, 41, 42, 43)]
    with engine(drafting, "dspark", WIDTH, pool=30) as llm:
        watch = Watch(llm, monkeypatch)
        assert generate(llm, prompts, 100) == local.generate(prompts, 100, ignore_eos=True)
        assert counted(llm)["preemptions"] > 0
        check(local, watch, 40)


def test_the_longest_text(drafting, local):
    """At its end vLLM cuts the last blocks, whose rows then move."""
    prompt = random_ids(40, seed=40, vocab=512).tolist()
    expected = local.generate([prompt], 24, ignore_eos=True)
    with engine(drafting, "dspark", WIDTH, max_model_len=64) as llm:
        assert generate(llm, [prompt]) == expected


@pytest.mark.parametrize(
    ("method", "n", "fields", "sentence"),
    [
        ("dspark", 7, {}, "num_speculative_tokens is 7; this checkpoint's drafter proposes 5 tok"),
        ("mtp", 1, {}, "method is 'mtp'; this checkpoint's drafter is of the kind 'dspark'"),
        ("ngram", 1, {}, "method is 'ngram'; dsv4-plugin drafts with 'mtp' and 'dspark'"),
    ],
)
def test_refusals(drafting, method, n, fields, sentence):
    speculative = {"method": method, "num_speculative_tokens": n}
    with pytest.raises((ValueError, NotImplementedError), match=sentence):
        configure(drafting, speculative_config=speculative, hf_overrides=fields)


def test_an_mtp_layer_does_not_draft_blocks(tmp_path):
    """Though config.json has DSpark's fields: the tensors say which drafter there is."""
    fields = SMALL | KINDS | {"num_nextn_predict_layers": 1}
    make_checkpoint(tmp_path / "mtp", "tiny", 1, fields, tokenizer=False)
    speculative = {"method": "dspark", "num_speculative_tokens": 2}
    fields = dspark_fields(preset_fields("tiny") | SMALL | KINDS)
    with pytest.raises(ValueError, match="method is 'dspark'; this checkpoint's drafter is of the"):
        configure(tmp_path / "mtp", speculative_config=speculative, hf_overrides=fields)


def test_mtp(tmp_path, monkeypatch):
    """On this runner too: drafts as they come, and forced right and wrong."""
    fields = SMALL | KINDS | {"num_nextn_predict_layers": 1}
    make_checkpoint(tmp_path / "mtp", "tiny", 1, fields, tokenizer=False)
    local = load(tmp_path / "mtp", "float32", mtp=True)
    prompts = [random_ids(n, seed=n, vocab=512).tolist() for n in (3, 40, 129, 200)]
    longer = local.generate(prompts, NEW + 8, ignore_eos=True)
    expected = [e[:NEW] for e in longer]
    with engine(tmp_path / "mtp", "mtp", 3) as llm:
        assert generate(llm, prompts) == expected
        watch = Watch(llm, monkeypatch)
        watch.truth = [p + e for p, e in zip(prompts, longer, strict=True)]
        for wrong, kept in ((3, 3.0), (1, 1.0), (0, 0.0)):
            watch.wrong, before = wrong, counted(llm)
            assert generate(llm, prompts) == expected
            steps = (counted(llm)["drafted"] - before["drafted"]) / 3
            assert (counted(llm)["accepted"] - before["accepted"]) / steps == pytest.approx(
                kept, abs=0.5
            )
