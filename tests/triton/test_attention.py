"""Attention over pages against its reference, and its bits against itself."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import pytest
import torch

from dsv4_plugin.cache.paged import Paged
from dsv4_plugin.cache.rows import Float32Rows, RowPool
from dsv4_plugin.cache.step import TILED
from dsv4_plugin.kernels.attention import kernel, unpack
from dsv4_plugin.kernels.attention.kernel import attention
from dsv4_plugin.kernels.attention.keys import NEVER
from dsv4_plugin.kernels.attention.reference import attention as reference
from lab.kernels.cases import far, generator, kv_codec, paged, pairs, step_of_rows
from lab.kit import mode
from lab.kit.mode import interpreted_first
from lab.kit.order import seeded
from lab.kit.targets import FakeGPU
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


too_wide = pytest.mark.skipif(not mode.INTERPRET, reason="takes more shared memory than chips have")


@pytest.mark.parametrize("d", [576, pytest.param(1032, marks=too_wide)])
def test_other_widths_of_fp8_rows(gpu, d):
    """Of 576, quarters without a code of e4m3; of 1,032, quarters with two words of scales."""
    case = world([[300], [5]], 4, "fp8", 4, 64, d=d)
    assert error(attention(**case), reference(**case)) < ATTENTION_BF16


PREFILL = [
    # a chunk that starts inside a window, two requests, padding at the end
    ([range(150, 157), range(5), [None] * 3], 8, "fp8", 0),
    # row 15 is the first that sees an entry
    ([range(300, 309), range(121, 131)], 8, "fp8", 128),
    ([range(1, 6)], 128, "bfloat16", 128),
]


@pytest.mark.parametrize(("positions", "heads", "kind", "ratio"), PREFILL)
def test_prefill(gpu, positions, heads, kind, ratio):
    case = world(positions, heads, kind, ratio)
    assert error(attention(**case), reference(**case)) < ATTENTION_BF16


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


LAUNCH = kernel.LAUNCHES["any"]
ONE, *_, MANY = LAUNCH.fp8
WAYS = {
    "dealt": [replace(ONE, deal=0)],
    "in pieces": [replace(ONE, deal=inf)],
    "in company": [MANY],
    "halves": [replace(MANY, columns=2)],
    "quarters": [replace(MANY, columns=4)],
}


def launched(monkeypatch, case, ways):
    """attention(**case), launched so: of pieces of three tiles."""
    ways = tuple(replace(w, below=inf) for w in ways)
    table = {"any": replace(LAUNCH, piece=3, fp8=ways, bfloat16=ways)}
    monkeypatch.setattr(kernel, "LAUNCHES", table)
    return attention(**case)


@pytest.mark.skipif(mode.INTERPRET, reason="numpy sums in another order for other shapes")
@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
def test_the_same_bits_alone_in_company_and_in_pieces(gpu, monkeypatch, kind):
    """Rows of up to three pieces of the list, a row of one tile, and one of padding."""
    case = world([[33000 // 128 * 128 - 1], [20000, 20001], [3], [None]], 8, kind, 128)
    case["entries"] = paged(kv_codec(kind), [257, 156, 0, 0], 2, 5)
    case["q"] *= 20  # Large scores, whose last bits weigh something.
    dealt = launched(monkeypatch, case, WAYS["dealt"])
    assert error(dealt, reference(**case)) < ATTENTION_BF16
    for name, ways in WAYS.items():
        assert torch.equal(launched(monkeypatch, case, ways), dealt), name
        alone = launched(monkeypatch, some(case, slice(1, 2)), ways)
        assert torch.equal(alone, dealt[1:2]), name
    monkeypatch.setattr(kernel, "SCRATCH_BYTES", 1 << 18)  # two rows at a time
    assert torch.equal(launched(monkeypatch, case, WAYS["in pieces"]), dealt)
    monkeypatch.setattr(kernel, "DEALT_BYTES", 0)
    assert torch.equal(launched(monkeypatch, case, WAYS["dealt"]), dealt)


def prompts(positions, *given, **kinds):
    """A case of prompts: as `world`, of which the step knows where each request's rows are. One
    that brings none is 40 tokens long."""
    case = world(positions, *given, **kinds)
    counts = torch.tensor([0, *(sum(p is not None for p in some) for some in positions)])
    lengths = [max([p for p in some if p is not None], default=39) + 1 for some in positions]
    step = replace(
        case["step"],
        query_start=counts.cumsum(0).int().to(mode.DEVICE),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=mode.DEVICE),
        longest_query=max(TILED, int(counts.max())),
    )
    return case | {"step": step}


def both_ways(monkeypatch, case, least=0.0, **changes):
    """attention(**case) with rows as they are, and with those unpacked that are read `least` times;
    and where requests' unpacked rows start, -1 for none."""
    found, starts = [], []

    def noted(*given):
        plain = unpack.unpacked(*given)
        starts.append(None if plain is None else plain.starts[:, 0].tolist())
        return plain

    monkeypatch.setattr(kernel, "unpacked", noted)
    for at in (inf, least):
        fp8 = (replace(MANY, unpack=at),)
        table = {"any": replace(LAUNCH, fp8=fp8, bfloat16=LAUNCH.bfloat16[-1:], **changes)}
        monkeypatch.setattr(kernel, "LAUNCHES", table)
        found.append(attention(**case))
    (one,) = starts
    return *found, one


UNPACKED = [
    # positions of each request's rows, heads, ratio, chosen
    # a chunk behind a window, a first one, a decoded row, a request without rows, and padding
    ([range(300, 317), range(5), [700], [None], [None] * 2], 16, 0, None),
    interpreted_first([range(520, 537), [260], range(3)], 64, 128, None),
    ([range(400, 417), [130], range(200, 203)], 8, 4, 64),
    interpreted_first([range(16)], 8, 4, None),
]


@pytest.mark.parametrize(("positions", "heads", "ratio", "k"), UNPACKED)
def test_unpacked_rows_give_the_same_bits(gpu, monkeypatch, positions, heads, ratio, k):
    case = prompts(positions, heads, "fp8", ratio, k)
    case["q"] *= 8  # Large scores, whose last bits weigh something.
    packed, plain, starts = both_ways(monkeypatch, case)
    assert [s >= 0 for s in starts] == [None not in some for some in positions]
    assert torch.equal(plain, packed)
    assert error(plain, reference(**case)) < ATTENTION_BF16


SOME = [
    # a chunk among decoded rows, and a first one too short for its window
    ([[700], range(300, 317), [260], range(5), [None]], 0, None),
    interpreted_first([[700], range(900, 917), range(3)], 128, None),
    ([[500], range(400, 417), [130]], 4, 64),
]


@pytest.mark.parametrize(("positions", "ratio", "k"), SOME)
def test_only_prompts_among_decoded_rows_are_unpacked(gpu, monkeypatch, positions, ratio, k):
    """Rows of several pieces, in one launch as in the other."""
    case = prompts(positions, 4, "fp8", ratio, k, d=64, rope=16)
    packed, plain, starts = both_ways(monkeypatch, case, 7.0, piece=2)
    assert [s >= 0 for s in starts] == [len(some) == 17 for some in positions]
    assert torch.equal(plain, packed)
    assert error(plain, reference(**case)) < ATTENTION_BF16


def test_a_row_is_taken_by_one_launch(gpu, monkeypatch):
    """By that which reads unpacked rows (1) or by that which reads the others (0), or all by one
    (-1), as in steps of decode, which unpack nothing."""
    taken, attend = [], kernel.attend

    class Noted:
        def __getitem__(self, grid):
            def launch(*given, **sizes):
                taken.append(given[12])
                attend[grid](*given, **sizes)

            return launch

    monkeypatch.setattr(kernel, "attend", Noted())
    positions, ratio, k = SOME[0]
    case = prompts(positions, 4, "fp8", ratio, k, d=64, rope=16)
    both_ways(monkeypatch, case, 7.0, piece=2)
    assert taken == [-1, 1, 0]
    monkeypatch.setattr(kernel, "unpacked", lambda *_: pytest.fail("for decoded rows"))
    attention(**world([[700], [3]], 4, "fp8", d=64, rope=16))
    assert taken == [-1, 1, 0, -1]


def test_unpacked_rows_of_a_long_limit(gpu, monkeypatch):
    """Lengths that the host knows are bounds; what is beyond a request's is not touched."""
    case = prompts([range(300, 316), range(2)], 4, "fp8", 4, 64, d=64, rope=16)
    step = replace(case["step"], longest=1 << 13, longest_query=4096)
    packed, plain, starts = both_ways(monkeypatch, case | {"step": step})
    assert min(starts) >= 0
    assert torch.equal(plain, packed)
    assert torch.equal(plain, attention(**case))


def test_unpacked_blocks_of_a_draft(gpu, monkeypatch):
    """Rows that see one another."""
    case = prompts([range(180, 197), range(4, 21)], 4, "fp8", d=64, rope=16, span=SPAN + 17)
    case["step"] = replace(case["step"], together=17)
    packed, plain, starts = both_ways(monkeypatch, case)
    assert min(starts) >= 0
    assert torch.equal(plain, packed)
    assert error(plain, reference(**case)) < ATTENTION_BF16


def test_no_rows_are_unpacked_beyond_the_bound(gpu, monkeypatch):
    """There is room for one of two requests, and for a row less than one."""
    case = prompts([range(300, 316), range(400, 416)], 4, "fp8", d=64, rope=16)
    given = case["step"], case["window"], SPAN, None, NEVER, 16, unpack.ALL, 2.0
    need = 16 + SPAN - 1
    monkeypatch.setattr(unpack, "UNPACKED_BYTES", need * 128)
    found = unpack.unpacked(*given)
    assert not found.all
    assert found.window.pool.storage.nbytes == need * 128
    assert [s >= 0 for s in found.starts[:, 0].tolist()] == [True, False]
    at = torch.arange(300 - SPAN + 1, 316, device=mode.DEVICE)
    rows, real = found.window.read(torch.zeros_like(at), at)
    assert real.all()
    assert torch.equal(rows, case["window"].read(torch.zeros_like(at), at)[0])
    monkeypatch.setattr(unpack, "UNPACKED_BYTES", need * 128 - 1)
    assert (unpack.unpacked(*given).starts == -1).all()


@pytest.mark.skipif(mode.INTERPRET or mode.DEVICE != "cpu", reason="launches of an absent GPU")
def test_when_rows_are_unpacked():
    """By how often a row is read, of all requests or, if these were one, of some."""

    def unpacked(rows, requests, length, ratio=NEVER, choices=unpack.ALL, least=4.0):
        at = torch.empty(rows, dtype=torch.int32)
        step = replace(
            step_of_rows(at, at, length, tiles=True), query_start=at.new_empty(requests + 1),
            seq_lens=at.new_empty(requests),
        )  # fmt: skip
        pool = RowPool(at.new_empty(1 << 10), kv_codec("fp8"))
        some = Paged(pool, at.new_empty(requests, 4), 1 << 8, 0, 64)
        entries = None if ratio == NEVER else some
        found = unpack.unpacked(step, some, SPAN, entries, ratio, 64, choices, least)
        return found and (found.all, found.window.pool.storage.nbytes)

    row = 1024
    with FakeGPU("sm80"), torch.device("meta"):
        assert unpacked(4096, 1, 1 << 16) == (True, (4096 + 127) * row)
        assert unpacked(4096, 1, 1 << 16, 4, 512) == (True, (4096 + 127 + (1 << 14)) * row)
        assert unpacked(4096, 1, 1 << 20, 4, 512) == (False, 1 << 28)
        assert unpacked(64, 1, 1 << 20, 4, 512) is None
        assert unpacked(128, 64, 1 << 16, 128) == (False, 128 * 640 // 4 * row)
        assert unpacked(16, 1, 16, least=2.0) is None
        assert unpacked(4096, 4096, 1 << 16, least=1.0) == (False, 4096 * 128 * row >> 1)
    for launch in kernel.LAUNCHES.values():
        assert launch.fp8[-1].unpack > 1


def test_the_order_of_tiles_matters_and_that_of_programs_does_not(gpu, monkeypatch):
    """All keys weigh the same. In two dims tiles cancel out, but not what rounding loses where
    they come first: another order of folding gives another sum."""
    case = world([[30000], [9000], [3]], 16, "bfloat16", 128, d=64, rope=16, span=32)
    case["q"].zero_()
    entries = case["entries"]
    big = 2.0**20  # dim 0: in one piece; dim 1: in two
    for dim, first, value in ((0, 0, big), (0, 32, -big), (1, 0, big), (1, 64, -big)):
        i = torch.arange(first, first + 32, device=mode.DEVICE)
        rows, _ = entries.read(torch.zeros_like(i), i)
        rows[:, dim] = value
        block = entries.table[0, i // entries.rows].long() * entries.stride
        at = block + entries.offset + i % entries.rows * entries.pool.codec.words
        entries.pool.write(at, rows)
    found = []
    for seed in range(3):
        for ways in WAYS.values():
            with seeded(seed):
                found.append(launched(monkeypatch, case, ways))
    assert error(found[0][:, :, 2:], reference(**case)[:, :, 2:]) < ATTENTION_BF16
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_what_is_far_from_the_greatest_score_is_nothing(gpu):
    """A tile whose scores are 2^200 times lighter than another's, before it and after it."""
    case = world([[700], [700]], 16, "bfloat16", 0, d=64, rope=16)
    window = case["window"]
    q = case["q"].float()
    for request, at in ((0, 600), (1, 690)):
        i = torch.tensor([at], device=mode.DEVICE)
        block = window.table[request, i // window.rows].long() * window.stride
        to = block + window.offset + i % window.rows * window.pool.codec.words
        window.pool.write(to, 40 * q[request].mean(0, keepdim=True).sign() * 8)
    case["q"] = (q.mean(1, keepdim=True).sign() + 0.1 * q).bfloat16()
    assert error(attention(**case), reference(**case)) < ATTENTION_BF16


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
