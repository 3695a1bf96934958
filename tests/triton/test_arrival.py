"""The last program of a tile goes on, whichever it is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv4_plugin.kernels.arrival import is_last
from lab.kit import mode
from lab.kit.order import seeded


@triton.jit
def _sum(x, parts, out, counter, N: tl.constexpr):
    """Program (part, tile): out [tiles, N], the sums of x [tiles, parts, N] in order."""
    part, tile, programs = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    first = tile * programs * N + tl.arange(0, N)
    tl.store(parts + first + part * N, tl.load(x + first + part * N))
    if is_last(counter + tile, programs):
        total = tl.zeros((N,), tl.float32)
        for i in range(programs):
            total += tl.load(parts + first + i * N, cache_modifier=".cg")
        tl.store(out + tile * N + tl.arange(0, N), total)


def test_the_order_of_programs_does_not_matter(gpu):
    """Two tiles of three parts, launched again and again: a counter that is not put back, or not
    waited for, leaves or adds NaN."""
    x = torch.randn(2, 3, 256, generator=torch.Generator().manual_seed(0)).to(mode.DEVICE)
    expected = (x[:, 0] + x[:, 1]) + x[:, 2]
    counter = torch.zeros(2, dtype=torch.int32, device=mode.DEVICE)
    for seed in range(4):
        parts, out = torch.full_like(x, torch.nan), torch.full_like(x[:, 0], torch.nan)
        with seeded(seed):
            _sum[(3, 2)](x, parts, out, counter, N=256)
        assert torch.equal(out, expected)
        assert not counter.any()
