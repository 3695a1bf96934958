"""MTP: the drafter against the authors' recording, and generation that no draft can change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dsv4_plugin import load
from dsv4_plugin.batch import Batch, Sampler
from dsv4_plugin.engine import LocalModel
from dsv4_plugin.speculate import Speculator
from dsv4_plugin.tools.make import make_checkpoint
from lab.paths import SHARED, needs_shared
from tests.conftest import SMALL, random_ids
from tests.tolerances import LOGITS_STD

GOLDEN = SHARED / "golden" / "fp32_noquant"
NEW = 12


@pytest.fixture(scope="module")
def drafting(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("mtp") / "checkpoint"
    overrides = SMALL | {"num_nextn_predict_layers": 1}
    make_checkpoint(directory, "tiny", seed=1, overrides=overrides, tokenizer=False)
    return directory


@pytest.fixture(scope="module")
def model(drafting) -> LocalModel:
    return load(drafting, "float32", mtp=True)


class Oracle(Speculator):
    """Drafts the true continuation, or what is surely not it."""

    def __init__(self, model: LocalModel, n: int, truth: list[list[int]], wrong: bool) -> None:
        super().__init__(model, n)
        self.truth, self.wrong = truth, wrong

    def draft(self, batch: Batch, running: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        _, count = super().draft(batch, running, last)
        rows = []
        for b, length in zip(running.tolist(), batch.lengths[running].tolist(), strict=True):
            after = (self.truth[b][length + 1 :] + [0] * self.n)[: self.n]
            rows.append([(t + self.wrong) % batch.model.config.vocab_size for t in after])
        return torch.tensor(rows), count


def greedy(speculator: Speculator, prompts: list[list[int]], new: int = NEW) -> list[list[int]]:
    with torch.inference_mode():
        return speculator.generate(prompts, new, Sampler(0.0, None), 256, ignore_eos=True)


@needs_shared
def test_the_recorded_draft():
    golden = load_file(GOLDEN / "golden.safetensors")
    ids, n = golden["input_ids"].view(-1).long(), 300
    model = load(GOLDEN, "float32", mtp=True)
    network, drafter = model.model, model.drafter
    with torch.inference_mode():
        batch = Batch(network, model.layout, [n], n, poison=True, draft_layers=1)
        step = batch.step(torch.tensor([0]), torch.tensor([n]))
        h = network.run(network.spread(ids[:n]), ids[:n], step, batch.caches[:-1])
        following = ids[1 : n + 1]
        h = drafter(h, network.embed(following), following, step, batch.caches[-1])
        found = network.head(drafter.collapse(h[-1:]))
    expected = golden["mtp_prefill_last_logits"]
    assert (found - expected).abs().max() / expected.std() < LOGITS_STD


@pytest.mark.thorough
def test_two_hundred_prompts(model):
    """Of 1 to 300 tokens, 50 at a time; lengths cross every kind of window and page."""
    prompts = [random_ids(1 + 37 * i % 300, seed=i).tolist() for i in range(200)]
    accepted = drafted = 0
    for start in range(0, 200, 50):
        part = prompts[start : start + 50]
        speculator = Speculator(model, 1 + start // 50 % 3)
        expected = model.generate(part, 8, ignore_eos=True)
        assert greedy(speculator, part, 8) == expected
        accepted, drafted = accepted + speculator.accepted, drafted + speculator.drafted
    assert 0 < accepted < drafted
    print(f"accepted {accepted} of {drafted}")


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("wrong", [False, True])
def test_drafts_that_are_always_right_or_wrong(model, n, wrong):
    """Around a page: every phase of both windows is rolled back to, or run through."""
    prompts = [random_ids(length, seed=length).tolist() for length in (3, 126, 250, 383, 509)]
    expected = model.generate(prompts, 40, ignore_eos=True)
    truth = [p + e for p, e in zip(prompts, expected, strict=True)]
    speculator = Oracle(model, n, truth, wrong)
    assert greedy(speculator, prompts, 40) == expected
    assert speculator.drafted
    if wrong:
        assert speculator.accepted == 0
    else:
        ends = 5 * n  # past the end of the truth, nothing is right
        assert speculator.accepted >= speculator.drafted - ends


def test_rollback_of_one_row_is_caught(model):
    """The control: with a single ring row, rejected drafts stay in the pooling sums."""
    prompt = random_ids(250, seed=250).tolist()
    expected = model.generate([prompt], 40, ignore_eos=True)
    speculator = Oracle(model, 3, [prompt + expected[0]], wrong=True)
    speculator.layout = model.layout
    assert greedy(speculator, [prompt], 40) != expected


def test_eos_ends_a_request_inside_accepted_drafts(model):
    prompts = [random_ids(n, seed=n).tolist() for n in (9, 40)]
    free = model.generate(prompts, NEW, ignore_eos=True)
    config = model.config
    object.__setattr__(config, "eos_token_id", free[0][7])
    try:
        expected = model.generate(prompts, NEW)
        truth = [p + f for p, f in zip(prompts, free, strict=True)]
        with torch.inference_mode():
            found = Oracle(model, 3, truth, wrong=False).generate(
                prompts, NEW, Sampler(0.0, None), 256, ignore_eos=False
            )
    finally:
        object.__setattr__(config, "eos_token_id", 1)
    assert found == expected
    assert len(found[0]) <= 8


def test_generate_with_drafts(model):
    prompts = [random_ids(50, seed=1).tolist()]
    assert model.generate(prompts, 9, num_speculative_tokens=2) == model.generate(prompts, 9)
    assert len(model.generate(prompts, 9, 0.8, seed=1, num_speculative_tokens=2)[0]) <= 9


@pytest.mark.parametrize("drafts", [0, 2])
def test_no_tokens_asked_for(model, drafts):
    prompts = [random_ids(5, seed=1).tolist()] * 2
    assert model.generate(prompts, 0, num_speculative_tokens=drafts) == [[], []]


def test_refusals(small, drafting):
    with pytest.raises(ValueError, match="num_nextn_predict_layers is 0; MTP needs a checkpoint"):
        load(small, mtp=True)
    with pytest.raises(ValueError, match="load the model with mtp=True"):
        load(drafting).generate([[1]], 1, num_speculative_tokens=1)
    with pytest.raises(ValueError, match="drafts with MTP, which does not say how sure it is"):
        load(drafting, mtp=True).generate([[1]], 1, num_speculative_tokens=1, confidence=0.5)
