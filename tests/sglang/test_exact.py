"""Greedy generations through real servers equal transformers', whatever the scheduler does."""

from __future__ import annotations

import random
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsv4_plugin.tools.make import make_checkpoint

from .reference import Reference
from .server import FLOAT32, Output, Server

N = 40
PAGE = 128


def ids(n: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(100, 100_000) for _ in range(n)]


def prompts(longest: int, seed: int = 0) -> list[list[int]]:
    """16 prompts of 6 to `longest` tokens; half share prefixes that end at, before and after
    page boundaries."""
    shared = ids(longest, seed)
    alone = [ids(n, seed + n) for n in (5, 37, 126, 127, 128, 255, 300, longest // 3)]
    ends = [(127, 3), (127, 20), (200, 0), (300, 9), (255, 31), (128, 1)]
    ends += [(longest - 32, 30), (longest // 4 * 3, 7)]
    return [[0, *body] for body in alone + [shared[:k] + ids(e, seed + k + e) for k, e in ends]]


@pytest.fixture(scope="class")
def crowded(serve):
    """A pool of 24 pages and forced retractions, without the overlap scheduler."""
    options = ("--max-total-tokens=3072", "--max-running-requests=8", "--disable-overlap-schedule")
    forced = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "3"}
    with serve(*FLOAT32, *options, environ=forced) as server:
        yield server


class TestScheduling:
    @pytest.mark.parametrize("longest", [1000, pytest.param(3000, marks=pytest.mark.thorough)])
    def test_cold_warm_serial(self, roomy: Server, judge: Reference, longest: int):
        asked = prompts(longest)
        cold = roomy.generate_all(asked, N, at_once=16)
        judge.check(cold)
        warm = roomy.generate_all(asked[::-1], N, at_once=16)
        judge.check(warm)
        assert sum(output.cached for output in warm) > sum(output.cached for output in cold)
        serial = roomy.generate_all(asked, N, at_once=1)
        judge.check(serial)
        assert all(o.cached == (len(o.prompt) - 1) // PAGE * PAGE for o in serial)

    def test_more_requests_than_slots(self, roomy: Server, judge: Reference):
        judge.check(roomy.generate_all(prompts(500, 1) + prompts(400, 2), N, at_once=32))

    def test_mixed_batches(self, roomy: Server, judge: Reference):
        outputs = roomy.generate_all(prompts(1000, seed=3) * 2, N, at_once=12, logprobs=False)
        judge.check(outputs)
        assert "MIXED batch" in roomy.read_log()

    def test_multi_turn(self, roomy: Server, judge: Reference):
        """A second turn finds the first one's prompt and answer in the cache."""
        first = roomy.generate([0, *ids(200, 4)], 100)
        second = roomy.generate([*first.prompt, *first.ids, *ids(9, 5)], N)
        judge.check([first, second])
        assert second.cached == 256

    def test_parallel_sampling(self, roomy: Server, judge: Reference):
        sampling = {"temperature": 0, "max_new_tokens": N, "ignore_eos": True, "n": 4}
        prompt = [0, *ids(300, 6)]
        answers = roomy.post("/generate", {"input_ids": prompt, "sampling_params": sampling})
        alone = roomy.generate(prompt, N)
        judge.check([alone])
        assert [answer["output_ids"] for answer in answers] == [alone.ids] * 4

    def test_prompt_logprobs(self, roomy: Server, judge: Reference):
        """Logprobs of the prompt's own tokens, over chunks of it."""
        prompt = [0, *ids(400, 12)]
        body = {"input_ids": prompt, "return_logprob": True, "logprob_start_len": 0}
        answer = roomy.post("/generate", body | {"sampling_params": {"max_new_tokens": 1}})
        reported = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
        judge.check_logprobs(Output(prompt[:1], prompt[1:], reported, 0))

    def test_abort(self, roomy: Server, judge: Reference):
        """Requests that are aborted in prefill and in decode leave nothing behind."""
        body = {
            "input_ids": [0, *ids(2000, 7)],
            "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True},
        }
        with ThreadPoolExecutor(1) as pool:
            for wait in (0.05, 1.5):
                request = pool.submit(roomy.post, "/generate", body)
                time.sleep(wait)
                roomy.post("/abort_request", {"rid": "", "abort_all": True})
                assert request.result()["meta_info"]["finish_reason"]["type"] == "abort"
        judge.check(roomy.generate_all(prompts(300, seed=8), N, at_once=16))


@pytest.mark.thorough
class TestSmallPool:
    def test_retraction(self, crowded: Server, judge: Reference):
        judge.check(crowded.generate_all(prompts(900, seed=9), 60, at_once=16))
        retracted = sum(map(int, re.findall(r"#retracted_reqs: (\d+)", crowded.read_log())))
        assert retracted >= 50

    def test_eviction(self, crowded: Server, judge: Reference):
        first = [0, *ids(600, 10)]
        cold, warm = crowded.generate(first, N), crowded.generate(first, N)
        others = crowded.generate_all([[0, *ids(250, 30 + i)] for i in range(12)], N, at_once=4)
        evicted = crowded.generate(first, N)
        judge.check([cold, warm, *others, evicted])
        assert (warm.cached, evicted.cached) == (512, 0)


@pytest.mark.thorough
def test_published_dimensions(tmp_path: Path):
    """head_dim 512 with 64 rope dims and YaRN, 64 index heads choosing 512, 256 experts."""
    make_checkpoint(tmp_path / "bench", "bench", seed=0)
    shared = ids(2100, 40)
    asked = [[0, *ids(5, 41)], [0, *shared[:300]], [0, *shared[:700], 5], [0, *shared]]
    options = ("--max-total-tokens=8192", "--max-running-requests=4")
    with Server(tmp_path / "bench", *FLOAT32, *options, log=tmp_path / "log") as server:
        outputs = server.generate_all(asked, 16, at_once=4) + server.generate_all(asked[2:], 16, 1)
    assert [o.cached for o in outputs[4:]] == [640, 2048]
    Reference(tmp_path / "bench").check(outputs)


@pytest.mark.thorough
def test_broken_addressing_is_caught(serve, judge: Reference):
    """The control: with the pages' carry addressed by request, a cached prefix loses its state."""
    options = ("--max-total-tokens=4096", "--max-running-requests=4")
    with serve(*FLOAT32, *options, testing="break") as server:
        prompt, other = [0, *ids(700, 20)], [0, *ids(700, 21)]
        outputs = [server.generate(p, N) for p in (prompt, other, prompt)]
        assert outputs[2].cached == 640
        judge.check(outputs[:2])
        with pytest.raises(AssertionError, match=r"below the reference's|differs by"):
            judge.check(outputs[2:])
