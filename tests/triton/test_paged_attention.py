"""Attention over pages against its reference, and its bits against itself."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.kernels.paged_attention import Queries, reference
from dsv4_plugin.kernels.paged_attention.kernel import paged_attention
from tests.kit import mode
from tests.tolerances import ATTENTION_BF16
from tests.triton.cases import generator, kv_codec, paged, pairs

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
        "queries": Queries(position, request, pairs(len(flat), rope, seed), max(lengths)),
        "window": paged(codec, lengths, 32, seed + 1),
        "span": span,
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
    return on_device(arguments)


def on_device(arguments):
    queries = arguments["queries"]
    moved = {k: v.to(mode.DEVICE) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    fields = (t.to(mode.DEVICE) for t in (queries.position, queries.request, queries.cis))
    return moved | {"queries": Queries(*fields, queries.longest)}


def error(found, expected):
    assert found.isfinite().all()
    return float((found.float() - expected.float()).norm() / expected.float().norm())


DECODE = [
    # positions of each request's rows, heads, format, ratio, chosen
    ([[0], [130], [None], [40]], 8, "fp8", 0, None),
    ([[127]], 64, "bfloat16", 0, None),
    ([[700], [3]], 16, "fp8", 4, 128),
    ([[2600]], 64, "fp8", 4, 512),
    ([[900], [127]], 8, "bfloat16", 128, None),
    ([[33000], [100]], 16, "fp8", 128, None),
]


@pytest.mark.parametrize(("positions", "heads", "kind", "ratio", "k"), DECODE)
def test_decode(gpu, positions, heads, kind, ratio, k):
    case = world(positions, heads, kind, ratio, k)
    assert error(paged_attention(**case), reference(**case)) < ATTENTION_BF16


@pytest.mark.parametrize("kind", ["fp8", "bfloat16"])
def test_small_heads_of_the_tiny_model(gpu, kind):
    case = world([[300], [5]], 4, kind, 4, 64, d=64, rope=16)
    assert error(paged_attention(**case), reference(**case)) < ATTENTION_BF16
