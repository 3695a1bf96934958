"""Drafts of the MTP layer, through SGLang's EAGLE worker: answers are those without, bit for bit,
whatever is drafted; and how many drafts are kept is what it should be."""

from __future__ import annotations

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsv4_plugin.tools.make import make_checkpoint
from tests.tolerances import LOGPROB

from .server import FLOAT32, Output, Server
from .test_exact import PAGE, ids, prompts

STEPS = 3
N = 24
POOL = ("--max-total-tokens=16384", "--max-running-requests=16")


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny with an MTP layer: its other weights are those of tiny."""
    directory = tmp_path_factory.mktemp("drafting") / "checkpoint"
    make_checkpoint(directory, "tiny", seed=0, overrides={"num_nextn_predict_layers": 1})
    return directory


class Forced:
    """A server whose drafts are forced, and what it answers without any."""

    def __init__(self, server: Server, plain: Server, file: Path) -> None:
        self.server, self.plain, self.file = server, plain, file

    def compare(self, asked: list[list[int]], n: int, wrong: list[int], at_once: int):
        """Both answers to every prompt, whose chains have their wrong-th draft wrong (-1: none).
        Returns how many tokens SGLang found cached, and its counts of drafts, by request."""
        expected = self.plain.generate_all(asked, n, at_once)
        texts = [o.prompt + o.ids for o in expected]
        self.file.write_text(json.dumps(list(zip(texts, wrong, strict=True))))
        with ThreadPoolExecutor(at_once) as pool:
            found = list(pool.map(lambda prompt: self.answer(prompt, n), asked))
        for output, (drafted, _) in zip(expected, found, strict=True):
            assert drafted.ids == output.ids
            assert drafted.logprobs == pytest.approx(output.logprobs, abs=LOGPROB)
        return [(output.cached, meta) for output, meta in found]

    def answer(self, prompt: list[int], n: int):
        sampling = {"temperature": 0, "max_new_tokens": n, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True}
        answer = self.server.post("/generate", body)
        meta = answer["meta_info"]
        logprobs = [entry[0] for entry in meta["output_token_logprobs"]]
        return Output(prompt, answer["output_ids"], logprobs, meta["cached_tokens"]), meta


@pytest.fixture(scope="module")
def start(drafting: Path, tmp_path_factory: pytest.TempPathFactory, roomy: Server):
    """start(*options, **environ): with a pool poisoned with NaN; prompts are read in chunks of 256,
    and drafts are forced."""

    @contextmanager
    def running(*options: str, **environ: str):
        directory = tmp_path_factory.mktemp("forced")
        file = directory / "drafts"
        file.write_text("[]")
        options += ("--speculative-algorithm=NEXTN", f"--speculative-num-steps={STEPS}")
        with Server(
            drafting, *FLOAT32, *POOL, *options, log=directory / "log",
            testing="poison,drafts", environ={"DSV4_DRAFTS": str(file), **environ},
        ) as server:  # fmt: skip
            yield Forced(server, roomy, file)

    return running


@pytest.fixture(scope="module")
def forced(start):
    with start() as running:
        yield running


@pytest.mark.parametrize(("wrong", "kept"), [(-1, 3), (0, 0), (1, 1), (2, 2)])
def test_kept_drafts(forced: Forced, wrong: int, kept: int):
    """Every chain's drafts up to the wrong one are kept: SGLang's own count says so."""
    length = 1 + N * (kept + 1)  # the first token is the prompt's
    ((_, meta),) = forced.compare([[0, *ids(200, 70 + wrong)]], length, [wrong], 1)
    assert meta["spec_verify_ct"] == N
    assert meta["spec_num_correct_drafts"] == kept * N
    assert meta["spec_accept_length"] == pytest.approx(length / N)


def test_company(forced: Forced):
    """16 requests at once of all kinds, over chunks, cold and again with prefix hits."""
    asked = prompts(600)
    wrong = [i % (STEPS + 1) - 1 for i in range(len(asked))]
    cold = forced.compare(asked, N, wrong, 16)
    warm = forced.compare(asked[::-1], N, wrong[::-1], 16)
    assert sum(c for c, _ in warm) > sum(c for c, _ in cold)
    assert all(cached % PAGE == 0 for cached, _ in cold + warm)


def test_multi_turn(forced: Forced):
    """A second turn starts from pages whose last rows were written with drafts, kept and not."""
    for wrong in (-1, 1):
        first = [0, *ids(200, 80 + wrong)]
        forced.compare([first], 100, [wrong], 1)
        said = forced.plain.generate(first, 100).ids
        ((cached, _),) = forced.compare([[*first, *said, *ids(9, 81)]], N, [wrong], 1)
        assert cached == 256


def test_abort(forced: Forced):
    body = {
        "input_ids": [0, *ids(1500, 82)],
        "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True},
    }
    with ThreadPoolExecutor(1) as pool:
        for wait in (0.05, 1.5):
            request = pool.submit(forced.server.post, "/generate", body)
            time.sleep(wait)
            forced.server.post("/abort_request", {"rid": "", "abort_all": True})
            assert request.result()["meta_info"]["finish_reason"]["type"] == "abort"
    forced.compare(prompts(300, seed=83)[::4], N, [-1, 0, 1, 2], 4)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0, "ignore_eos": True},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "ignore_eos": True},
        {"temperature": 0, "frequency_penalty": 1.0, "logit_bias": {"77": 3.0}},
        {"temperature": 0, "regex": "(abc|de)+x"},
    ],
)
def test_other_ways_to_pick(forced: Forced, sampling: dict):
    """Sampled tokens are n of the vocabulary; greedy ones those of no drafts. (None is kept: with
    drafts in between, SGLang's penalties stand still.)"""
    body = {"input_ids": [0, *ids(50, 84)], "sampling_params": {"max_new_tokens": N, **sampling}}
    found, plain = (s.post("/generate", body) for s in (forced.server, forced.plain))
    if sampling["temperature"]:
        assert len(found["output_ids"]) == N
        assert found["output_ids"] != plain["output_ids"]  # 24 of 129,280
    else:
        assert found["output_ids"] == plain["output_ids"]
    assert found["meta_info"]["finish_reason"]["type"] in ("length", "stop")


@pytest.mark.thorough
def test_two_ranks(start):
    with start("--tp-size=2", SGLANG_CPU_OMP_THREADS_BIND="0|1") as forced:
        forced.compare(prompts(600, seed=85), N, [i % 5 - 1 for i in range(16)], 8)
        body = {"input_ids": [0, 5, 6], "sampling_params": {"temperature": 1, "max_new_tokens": N}}
        assert len(forced.server.post("/generate", body)["output_ids"]) == N


@pytest.mark.thorough
def test_retraction(start):
    """A pool of 24 pages: requests are thrown out, and come back."""
    forced_out = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "3"}
    options = "--max-total-tokens=3072", "--max-running-requests=8"
    with start(*options, **forced_out) as forced:
        forced.compare(prompts(900, seed=86), 60, [i % 5 - 1 for i in range(16)], 16)
        log = forced.server.read_log()
    assert sum(map(int, re.findall(r"#retracted_reqs: (\d+)", log))) >= 10
