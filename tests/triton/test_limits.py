"""A captured step is launched for the longest request there may be: what that costs a short one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsv4_plugin.cache.layout import CacheLayout
from dsv4_plugin.cache.paged import Paged
from dsv4_plugin.cache.rows import RowPool
from dsv4_plugin.config import CSA, HCA
from dsv4_plugin.kernels.attention import kernel as attention
from dsv4_plugin.kernels.index import kernel as index
from dsv4_plugin.kernels.index.topk import topk
from dsv4_plugin.tools.kernel_work import flash
from lab.kernels.cases import step_of_rows
from lab.kit import mode
from lab.kit.gpu import EmulatedGPU
from lab.kit.targets import FakeGPU
from lab.paths import ROOT
from tests.triton import test_attention, test_index

pytestmark = pytest.mark.skipif(
    mode.INTERPRET or mode.DEVICE != "cpu", reason="launches of GPUs that are not there"
)
LIMITS = (1 << 12, 1 << 16, 1 << 20)


class Launch:
    """In a kernel's place: its grid, and the bytes of float32 scratch and outputs it is given."""

    def __getitem__(self, grid):
        self.grid = grid
        return self

    def __call__(self, *args, **_):
        given = [a for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.float32]
        self.bytes = [a.nbytes for a in given]


def rows_of(layout, ratio, name):
    part = layout.page[ratio].parts[name] if ratio else layout.window.parts["kv"]
    pool = RowPool(torch.empty(1 << 10, dtype=torch.int32, device="meta"), part.codec)
    table = torch.empty(1, 1 << 12, dtype=torch.int32, device="meta")
    return Paged(pool, table, 1 << 8, 0, part.rows)


def launches(monkeypatch, rows, limit):
    """Of a decode step with Flash's sizes: programs and MiB of attention's parts (HCA) and of index
    scores (CSA)."""
    attend, scores = Launch(), Launch()
    monkeypatch.setattr(attention, "attend", attend)
    monkeypatch.setattr(attention, "merge", Launch())
    monkeypatch.setattr(index, "index_scores", scores)
    layout = CacheLayout.of(flash([CSA, HCA]), "fp8")
    with FakeGPU("sm80"), torch.device("meta"):
        at = torch.empty(rows, dtype=torch.int32)
        cis, step = torch.empty(rows, 64), step_of_rows(at, at, limit)
        q = torch.empty(rows, 64, 512, dtype=torch.bfloat16)
        window, entries = rows_of(layout, 0, "kv"), rows_of(layout, HCA, "kv")
        attention.attention(q, torch.empty(64), cis, step, window, 128, entries, HCA)
        q = torch.empty(rows, 64, 128, dtype=torch.float16)
        keys = rows_of(layout, CSA, "key")
        score = index.scores(q, torch.empty(rows, 64), keys, at, at, CSA, limit // CSA)
    parts = sum(attend.bytes[2:])  # after the sink and the angles
    grids = [a * b * c for a, b, c in ((*attend.grid, 1)[:3], (*scores.grid, 1)[:3])]
    return grids[0], parts / 2**20, grids[1], score.nbytes / 2**20


def test_the_documented_table(monkeypatch):
    text = (ROOT / "docs" / "gpu.md").read_text()
    for limit in LIMITS:
        programs, scratch, scores, room = launches(monkeypatch, 1, limit)
        row = f"| {limit:,} | {programs} | {scratch:.1f} | {scores} | {room:.1g} |"
        assert row in text, row


@pytest.mark.parametrize("rows", [1, 8, 53, 256])
def test_programs_do_not_grow_with_the_limit(monkeypatch, rows):
    """Beyond what fills a card: as many as there are rows, head blocks and pieces, or a constant;
    and scratch within its bounds."""
    programs, scratch, scores, _ = launches(monkeypatch, rows, LIMITS[-1])
    launch = attention.LAUNCHES["a100"]
    columns = max(way.columns for way in launch.fp8)
    cell = 64 * 514 * 4
    pieces = -(-(LIMITS[-1] // HCA + 128) // (launch.keys * launch.piece))
    dealt = attention.DEALT_BYTES // cell
    assert programs <= 2 * columns * max(dealt, pieces * rows)
    assert scratch * 2**20 <= attention.SCRATCH_BYTES
    assert scores <= index.LAUNCHES["any"].programs + rows


def counted(run):
    """What `run` returns, and the bytes of memory that its kernels read and wrote."""
    with EmulatedGPU("sm80", count=True) as gpu:
        out = run()
    moved = [c.distinct("load") + c.distinct("store") for _, _, c in gpu.counted]
    return out, sum(moved)


def test_a_short_request_moves_no_more_under_a_long_limit():
    """Attention and the indexer's choice: the same bits. Programs with nothing to do have read
    their row's length."""
    case = test_attention.world([[300]], 8, "fp8", HCA)
    short = case["step"]
    long = replace(short, longest=1 << 17)
    near, bytes_near = counted(lambda: attention.attention(**case))
    far, bytes_far = counted(lambda: attention.attention(**case | {"step": long}))
    assert torch.equal(near, far)
    assert bytes_far < 1.05 * bytes_near

    q, _, (weight, keys, *at, ratio, n) = test_index.world([[300]])
    position = at[0]

    def choose(n):
        score = index.scores(q, weight, keys, *at, ratio, n)
        return topk(score, position, ratio, 64)

    near, bytes_near = counted(lambda: choose(n))
    far, bytes_far = counted(lambda: choose(1 << 15))
    assert torch.equal(near, far)
    assert bytes_far < 1.05 * bytes_near
