"""Attention over pages against its reference, and its bits against itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsv4_plugin.cache.rows import Float32Rows, RowPool
from dsv4_plugin.cache.step import TILED
from dsv4_plugin.kernels.attention import kernel
from dsv4_plugin.kernels.attention.kernel import attention
from dsv4_plugin.kernels.attention.reference import attention as reference
from lab.kernels.cases import far, generator, kv_codec, paged, pairs, step_of_rows
from lab.kit import mode
from lab.kit.mode import interpreted_first
from lab.kit.order import seeded
from tests.tolerances import ATTENTION_BF16

SPAN = 128


def world(positions, heads, kind, ratio=0, k=None, d=512, rope=64, seed=0, span=SPAN):
    """positions: for each request, those of its rows; None is a row of padding."""
    g = generator(seed)
    flat = [(b, p) for b, some in enumerate(positions) for p in some]
    position = torch.tensor([-1 if p is None else p for _, p in flat], dtype=torch.int32)
    request = torch.tensor([b if p is not None else 0 for b, p in flat], dtype=torch.int32)
    lengths = [max([p for p in some if p is not None], default=-1) + 1 for some in positions]
    codec = kv_codec(kind, d, rope)
    arguments = {
        "q": torch.randn(len(flat), heads, d, generator=g).bfloat16(),
        "sink": torch.randn(heads, generator=g),
        "cis": pairs(len(flat), rope, seed),
        "step": step_of_rows(position.to(mode.DEVICE), request.to(mode.DEVICE), max(lengths)),
        "window": paged(codec, lengths, 32, seed + 1),
        "sliding_window": span,
        "ratio": ratio,
    }
    if ratio:
        counts = [n // ratio for n in lengths]
        arguments["entries"] = paged(codec, counts, 2 if ratio == 128 else 64, seed + 2)
    if k is not None:
        chosen = torch.full((len(flat), k), -1, dtype=torch.int32)
        for t, (_, p) in enumerate(flat):
            seen = 0 if p is None else (p + 1) // ratio
            some = torch.randperm(seen, generator=g)[: k - k // 4].to(torch.int32)
            chosen[t, : len(some)] = some
        chosen[:, : k // 2] = chosen[:, : k // 2].flip(0) if len(flat) == 1 else chosen[:, : k // 2]
        arguments["chosen"] = chosen
    return {
        k: v.to(mode.DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()
    }


def some(case, rows):
    """Of the same requests, these rows."""
    step = case["step"]
    fewer = replace(step, position=step.position[rows], request=step.request[rows])
    return case | {"q": case["q"][rows], "cis": case["cis"][rows], "step": fewer}


def in_tiles(case):
    return case | {"step": replace(case["step"], longest_query=TILED)}


def error(found, expected):
    """Of the worst row: norm of the difference over the norm."""
    assert found.isfinite().all()
    found, expected = found.float().flatten(1), expected.float().flatten(1)
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-6)).max())


DECODE = [
    # positions of each request's rows, heads, format, ratio, chosen
    ([[0], [130], [None], [40]], 8, "fp8", 0, None),
    interpreted_first([[127]], 64, "bfloat16", 0, None),
    ([[700], [3]], 16, "fp8", 4, 128),
    ([[2600]], 64, "fp8", 4, 512),
    ([[900], [127]], 8, "bfloat16", 128, None),
    ([[33000], [100]], 16, "fp8", 128, None),
]


@pytest.mark.parametrize(("positions", "heads", "kind", "ratio", "k"), DECODE)
def test_decode(gpu, positions, heads, kind, ratio, k):
    case = world(positions, heads, kind, ratio, k)
    assert error(attention(**case), reference(**case)) < ATTENTION_BF16


@pytest.mark.parametrize("kind", ["fp8", interpreted_first("bfloat16")])
def test_small_heads_of_the_tiny_model(gpu, kind):
    case = world([[300], [5]], 4, kind, 4, 64, d=64, rope=16)
    assert error(attention(**case), reference(**case)) < ATTENTION_BF16


PREFILL = [
    # a chunk that starts inside a window, two requests in one tile, padding at the end
    ([range(150, 157), range(5), [None] * 3], 8, "fp8", 0),
    # rows 14 and 15 share a tile, but only the latter sees an entry
    ([range(300, 309), range(121, 131)], 8, "fp8", 128),
    ([range(1, 6)], 128, "bfloat16", 128),
]


@pytest.mark.parametrize(("positions", "heads", "kind", "ratio"), PREFILL)
def test_prefill(gpu, positions, heads, kind, ratio):
    case = world(positions, heads, kind, ratio)
    found = attention(**in_tiles(case))
    assert error(found, reference(**case)) < ATTENTION_BF16


@pytest.mark.parametrize("kind", ["fp8", interpreted_first("bfloat16")])
def test_blocks_whose_rows_see_one_another(gpu, kind):
    """A block of a draft at the start of a text, one behind a window, and padding."""
    case = world([range(2, 7), range(200, 205), [None] * 2], 8, kind, span=SPAN + 5)
    lengths = torch.tensor([7, 205, 0], dtype=torch.int32, device=mode.DEVICE)
    block = replace(case["step"], seq_lens=lengths, together=5)
    expected = reference(**case | {"step": block})
    assert error(attention(**case | {"step": block}), expected) < ATTENTION_BF16
    alone = reference(**case | {"sliding_window": SPAN})
    assert error(alone[[4, 9]], expected[[4, 9]]) < 0.5  # the last row sees much the same
    assert error(alone[:4], expected[:4]) > 0.05


@pytest.mark.skipif(mode.INTERPRET, reason="numpy sums in another order for other shapes")
def test_the_same_bits_alone_in_company_in_tiles_and_in_pieces(gpu, monkeypatch):
    """Split over programs or not, one query or a tile of two: every row comes out the same."""
    case = world([range(440, 447), [100]], 8, "fp8", 128)
    tiles = attention(**in_tiles(case))
    pieces = attention(**case)
    one = attention(**some(case, slice(3, 4)))
    launch = replace(kernel.LAUNCH["any"], split=0)
    monkeypatch.setattr(kernel, "LAUNCH", {"any": launch})
    whole = attention(**case)
    assert torch.equal(pieces, whole)
    assert torch.equal(tiles, whole)
    assert torch.equal(one, whole[3:4])


def test_the_order_of_programs_does_not_matter(gpu):
    """Rows of four pieces, three and one in one launch: whichever program merges, the same bits.

    All keys weigh the same. In one dim two pieces cancel out, but not what rounding loses where
    they come first: another order of merging gives another sum."""
    case = world([[82000], [40000], [3]], 16, "bfloat16", 128, d=64, rope=16, span=32)
    assert error(attention(**case), reference(**case)) < ATTENTION_BF16
    case["q"].zero_()
    entries = case["entries"]
    for first, value in ((0, 2.0**20), (256, -(2.0**20))):
        i = torch.arange(first, first + 256, device=mode.DEVICE)
        rows, _ = entries.read(torch.zeros_like(i), i)
        rows[:, 0] = value
        block = entries.table[0, i // entries.rows].long() * entries.stride
        at = block + entries.offset + i % entries.rows * entries.pool.codec.words
        entries.pool.write(at, rows)
    found = []
    for seed in range(5):
        with seeded(seed):
            found.append(attention(**case))
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_blocks_taken_back_are_not_read(gpu):
    """The engine frees window blocks that no query sees; their numbers in the table are -1."""
    case = world([[300]], 8, "fp8")
    table = case["window"].table
    expected = attention(**case)
    table[0, : (300 - SPAN + 1) // 32] = -1
    assert torch.equal(attention(**case), expected)


def test_no_rows(gpu):
    case = world([[5]], 8, "fp8")
    assert attention(**some(case, slice(0))).shape == (0, 8, 512)


def test_rows_beyond_two_gigabytes(gpu):
    case = world([[60]], 8, "fp8")
    expected = attention(**case)
    assert torch.equal(attention(**case | {"window": far(case["window"])}), expected)


def test_a_format_it_does_not_read():
    case = world([[5]], 8, "bfloat16")
    pool = RowPool(case["window"].pool.storage, Float32Rows(512))
    with pytest.raises(ValueError, match=r"kv_dtype is float32; .* reads bfloat16 and fp8"):
        attention(**case | {"window": replace(case["window"], pool=pool)})
