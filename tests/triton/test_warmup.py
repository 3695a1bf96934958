"""Kernels compile side by side before anything is launched."""

from __future__ import annotations

import logging
import threading
import time

import pytest
import torch

from dsv4_plugin import warmup
from dsv4_plugin.kernels.norm import kernel
from tests.kit import mode
from tests.kit.targets import FakeGPU


@pytest.mark.skipif(mode.INTERPRET or mode.DEVICE != "cpu", reason="compiles for an absent GPU")
def test_what_is_needed_is_compiled_first_and_not_launched():
    """A name of its own: nothing is known of it before."""
    rows = [torch.zeros(2, n, dtype=torch.bfloat16) for n in (192, 448)]

    def run() -> None:
        for x in rows:
            kernel.rms_norm(x, torch.ones(x.shape[1]), 1e-6)

    with FakeGPU("sm80") as gpu:
        gpu.get_current_device = lambda: "fake:warm-up"
        with warmup.compiled() as found:
            warmup._compile_together(run, (0, 1))
            assert gpu.launches == []
            assert found.total() == 2
            run()
        assert len(gpu.launches) == 2
        assert found.total() == 2


def test_processes_begin_at_different_places():
    """So that one finds what the other has put in Triton's cache."""
    orders = []
    for rank in range(2):
        work, done = warmup._Queue(), []
        for i in range(6):
            work.submit(done.append, i)
        assert done == []
        work.start(1, rank / 2)
        orders.append(done)
    assert orders == [[0, 1, 2, 3, 4, 5], [3, 4, 5, 0, 1, 2]]


def test_threads_work_at_once_and_say_how_far_they_are(monkeypatch, caplog):
    monkeypatch.setattr(warmup, "OFTEN", 0.0)
    work, together = warmup._Queue(), threading.Barrier(3)
    futures = [work.submit(together.wait, 60) for _ in range(3)]
    failing = work.submit(lambda: 1 / 0)
    start = time.monotonic()
    with caplog.at_level(logging.INFO, "dsv4_plugin"):
        work.start(3, 0.0)
    assert time.monotonic() - start < 60
    assert sorted(f.result() for f in futures) == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        failing.result()
    assert "4 kernels to compile in 3 threads" in caplog.text
    assert "4 of 4 kernels compiled" in caplog.text
