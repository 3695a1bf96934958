"""Every fast operation against its plain reference, at real dims and at odd ones."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.kernels import experts, linear
from dsv4_plugin.kernels.attention.cpu import Keys, attend
from dsv4_plugin.kernels.compress import sums
from dsv4_plugin.kernels.experts import cpu as experts_cpu
from dsv4_plugin.kernels.experts import reference as experts_reference
from dsv4_plugin.kernels.index import cpu as index_cpu
from dsv4_plugin.kernels.packed import FP8Matrix, grouped_product, product
from dsv4_plugin.kernels.streams import cpu as streams_cpu
from dsv4_plugin.kernels.streams import reference as streams_reference
from dsv4_plugin.kernels.topk import stable_topk
from dsv4_plugin.model.parallel import GroupedLinear
from tests.tolerances import BF16_SUM, OP_FP32


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= OP_FP32 * expected.abs().max()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("tokens", [1, 3, 64])
@pytest.mark.parametrize("streams", [4, 2])
def test_sinkhorn(tokens, streams):
    logits = 3 * torch.randn(tokens, streams, streams)
    expected = streams_reference.sinkhorn(logits, 20, 1e-6)
    close(streams_cpu.sinkhorn(logits, 20, 1e-6), expected.transpose(1, 2))
    assert (expected.sum(-2) - 1).abs().max() < 1e-4  # columns come last


def attended(q: torch.Tensor, sink: torch.Tensor, parts: list[Keys]) -> torch.Tensor:
    """Softmax over all parts together; the sink adds exp(sink) to the denominator only."""
    n = q.shape[0]
    rows = torch.cat([k.rows.expand(n, *k.rows.shape[-2:]) for k in parts], 1)
    none = rows.new_zeros(n, rows.shape[1]).bool()
    hidden = torch.cat(
        [none[:, : k.rows.shape[-2]] if k.hidden is None else k.hidden for k in parts], 1
    )
    s = torch.einsum("nhd,nkd->nhk", q, rows).masked_fill(hidden[:, None], float("-inf"))
    p = torch.cat([s, sink[None, :, None].expand(n, -1, 1)], -1).softmax(-1)[..., :-1]
    return torch.einsum("nhk,nkd->nhd", p, rows)


@pytest.mark.parametrize(("n", "heads", "d"), [(1, 1, 8), (5, 64, 512), (130, 3, 48)])
def test_attention(n, heads, d):
    q, sink = torch.randn(n, heads, d) * d**-0.5, torch.randn(heads)
    shared = Keys(torch.randn(70, d), torch.rand(n, 70) < 0.5)
    own = Keys(torch.randn(n, 33, d), torch.rand(n, 33) < 0.5)
    for parts in ([shared], [own], [shared, own], [own, Keys(torch.randn(9, d), None)]):
        out = torch.full_like(q, float("nan"))
        attend(q, sink, parts, out)
        close(out, attended(q, sink, parts))


def test_a_query_that_sees_nothing_attends_to_its_sink():
    q = torch.randn(2, 3, 16)
    keys = Keys(torch.randn(5, 16), torch.tensor([[True] * 5, [False] * 5]))
    out = torch.full_like(q, float("nan"))
    attend(q, torch.zeros(3), [keys], out)
    assert out[0].abs().max() == 0
    assert out[1].abs().min() > 0


@pytest.mark.parametrize(("n_entries", "k"), [(8, 8), (70, 16), (600, 512)])
def test_selection_with_ties(n_entries, k):
    """Scores of few distinct values: the lower index wins, and every query gets what it sees."""
    n, heads, c = 6, 4, 16
    q = torch.randint(-1, 2, (n, heads, c)).float()
    keys = torch.randint(-1, 2, (n_entries, c)).float()
    weight = torch.randint(0, 2, (n, heads)).float()
    visible = torch.tensor([0, 1, k - 1, k, n_entries - 1, n_entries])
    score = torch.einsum("nic,mc->nim", q, keys).relu()
    score = torch.einsum("nim,ni->nm", score, weight)
    for rows in (keys, keys.expand(n, -1, -1).contiguous()):
        found = index_cpu.select(index_cpu.scores(q, weight, rows), visible, k)
        for i, count in enumerate(visible.tolist()):
            row = score[i].tolist()
            best = sorted(sorted(range(count), key=lambda m: (-row[m], m))[:k])
            chosen = found[i].tolist()
            assert sorted(e for e in chosen if e >= 0) == best
            assert chosen.count(-1) == k - len(best)


def test_stable_topk_orders_signs_and_zeros():
    score = torch.tensor([[-0.0, 0.0, -1.0, 2.0, -3.0, 2.0, float("-inf"), 0.0]])
    assert sorted(stable_topk(score, 4)[0].tolist()) == [0, 1, 3, 5]


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize(("e", "d", "f"), [(8, 32, 16), (3, 8, 24)])
def test_experts_by_either_product(tokens, e, d, f):
    k = 2
    x = torch.randn(tokens, d)
    w13, w2 = torch.randn(e, d, 2 * f), torch.randn(e, f, d)
    ids = torch.rand(tokens, e).topk(k).indices
    weight = torch.rand(tokens, k)
    close(
        experts.experts(x, ids, weight, w13, w2, limit=1.0),
        experts_reference.experts(x, ids, weight, w13, w2, limit=1.0),
    )
    if tokens != 5:
        assert (tokens * k <= experts_cpu.FEW * e) == (tokens == 1)


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_pooling_sums_merge_to_the_softmax(cut):
    kv, score = torch.randn(8, 5), 20 * torch.randn(8, 5)
    expected = (score.softmax(0) * kv).sum(0)
    state = sums.nothing(kv)
    for t in range(cut):
        state = sums.merge(state, sums.of_token(kv[t], score[t]))
    rest = sums.of_windows(kv[None, cut:, None], score[None, cut:, None])[0, 0]
    close(sums.mean(sums.merge(state, rest)), expected)
    packed = sums.unpack(sums.pack(state))
    close(sums.mean(sums.merge(packed, rest)), expected)


@pytest.fixture(params=["with products of bfloat16", "without"])
def cpu(request, monkeypatch):
    if request.param == "without":
        monkeypatch.setattr(linear, "_multiplies_bfloat16", lambda: False)
    elif not linear._multiplies_bfloat16():
        pytest.skip("this CPU has none")


def rounded_once(found, expected):
    """bfloat16 found, float32 expected."""
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() <= BF16_SUM * expected.abs().max()


@pytest.mark.parametrize("scale", [1.0, 1e6])  # within float16's range and beyond
def test_bfloat16_linear(cpu, scale):
    x, weight = torch.randn(3, 130).bfloat16(), (scale * torch.randn(40, 130)).bfloat16()
    rounded_once(linear.pack(weight)(x), x.float() @ weight.float().t())


def test_bfloat16_output_groups(cpu):
    layer = GroupedLinear(2, 24, 16, torch.bfloat16)
    weight = torch.randn(32, 24).bfloat16()
    layer.weight.data.copy_(weight)
    layer.finalize_weights()
    x = torch.randn(5, 2, 24).bfloat16()
    rows = weight.float().view(2, 16, 24)
    rounded_once(layer(x), torch.einsum("tgi,goi->tgo", x.float(), rows).flatten(1))


@pytest.mark.parametrize("tokens", [1, 40])
def test_bfloat16_experts(cpu, tokens):
    e, d, f = 8, 32, 16
    x = torch.randn(tokens, d).bfloat16()
    w13, w2 = torch.randn(e, d, 2 * f).bfloat16(), torch.randn(e, f, d).bfloat16()
    ids, weight = torch.rand(tokens, e).topk(2).indices, torch.rand(tokens, 2)
    given = [t.float() for t in (w13, w2)]
    expected = experts_reference.experts(x.float(), ids, weight, *given, limit=1.0)
    rounded_once(experts.experts(x, ids, weight, w13, w2, limit=1.0), expected)


def test_bfloat16_inputs_of_packed_weights(cpu):
    codes = torch.randint(0, 0x78, (256, 256), dtype=torch.uint8)
    x = torch.randn(3, 256).bfloat16()
    matrix = FP8Matrix(codes, torch.rand(2, 2))
    weight = matrix.rows(0, 256, torch.float32).clone()
    rounded_once(product(x, matrix), x.float() @ weight.t())
    by_row = FP8Matrix(codes, matrix.scale.repeat_interleave(128, 0), height=1)
    found = grouped_product(torch.stack([x, x], 1), by_row)
    rounded_once(found, x.float() @ weight.t())
