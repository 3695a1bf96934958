"""MTP through the real engine: drafts as they come, always right and always wrong, in company,
with chunks, prefix hits and preemption, against transformers."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.tools.make import make_checkpoint
from tests.conftest import SMALL
from tests.vllm.engine import (
    NEW,
    check,
    counters,
    engine,
    generate,
    rebind,
    sixteen_prompts,
)
from tests.vllm.test_options import configure

DRAFTS = 3
POOL = 100


@pytest.fixture(scope="module")
def drafting(tmp_path_factory):
    """The weights of `small`, and an MTP layer."""
    directory = tmp_path_factory.mktemp("mtp") / "checkpoint"
    overrides = SMALL | {"num_nextn_predict_layers": 1}
    make_checkpoint(directory, "tiny", seed=1, overrides=overrides, tokenizer=False)
    return directory


@pytest.fixture(scope="module")
def llm(drafting):
    drafts = {"method": "mtp", "num_speculative_tokens": DRAFTS}
    with engine(drafting, POOL, speculative_config=drafts) as running:
        yield running


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return sixteen_prompts()


def drafted(llm) -> tuple[float, float]:
    """Drafts proposed and accepted so far."""
    found = {m.name.removeprefix("vllm:spec_decode_"): m for m in llm.get_metrics()}
    return found["num_draft_tokens"].value, found["num_accepted_tokens"].value


def runner(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@pytest.fixture
def oracle(llm, monkeypatch):
    """oracle(texts, wrong): the drafter proposes each text's true continuation, or never does."""
    run, propose = runner(llm), runner(llm).drafter.propose

    def set_up(texts: list[list[int]], wrong: bool) -> None:
        def drafts(*args, **kwargs):
            found = propose(*args, **kwargs)
            lengths = kwargs["common_attn_metadata"].seq_lens.tolist()
            rejected = kwargs["num_rejected_tokens_gpu"]
            late = rejected.tolist() if rejected is not None else [0] * len(lengths)
            if found.shape[1] > 1 and rejected is not None:
                late = [0] * len(lengths)  # vLLM has taken them off already
            steps = found.shape[1] - 1  # and gone ahead by the further drafts
            rows = []
            for i in range(len(found)):
                n = lengths[i] - late[i] - steps
                known = run.requests[run.input_batch.req_ids[i]].prompt_token_ids
                text = next(t for t in texts if t[: len(known)] == list(known))
                after = (text[n + 1 :] + [0] * DRAFTS)[: found.shape[1]]
                rows.append([(t + wrong) % 512 for t in after])
            return torch.tensor(rows, dtype=found.dtype)

        monkeypatch.setattr(run.drafter, "propose", drafts)

    return set_up


def test_sixteen_at_once_in_a_small_pool(llm, small, reference, prompts):
    before = counters(llm)
    outputs = generate(llm, prompts)
    assert counters(llm)["num_preemptions"] > before["num_preemptions"]
    assert drafted(llm)[0] > 1000
    for prompt, output in zip(prompts, outputs, strict=True):
        check(reference, small, prompt, output)


def test_prefix_hits(llm, small, reference, prompts):
    """vLLM computes the last page of a hit again for the drafter."""
    generate(llm, prompts[12:13])
    before = counters(llm)
    output = generate(llm, prompts[13:14])[0]
    assert counters(llm)["prefix_cache_hits"] > before["prefix_cache_hits"]
    check(reference, small, prompts[13], output)


def test_caches_are_bound_again(llm, small, reference, prompts):
    """The drafter's too: from its new memory come the drafts that came before."""
    counts = []
    for _ in range(2):
        untouched = rebind(llm)
        before = drafted(llm)
        for prompt, output in zip(prompts[3:6], generate(llm, prompts[3:6]), strict=True):
            check(reference, small, prompt, output)
        assert untouched()
        counts.append([a - b for a, b in zip(drafted(llm), before, strict=True)])
    assert counts[0] == counts[1]


@pytest.mark.parametrize("wrong", [False, True])
def test_drafts_that_are_always_right_or_wrong(llm, small, reference, prompts, oracle, wrong):
    asked = [p for p in prompts if len(p) < 500][:8]
    answers = [list(output.outputs[0].token_ids) for output in generate(llm, asked)]
    truth = [prompt + answer for prompt, answer in zip(asked, answers, strict=True)]
    oracle(truth, wrong)
    before = drafted(llm)
    outputs = generate(llm, asked)
    proposed, accepted = (a - b for a, b in zip(drafted(llm), before, strict=True))
    for prompt, output in zip(asked, outputs, strict=True):
        check(reference, small, prompt, output)
    assert proposed > 8 * NEW / (DRAFTS + 1) / 2
    assert accepted / proposed < 0.02 if wrong else accepted / proposed > 0.8


@pytest.mark.parametrize(
    ("change", "method", "sentence"),
    [
        ({"num_nextn_predict_layers": 0}, "mtp", "MTP needs a checkpoint that has 1"),
        ({}, "ngram", "--speculative-config.method is 'ngram'; dsv4-plugin drafts with 'mtp' and"),
    ],
)
def test_refusals(drafting, change, method, sentence):
    speculative = {"method": method, "num_speculative_tokens": 1}
    with pytest.raises((ValueError, NotImplementedError), match=sentence):
        configure(drafting, speculative_config=speculative, hf_overrides=change)


@pytest.mark.parametrize("method", ["mtp", "dspark"])
def test_a_block_drafter_is_refused(method, tmp_path):
    """vLLM has one on GPUs only; the sentence names who has it here."""
    make_checkpoint(tmp_path / "0731", "tiny", 1, SMALL, tokenizer=False, fmt="0731")
    speculative = {"method": method, "num_speculative_tokens": 5}
    sentence = "--speculative-config is given; this checkpoint drafts with DSpark, which vLLM has"
    with pytest.raises((ValueError, NotImplementedError), match=sentence):
        configure(tmp_path / "0731", speculative_config=speculative)


def test_stages_and_drafts_are_refused_together(drafting):
    speculative = {"method": "mtp", "num_speculative_tokens": 1}
    with pytest.raises(NotImplementedError, match="--pipeline-parallel-size is 2 and --specul"):
        configure(drafting, speculative_config=speculative, pipeline_parallel_size=2)
