"""Every fast operation against its plain reference, at real dims and at odd ones."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.kernels import experts, linear, pooling, select, sinkhorn, sparse_attention
from dsv4_plugin.kernels.packed import FP8Matrix, grouped_product, tiled_product
from dsv4_plugin.kernels.sparse_attention import Keys
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
    expected = sinkhorn.reference(logits, 20, 1e-6)
    close(sinkhorn.sinkhorn(logits, 20, 1e-6), expected.transpose(1, 2))
    assert (expected.sum(-2) - 1).abs().max() < 1e-4  # columns come last


@pytest.mark.parametrize(("n", "heads", "d"), [(1, 1, 8), (5, 64, 512), (130, 3, 48)])
def test_sparse_attention(n, heads, d):
    q, sink = torch.randn(n, heads, d) * d**-0.5, torch.randn(heads)
    shared = Keys(torch.randn(70, d), torch.rand(n, 70) < 0.5)
    own = Keys(torch.randn(n, 33, d), torch.rand(n, 33) < 0.5)
    for parts in ([shared], [own], [shared, own], [own, Keys(torch.randn(9, d), None)]):
        out = torch.full_like(q, float("nan"))
        sparse_attention.sparse_attention(q, sink, parts, out)
        close(out, sparse_attention.reference(q, sink, parts))


def test_a_query_that_sees_nothing_attends_to_its_sink():
    q = torch.randn(2, 3, 16)
    keys = Keys(torch.randn(5, 16), torch.tensor([[True] * 5, [False] * 5]))
    out = torch.full_like(q, float("nan"))
    sparse_attention.sparse_attention(q, torch.zeros(3), [keys], out)
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
    expected = select.reference(q, weight, keys.expand(n, -1, -1), visible, k)
    for rows in (keys, keys.expand(n, -1, -1).contiguous()):
        index, unused = select.select(select.scores(q, weight, rows), visible, k)
        found = torch.where(unused, n_entries, index).sort(-1).values
        assert torch.equal(torch.where(found == n_entries, -1, found), expected)


def test_stable_topk_orders_signs_and_zeros():
    score = torch.tensor([[-0.0, 0.0, -1.0, 2.0, -3.0, 2.0, float("-inf"), 0.0]])
    assert sorted(select.stable_topk(score, 4)[0].tolist()) == [0, 1, 3, 5]


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
        experts.reference(x, ids, weight, w13, w2, limit=1.0),
    )
    if tokens != 5:
        assert (tokens * k <= experts.FEW * e) == (tokens == 1)


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_pooling_sums_merge_to_the_softmax(cut):
    kv, score = torch.randn(8, 5), 20 * torch.randn(8, 5)
    expected = pooling.reference(kv, score)
    state = pooling.nothing(kv)
    for t in range(cut):
        state = pooling.merge(state, pooling.of_token(kv[t], score[t]))
    rest = pooling.of_windows(kv[None, cut:, None], score[None, cut:, None])[0, 0]
    close(pooling.mean(pooling.merge(state, rest)), expected)
    packed = pooling.unpack(pooling.pack(state))
    close(pooling.mean(pooling.merge(packed, rest)), expected)


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
    expected = experts.reference(x.float(), ids, weight, *given, limit=1.0)
    rounded_once(experts.experts(x, ids, weight, w13, w2, limit=1.0), expected)


def test_bfloat16_inputs_of_packed_weights(cpu):
    codes = torch.randint(0, 0x78, (256, 256), dtype=torch.uint8)
    x = torch.randn(3, 256).bfloat16()
    matrix = FP8Matrix(codes, torch.rand(2, 2))
    weight = matrix.rows(0, 256, torch.float32).clone()
    rounded_once(tiled_product(x, matrix), x.float() @ weight.t())
    by_row = FP8Matrix(codes, matrix.scale.repeat_interleave(128, 0), height=1)
    found = grouped_product(torch.stack([x, x], 1), by_row)
    rounded_once(found, x.float() @ weight.t())
