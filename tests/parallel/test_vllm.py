"""vLLM over several CPU ranks: real servers, each compared with the core's engine on one."""

from __future__ import annotations

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from dsv4_plugin.batch import Batch, Sampler
from dsv4_plugin.engine import LocalModel, load
from dsv4_plugin.speculate import Speculator
from dsv4_plugin.tools.conversations import SKILLS, held_out
from tests.tolerances import LOGPROB, TIE
from tests.vllm_chat.server import Server
from training.data import Renderer

N = 24
FLAGS = (
    "--dtype float32 --max-model-len 2048 --max-num-batched-tokens 512 --max-num-seqs 16 "
    "--kv-cache-memory-bytes 200000000 --enforce-eager --enable-prompt-tokens-details"
)

pytestmark = pytest.mark.thorough
TP_EP = "--tensor-parallel-size 2 --enable-expert-parallel"


def serve(checkpoint: Path, log: Path, options: str) -> Server:
    """vLLM binds a rank to a set of cores: here all ranks share all of them."""
    environ = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    return Server(checkpoint, log, f"{FLAGS} {options}", environ)


def ids(n: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(100, 100_000) for _ in range(n)]


def prompts() -> list[list[int]]:
    """16 prompts of 6 to 700 tokens; some share a prefix that ends at, before or after a page."""
    shared = ids(520, 20)
    alone = [ids(n, n) for n in (6, 40, 127, 128, 129, 255, 256, 257, 700)]
    return alone + [shared[:n] + ids(7 + n % 13, n) for n in (300, 301, 512, 513, 520, 256, 40)]


def complete(server: Server, prompt: list[int]) -> tuple[list[int], list[float], int]:
    """Greedy ids, their logprobs, and how many prompt tokens came from the cache."""
    sampling = {"temperature": 0, "max_tokens": N, "ignore_eos": True, "logprobs": 1}
    answer = server.post(
        "/v1/completions", {"prompt": prompt, "return_token_ids": True, **sampling}
    )
    choice = answer["choices"][0]
    details = answer["usage"]["prompt_tokens_details"] or {}
    cached = details.get("cached_tokens") or 0
    return choice["token_ids"], choice["logprobs"]["token_logprobs"], cached


def complete_all(
    server: Server, asked: list[list[int]]
) -> list[tuple[list[int], list[float], int]]:
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda prompt: complete(server, prompt), asked))


@torch.inference_mode()
def check(model: LocalModel, prompt: list[int], answer: list[int], *logprobs: list[float]) -> None:
    """Every pick is the one process's best (ties aside), every log-probability its own; several
    where the same was answered several times."""
    every = torch.tensor(prompt + answer[:-1])
    batch = Batch(model.model, model.layout, [len(every)], 256)
    hidden = torch.cat([batch.run([(0, part)]) for part in every.split(256)])
    expected = model.model.head(hidden[len(prompt) - 1 :]).log_softmax(-1)
    picked = expected.gather(1, torch.tensor(answer)[:, None])[:, 0]
    assert (expected.amax(-1) - picked).max() < TIE
    assert (torch.tensor(logprobs) - picked).abs().max() < LOGPROB


@pytest.fixture(scope="session")
def whole(tiny: Path) -> LocalModel:
    return load(tiny, "float32")


LAYOUTS = (
    TP_EP,
    "--pipeline-parallel-size 2",
    "--data-parallel-size 2 --enable-expert-parallel --api-server-count 1",
    "--tensor-parallel-size 2",
    "--tensor-parallel-size 4",
    "--data-parallel-size 2",
    "--pipeline-parallel-size 2 --tensor-parallel-size 2",
    "--data-parallel-size 2 --tensor-parallel-size 2 --enable-expert-parallel",
)


@pytest.mark.parametrize("options", LAYOUTS)
def test_sixteen_requests_with_prefix_hits(tiny, whole, tmp_path, options):
    asked = prompts()
    with serve(tiny, tmp_path / "server.log", options) as server:
        cold = complete_all(server, asked)
        warm = complete_all(server, asked)
    for prompt, (answer, first, _), (again, second, _) in zip(asked, cold, warm, strict=True):
        if again == answer:
            check(whole, prompt, answer, first, second)
        else:  # a tie
            check(whole, prompt, answer, first)
            check(whole, prompt, again, second)
    assert sum(cached for _, _, cached in warm) > 1000


def test_drafts_over_two_ranks(mini, tmp_path):
    """dsv4-mini's MTP layer, whose drafts hold: as many as in one process, and the answers are
    those without."""
    renderer = Renderer()
    asked = [renderer.prompt(c) for s in SKILLS if s != "memory" for c in held_out(s, 2)]
    local = Speculator(load(mini, "float32", mtp=True), 2)
    with torch.inference_mode():
        expected = local.generate(asked, N, Sampler(0.0, None), 256, ignore_eos=True)
    drafts = '{"method":"mtp","num_speculative_tokens":2}'
    options = f"--tensor-parallel-size 2 --speculative-config={drafts}"
    with serve(mini, tmp_path / "server.log", options) as server:
        found = complete_all(server, asked)
        names = ("accepted_tokens", "draft_tokens")
        kept, drafted = (server.metric(f"vllm:spec_decode_num_{name}_total") for name in names)
    assert [answer for answer, _, _ in found] == expected
    assert local.accepted > 0.7 * local.drafted
    assert kept / drafted == pytest.approx(local.accepted / local.drafted, abs=0.05)


def test_a_killed_rank_ends_the_server(tiny, whole, tmp_path):
    """With a clear message and nothing left behind; a restart serves again."""
    prompt = ids(300, 1)
    with serve(tiny, tmp_path / "killed.log", TP_EP) as server:
        complete(server, prompt)
        for rank in (0, 1):
            assert f"Rank {rank} of 2: layers 0-4; " in server.read_log()
        family = psutil.Process(server.process.pid).children(recursive=True)
        ranks = [p for p in family if "Worker" in " ".join(p.cmdline())]
        assert len(ranks) == 2
        os.kill(ranks[1].pid, signal.SIGKILL)
        server.process.wait(60)
        limit = time.monotonic() + 30
        while (left := [p for p in family if p.is_running()]) and time.monotonic() < limit:
            time.sleep(0.5)
        assert not left
        assert "died unexpectedly" in server.read_log()
    with serve(tiny, tmp_path / "restarted.log", TP_EP) as server:
        answer, logprobs, _ = complete(server, prompt)
    check(whole, prompt, answer, logprobs)
