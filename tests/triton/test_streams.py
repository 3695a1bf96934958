"""mHC: spread, collapse, head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsv4_plugin.kernels.streams import Mixer, Spread, kernel, reference
from lab.kit.order import seeded

pytestmark = pytest.mark.usefixtures("made_on_device")


def mixer_of(r, d, n, iters=20):
    fn = torch.randn(n, r * d) * (r * d) ** -0.5
    return Mixer(fn, torch.randn(n), torch.rand(n) + 0.5, torch.rand(d) + 0.5, iters, 1e-6, 1e-6)


def case(tokens, r, d, dtype, seed=0):
    torch.manual_seed(seed)
    h = (3 * torch.randn(tokens, r, d)).to(dtype)
    out = torch.randn(tokens, d).to(dtype)
    by = Spread(2 * torch.rand(tokens, r), torch.rand(tokens, r, r))
    return out, h, by


def close(found, expected, dtype):
    step = 2**-7 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(found, expected, rtol=step, atol=step * expected.abs().max().item())


@pytest.mark.parametrize(
    ("tokens", "r", "d", "dtype", "place"),
    [
        (2, 4, 72, torch.float32, "between"),
        (1, 4, 4096, torch.bfloat16, "first"),
        (17, 4, 264, torch.bfloat16, "between"),  # tails of tokens and columns
        (3, 4, 264, torch.bfloat16, "head"),
        (3, 4, 264, torch.bfloat16, "plain head"),
        (5, 2, 128, torch.bfloat16, "between"),
    ],
)
def test_streams(gpu, tokens, r, d, dtype, place):
    out, h, by = case(tokens, r, d, dtype)
    iters = 3 if d == 72 else 20  # few enough that one more or less shows
    head = place.endswith("head")
    mixer = mixer_of(r, d, r if head else (2 + r) * r, iters)
    if place == "plain head":  # a drafter norms by itself
        mixer = replace(mixer, weight=None)
    given = (None, h, None) if place == "first" else (out, h, by)
    expected = reference.streams(*given, mixer)
    found = kernel.streams(*given, mixer)
    close(found[0], expected[0], dtype)
    close(found[1], expected[1], dtype)
    if head:
        assert found[2] is None
        return
    # From equal streams, so that only the sums' order tells them apart.
    again = reference.collapse(found[0], mixer)[1]
    torch.testing.assert_close(found[2].post, again.post, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[2].mixing, again.mixing, rtol=1e-5, atol=1e-6)


def test_a_token_does_not_depend_on_its_batch(gpu, monkeypatch):
    monkeypatch.setattr(kernel, "FEW", 4)  # so that five tokens are a large batch
    out, h, by = case(5, 4, 264, torch.bfloat16)
    mixer = mixer_of(4, 264, 24)
    alone = kernel.streams(out[3:4], h[3:4], Spread(by.post[3:4], by.mixing[3:4]), mixer)
    many = kernel.streams(out, h, by, mixer)
    assert torch.equal(alone[0], many[0][3:4])
    assert torch.equal(alone[1], many[1][3:4])
    assert torch.equal(alone[2].mixing, many[2].mixing[3:4])


def test_the_order_of_programs_does_not_matter(gpu):
    """Three chunks of two tiles: whichever program is the last, the bits are the same."""
    out, h, by = case(5, 4, 600, torch.bfloat16)
    mixer = mixer_of(4, 600, 24)
    found = []
    for seed in range(4):
        with seeded(seed):
            h_out, x, after = kernel.streams(out, h, by, mixer)
        found.append((h_out, x, after.post, after.mixing))
    close(found[0][1], reference.streams(out, h, by, mixer)[1], torch.bfloat16)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))
