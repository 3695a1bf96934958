"""mHC: spread, collapse, head."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dsv4_plugin.kernels.streams import Mixer, Spread, kernel, reference

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


def launched(monkeypatch, **changes):
    """Streams are dealt out as on any chip, but for what is said."""
    monkeypatch.setattr(kernel, "LAUNCHES", {"any": replace(kernel.LAUNCHES["any"], **changes)})


def test_a_token_does_not_depend_on_its_batch(gpu, monkeypatch):
    """Forty tokens in shares of three tiles and less, Sinkhorn for eight at a time, twice in slabs;
    the last of them alone."""
    out, h, by = case(40, 4, 264, torch.bfloat16)
    mixer = mixer_of(4, 264, 24)
    last = Spread(by.post[39:].clone(), by.mixing[39:].clone())
    alone = kernel.streams(out[39:].clone(), h[39:].clone(), last, mixer)
    close(alone[1], reference.streams(out[39:], h[39:], last, mixer)[1], torch.bfloat16)
    for changes in ({"parts": 1}, {"parts": 2}, {"slab": 32}):
        launched(monkeypatch, few=4, **changes)
        many = kernel.streams(out, h, by, mixer)
        for one, all_ in ((alone[0], many[0]), (alone[1], many[1])):
            assert torch.equal(one, all_[39:])
        assert torch.equal(alone[2].post, many[2].post[39:])
        assert torch.equal(alone[2].mixing, many[2].mixing[39:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_join_alone_is_that_of_the_whole(gpu, dtype):
    """What a pipeline stage sends are the streams that its next sublayer would have had."""
    out, h, by = case(5, 4, 1100, dtype)
    found = kernel.spread(out, h, by)
    close(found, reference.spread(out, h, by), dtype)
    assert torch.equal(found, kernel.streams(out, h, by, mixer_of(4, 1100, 24))[0])
