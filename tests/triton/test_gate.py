"""The router: ids exactly, ties included."""

from __future__ import annotations

import pytest
import torch

from dsv4_plugin.kernels.gate import kernel, reference

pytestmark = pytest.mark.usefixtures("made_on_device")


@pytest.mark.parametrize(
    ("tokens", "experts", "k"),
    [(3, 256, 6), (2, 384, 6), (5, 8, 2), (1, 7, 1), (4, 33, 4), (3, 132, 6)],
)
@pytest.mark.parametrize("hashed", [False, True])
def test_gate(gpu, tokens, experts, k, hashed):
    torch.manual_seed(0)
    logits = 8 * torch.randn(tokens, experts)
    if experts == 7:
        logits -= 60  # so low that an expert beyond the last would win
    logits[0, ::2] = logits[0, 0]  # ties
    logits[-1, 1] += 40.0
    logits[-1, 0] = -60.0
    bias = None if hashed else torch.randn(experts).round() - (9 if experts == 7 else 0)
    table = torch.rand(11, experts).topk(k).indices.int() if hashed else None
    input_ids = torch.randint(0, 11, (tokens,))
    position = torch.arange(tokens).int()
    position[1::2] = -1  # padding
    expected = reference.gate(logits, k, 1.5, bias, table, input_ids, position)
    found = kernel.gate(logits, k, 1.5, bias, table, input_ids, position)
    assert torch.equal(found[0], expected[0])
    assert torch.equal((found[0] < 0).all(1), position < 0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-12)


def test_scores_at_the_ends(gpu):
    """Large, tiny and negative logits: weights are the scores' shares."""
    logits = torch.tensor([[100.0, 20.5, 1e-3, -1.0, -20.0, -40.0, -80.0, 3.0]])
    table = torch.arange(8)[None].int()
    found = kernel.gate(logits, 8, 1.0, None, table, *torch.zeros(2, 1, dtype=torch.int64))
    exact = torch.nn.functional.softplus(logits.double()).sqrt()
    torch.testing.assert_close(found[1].double(), exact / exact.sum(), rtol=1e-5, atol=0)
