"""The indexer on pages: queries, scores, and a choice that is exact to the last tie."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.cache.rows import RowFormat
from dsv4_plugin.kernels import index
from dsv4_plugin.kernels.index import kernel, reference, topk
from lab.kernels.cases import far, generator, key_codec, paged, pairs, step_of_rows
from lab.kit import mode
from lab.kit.mode import interpreted_first
from lab.kit.order import seeded
from tests.tolerances import FP16, OP_FP32

RATIO = 4


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed)).to(dtype).to(mode.DEVICE)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=mode.DEVICE)


def of(kind):
    return RowFormat[kind.upper()]


def stored(q, kind):
    """The order of dims in which `queries` writes."""
    parts = 2 if kind == "bfloat16" else 4
    return q.unflatten(-1, (-1, parts)).transpose(-1, -2).flatten(-2)


@pytest.mark.parametrize(
    ("n", "heads", "c", "rope", "kind"),
    [
        (3, 64, 128, 64, "fp8"),
        (1, 32, 32, 16, "fp4"),
        (2, 64, 128, 64, "bfloat16"),
        (2, 8, 128, 64, "fp4"),
    ],
)
def test_queries(gpu, n, heads, c, rope, kind):
    q = normal(n, heads, c, seed=1, dtype=torch.bfloat16)
    q = q * torch.logspace(-3, 3, heads, device=q.device)[:, None].to(q.dtype)
    q[0, 1] = 0
    weight, cis = normal(n, heads, seed=2), pairs(n, rope, 3)
    found, scaled = kernel.queries(q, weight, cis, of(kind))
    expected, weights = reference.queries(q, weight, cis, of(kind))
    assert torch.equal(scaled, weights)
    step = (found.float() - stored(expected, kind).float()).abs().max()
    assert step <= 2**-11  # one rounding of float16 between 1/2 and 1
    assert found.float().abs().amax(-1).max() <= 1


def world(positions, heads=64, c=128, kind="fp8", seed=0):
    """positions: of each request's rows. Queries as stored, as the reference's, and the rest."""
    flat = [(b, p) for b, some in enumerate(positions) for p in some]
    position, request = ints(*(p for _, p in flat)), ints(*(b for b, _ in flat))
    keys = paged(key_codec(kind, c), [(max(some) + 1) // RATIO for some in positions], 64, seed)
    weight = normal(len(flat), heads, seed=seed + 1).abs()
    q, weight = reference.queries(
        normal(len(flat), heads, c, seed=seed + 2, dtype=torch.bfloat16),
        weight, pairs(len(flat), 16, seed), of(kind),
    )  # fmt: skip
    n = max(1, *((p + 1) // RATIO for _, p in flat))
    rest = (weight, keys, position, request, RATIO, n)
    return stored(q, kind), q, rest


def gathered(positions, keys):
    """As for a step of prompts of these rows."""
    lengths = [max(some) + 1 for some in positions]
    return kernel.gathered(keys, ints(*lengths), RATIO, max(1, max(lengths) // RATIO))


SCORES = [
    # positions of each request's rows, heads, c, format, are keys gathered
    ([[1100], [3], [2]], 64, 128, "fp8", False),
    ([[700], [-1, -1]], 64, 128, "bfloat16", False),
    ([[300]], 32, 32, "fp8", False),
    ([[700], [20]], 64, 128, "fp4", False),
    ([[90]], 32, 32, "fp4", False),
    ([range(500, 507), range(252, 260), [-1]], 64, 128, "fp8", True),
    ([range(517, 520), [3]], 8, 128, "bfloat16", True),
    ([range(90, 94)], 32, 32, "fp4", True),
]


@pytest.mark.parametrize(("positions", "heads", "c", "kind", "flat"), SCORES)
def test_scores(gpu, positions, heads, c, kind, flat):
    q, plain, rest = world(positions, heads, c, kind)
    found = kernel.scores(q, *rest, gathered(positions, rest[1]) if flat else None)
    expected = reference.scores(plain, *rest)
    seen = ~expected.isnan()
    tolerance = FP16 if kind == "bfloat16" else OP_FP32
    found = found[:, : expected.shape[1]]
    assert (found - expected)[seen].abs().max() <= tolerance * expected[seen].abs().max()


@pytest.mark.parametrize("kind", ["fp8", interpreted_first("bfloat16"), interpreted_first("fp4")])
def test_the_same_scores_of_gathered_keys(gpu, kind):
    positions = [range(300, 305), range(40, 44)]
    q, _, rest = world(positions, kind=kind)
    seen = torch.arange(76, device=q.device) < (rest[2][:, None] + 1) // RATIO
    alone = kernel.scores(q, *rest)[seen]
    flat = kernel.scores(q, *rest, gathered(positions, rest[1]))[seen]
    if mode.INTERPRET:  # numpy sums in another order for other shapes
        torch.testing.assert_close(alone, flat, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(alone, flat)


def test_keys_that_would_take_too_much_are_not_gathered(gpu, monkeypatch):
    positions = [range(300, 305)]
    _, _, (_, keys, *_) = world(positions)
    monkeypatch.setattr(kernel, "FLAT_BYTES", 1 << 14)
    assert gathered(positions, keys) is None


def test_scores_of_pages_beyond_two_gigabytes_and_of_holes(gpu):
    q, _, (weight, keys, *rest) = world([[530]])
    expected = kernel.scores(q, weight, keys, *rest)[:, :132]
    assert torch.equal(kernel.scores(q, weight, far(keys), *rest)[:, :132], expected)
    keys.table[0, 1] = -1
    for flat in (None, gathered([[530]], keys)):
        found = kernel.scores(q, weight, keys, *rest, flat)[:, :132]
        assert not found[0, 64:128].any()
        torch.testing.assert_close(found[0, :64], expected[0, :64])


TIES = torch.tensor([0.0, -0.0, 1.0, 1.0, -1.0, 3.4e38, 1e-40, -1e-40])


def tied(n, seed):
    return TIES[torch.randint(0, len(TIES), (n,), generator=generator(seed))]


@pytest.mark.parametrize(
    ("lengths", "n", "k"),
    [([0, 1, 511, 512, 513, 2000], 2000, 512), ([1500, 1024], 1500, 1024), ([70, 200], 200, 64)],
)
def test_topk(gpu, lengths, n, k):
    """Random and tied scores, rows that see fewer entries than are chosen, NaN where none."""
    score = torch.stack(
        [normal(n, seed=i).cpu() if i % 2 else tied(n, i) for i in range(len(lengths))]
    )
    score[torch.arange(n) >= torch.tensor(lengths)[:, None]] = float("nan")
    position = ints(*(RATIO * x - 1 for x in lengths))
    score = score.to(mode.DEVICE)
    assert torch.equal(
        topk.topk(score, position, RATIO, k), reference.topk(score, position, RATIO, k)
    )


@pytest.mark.parametrize(("few", "n", "k"), [(True, 9000, 64), (False, 9001, 63)])
def test_topk_in_rounds(gpu, monkeypatch, few, n, k):
    """As for contexts of a million tokens: a row of many blocks, and a short one; ties within a
    block and across blocks."""
    monkeypatch.setattr(topk, "BLOCKS", (32, 64, 256))
    score = torch.stack([tied(n, 1), normal(n, seed=2).cpu(), torch.ones(n)])
    score[2, [100, 3000]] = 2.0
    score = score.to(mode.DEVICE)
    position = ints(4 * 8990 - 1, 4 * 40 - 1 if few else 4 * n - 1, 4 * 5000 - 1)
    expected = reference.topk(score, position, RATIO, k)
    for seed in range(2):
        with seeded(seed):
            assert torch.equal(topk.topk(score, position, RATIO, k), expected)


def test_topk_in_rounds_of_every_kind(gpu, monkeypatch):
    """Infinities, NaN, subnormals, numbers that differ in their last bits, more chosen than there
    are of any one kind."""
    n, k = 1500, 512
    kinds = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e-45, -1e-45, 0.0, -0.0])
    score = torch.stack(
        [
            kinds[torch.randint(0, 7, (n,), generator=generator(3))],
            1 + torch.randint(0, 300, (n,), generator=generator(4)) * 2.0**-23,
        ]
    ).to(mode.DEVICE)
    position = ints(4 * n - 1, 4 * n - 1)
    whole = topk.topk(score, position, RATIO, k)
    monkeypatch.setattr(topk, "BLOCKS", (256, 512, 1024))
    assert torch.equal(topk.topk(score, position, RATIO, k), whole)
    assert torch.equal(whole[1:], reference.topk(score[1:], position[1:], RATIO, k))


def test_topk_of_more_than_rounds_leave(gpu):
    with pytest.raises(ValueError, match="index_topk is 9000; of 20000 entries"):
        topk.topk(normal(1, 20000), ints(79999), RATIO, 9000)


def test_choices_in_turns(gpu, monkeypatch):
    """Scores of four rows at a time, and no rows at all; scores are summed over ranks."""
    mode.kernels(monkeypatch, "triton")
    _, _, (_, keys, position, request, _, n) = world([range(700, 705)])
    q = normal(5, 64, 128, seed=7, dtype=torch.bfloat16)
    weight, cis = normal(5, 64, seed=8), pairs(5, 64, 9)

    def choose(rows=slice(None), reduce=lambda score: score):
        step = step_of_rows(position[rows], request[rows], 705)
        return index.choose(q[rows], weight[rows], cis[rows], keys, step, RATIO, 64, reduce)

    expected = choose()
    score = kernel.scores(
        *kernel.queries(q, weight, cis, of("fp8")), keys, position, request, RATIO, n
    )
    assert torch.equal(expected, reference.topk(score[:, :n], position, RATIO, 64))
    monkeypatch.setattr(kernel, "SCORE_VALUES", 4 * n)
    assert torch.equal(choose(), expected)
    worst = reference.topk(-score[:, :n], position, RATIO, 64)
    assert torch.equal(choose(reduce=torch.neg), worst)
    assert choose(slice(0, 0)).shape == (0, 64)
