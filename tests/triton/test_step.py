"""Where every row of a batch belongs."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.kernels.step import Rows, kernel, reference

pytestmark = pytest.mark.usefixtures("made_on_device")
BLOCK, WORDS = 32, 146
GRAINS = (1, 4, 128)


def rows_of(n: int) -> Rows:
    return Rows(
        torch.full((n,), 77, dtype=torch.int32),
        torch.full((n,), 77, dtype=torch.int32),
        torch.full((n,), 77, dtype=torch.int64),
        torch.full((len(GRAINS), n), 77, dtype=torch.int32),
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("counts", "before", "rows"),
    [
        ([1], [0], 1),
        ([1, 1, 1, 1], [5, 0, 2047, 130], 4),
        ([3, 1, 0, 200], [0, 4000, 9, 63], 204),  # mixed, with an idle request
        ([1, 1, 0, 0], [17, 300, 0, 0], 8),  # padded, as for a captured graph
        ([0, 0], [0, 0], 3),
        ([1] * 130, range(130), 130),
        ([2, 0] * 17 + [0] * 3, range(37), 200),  # rows of padding in a block of their own
    ],
)
def test_rows_find_their_request(gpu, dtype, counts, before, rows):
    torch.manual_seed(0)
    counts, before = torch.tensor(counts), torch.tensor(list(before))
    start = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(dtype)
    lengths = (before + counts).to(dtype)
    table = torch.randint(0, 1 << 20, (len(counts), 140)).to(dtype)
    table[0, 0] = -1  # a hole
    # Blocks so far apart that offsets pass 2^31 words.
    tables = BlockTables(table, table, table[:, 0], 40_000, 1, 1)
    expected, found = rows_of(rows), rows_of(rows)
    grains = torch.tensor(GRAINS, dtype=torch.int32)
    reference.place(tables, start, lengths, BLOCK, WORDS, grains, expected)
    kernel.place(tables, start, lengths, BLOCK, WORDS, grains, found)
    for key in ("position", "request", "window_write", "angles_at"):
        assert torch.equal(getattr(found, key), getattr(expected, key)), key
    assert expected.position[0] == (before[0] if counts[0] else -1)
