"""Every test that takes `gpu` runs in each architecture of the run's mode (see lab/kit/mode)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from dsv4_plugin.kernels import arrival
from lab.kit import mode


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """On sm_90 large products may compile to wgmma, which is not emulated."""
    try:
        return (yield)
    except NotImplementedError as e:
        if "wgmma" in str(e):
            pytest.skip(str(e))
        raise


@pytest.fixture
def made_on_device() -> Iterator[None]:
    """What a test makes without naming a device is made where kernels run."""
    if mode.DEVICE == "cpu":
        yield
        return
    with torch.device(mode.DEVICE):
        yield


@pytest.fixture(params=mode.NAMES)
def gpu(request: pytest.FixtureRequest) -> Iterator[object]:
    """Inside the test, Triton's launches run as the mode says; torch.empty holds NaN. Every launch
    has to leave its counters at 0."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    arrival._made.cache_clear()
    with mode.gpu(request.param) as context:
        yield context
    torch.use_deterministic_algorithms(deterministic)
    device = torch.empty(0, device=mode.DEVICE).device
    assert not [k for k in arrival.KERNELS if arrival.counters(k, device, 0).any()]
