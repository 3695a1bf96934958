"""What drafting on a CPU takes from the plugin, against the kernels that SGLang has for it: its
Triton ones, emulated."""

from __future__ import annotations

import inspect
import pkgutil
from types import SimpleNamespace

import pytest
import torch
from sglang.kernels.ops.speculative import cache_locs, eagle, spec_tree
from sglang.srt.mem_cache import allocation
from sglang.srt.speculative.eagle_utils import eagle_sample

from lab.kit.gpu import EmulatedGPU
from sglang_ext import chains

REQUESTS, DRAFTS, TOKENS = 3, 3, 40


@pytest.fixture(autouse=True)
def emulated():
    with EmulatedGPU("sm80"):
        yield


@pytest.fixture
def pool():
    """Slots of 5 request rows, which requests have which, and their lengths."""
    slots = torch.randperm(5 * TOKENS).view(5, TOKENS).int()
    return slots, torch.tensor([4, 0, 2]), torch.tensor([7, 1, 20])


@pytest.mark.parametrize("target", chains.REPLACED)
def test_signatures_are_as_expected(target: str):
    """Arguments are taken by name or place, as SGLang's callers do."""
    asked = inspect.signature(pkgutil.resolve_name(target)).parameters
    ours = inspect.signature(chains.REPLACED[target]).parameters
    named = [name for name, p in ours.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    placed = [name for name in named if ours[name].kind != ours[name].KEYWORD_ONLY]
    assert placed == list(asked)[: len(placed)]
    assert set(named) <= set(asked)


def test_sampling_has_what_is_read():
    assert list(inspect.signature(eagle_sample).parameters)[:3] == [
        "verify_input", "batch", "logits_output",
    ]  # fmt: skip


def test_slots(pool):
    slots, request, lengths = pool
    expected, found = torch.empty(2, REQUESTS * DRAFTS, dtype=torch.int64)
    cache_locs.assign_draft_cache_locs_contiguous_func(request, slots, lengths, expected, 1, DRAFTS)
    chains.draft_slots(request, slots, lengths, found, 1, DRAFTS)
    assert found.tolist() == expected.tolist()
    assert chains.verified_slots(request, slots, lengths, REQUESTS, DRAFTS, "cpu").equal(expected)


def test_new_slots(pool):
    slots, request, start = pool
    end, new = start + torch.tensor([0, 5, 2]), torch.arange(7) + 1000
    expected, found = slots.clone(), slots.clone()
    allocation.assign_req_to_token_pool_func(request, expected, start, end, new, REQUESTS)
    chains.reserve_slots(request, found, start, end, new, REQUESTS)
    assert (found != slots).sum() == 7
    assert found.equal(expected)


def test_last_slots(pool):
    slots, request, lengths = pool
    last = chains.REPLACED["sglang.srt.mem_cache.allocation.get_last_loc"]
    expected = allocation.get_last_loc_triton(slots, request, lengths)
    assert last(slots, request, lengths).equal(expected)


def tree() -> dict[str, torch.Tensor]:
    return {
        name: torch.full((REQUESTS, DRAFTS + 1), -1)
        for name in ("retrieve_index", "retrieve_next_token", "retrieve_next_sibling")
    }


def test_chains_and_what_is_kept(pool):
    lengths = pool[2]
    parents = torch.arange(-1, DRAFTS - 1).repeat(REQUESTS, 1)
    scores = torch.arange(DRAFTS).repeat(REQUESTS, 1)
    found, expected = tree(), tree()
    positions = [torch.zeros(REQUESTS * (DRAFTS + 1), dtype=torch.int64) for _ in range(2)]
    mask = torch.ones(REQUESTS * (DRAFTS + 1) ** 2, dtype=torch.bool)
    sizes = 1, DRAFTS, DRAFTS + 1, spec_tree.TreeMaskMode.QLEN_ONLY
    spec_tree.sgl_build_tree_kernel_triton(
        parents, scores, lengths, mask, positions[0], *expected.values(), *sizes
    )
    chains.build_chain(parents, scores, lengths, mask, positions[1], *found.values(), *sizes)
    assert positions[1].equal(positions[0])
    for name in expected:
        assert found[name].equal(expected[name]), name

    said = torch.randint(0, 9, (REQUESTS, DRAFTS + 1))
    drafted = torch.cat([torch.zeros(REQUESTS, 1, dtype=torch.int64), said[:, :-1]], 1)
    drafted[1, 1] += 1  # wrong at once
    drafted[2, 2] += 1  # wrong in the middle, then right
    verified = {"candidates": drafted, "target_predict": said, **expected}
    kernel, ours = [
        (
            torch.zeros(said.numel(), dtype=torch.int32),
            torch.full((REQUESTS, DRAFTS + 1), -1, dtype=torch.int32),
            torch.zeros(REQUESTS, dtype=torch.int32),
        )
        for _ in range(2)
    ]
    spec_tree.verify_tree_greedy_triton(*kernel, **verified)
    batch = SimpleNamespace(sampling_info=SimpleNamespace(is_all_greedy=True))
    token = chains._verified.set((batch, torch.empty(0)))
    given = dict(zip(("predicts", "accept_index", "accept_token_num"), ours, strict=True))
    chains.verify_chain(**given, **verified, topk=1)
    chains._verified.reset(token)
    assert ours[1].equal(kernel[1])
    assert ours[2].tolist() == kernel[2].tolist() == [3, 0, 1]
    kept = kernel[1][kernel[1] >= 0].long()
    assert ours[0][kept].equal(kernel[0][kept])

    last = [torch.zeros(REQUESTS, dtype=torch.int32) for _ in range(2)]
    tokens = kernel[0][kernel[1].long()]
    eagle.fill_bonus_tokens_func(tokens, kernel[2] + 1, last[0], DRAFTS + 1, REQUESTS)
    chains.last_tokens(tokens, kernel[2] + 1, last[1], DRAFTS + 1, REQUESTS)
    assert last[1].equal(last[0])


def test_samples_are_of_each_row_s_distribution():
    """Of 3 requests with settings of their own, and a greedy one, which SGLang calls top_k 1."""
    torch.manual_seed(0)
    info = SimpleNamespace(
        temperatures=torch.tensor([[1.0], [0.5], [2.0], [1.0]]),
        top_ks=torch.tensor([9, 2, 9, 1]),
        top_ps=torch.tensor([1.0, 1.0, 0.6, 1.0]),
        min_ps=torch.zeros(4), need_min_p_sampling=False, sampling_seed=None,
    )  # fmt: skip
    logits, lengths, draws = torch.randn(8, 6), torch.tensor([5, 6, 7, 8]), 4000
    p = (logits / info.temperatures.repeat_interleave(2, 0)).softmax(-1)
    first = p.argsort(descending=True)
    for row in (2, 3):
        p[row, first[row, 2:]] = 0
    for row in (4, 5):
        before = p[row, first[row]].cumsum(0) - p[row, first[row]]
        p[row, first[row, before > 0.6]] = 0
    for row in (6, 7):
        p[row, first[row, 1:]] = 0
    p /= p.sum(-1, keepdim=True)
    counts = torch.zeros(8, 6)
    for _ in range(draws):
        counts[torch.arange(8), chains.samples(info, lengths, logits).long()] += 1
    assert (counts[p == 0] == 0).all()
    deviation = (counts / draws - p).abs() / (p * (1 - p) / draws).sqrt().clamp(min=1e-9)
    assert deviation[(p > 0) & (p < 1)].max() < 4.5
