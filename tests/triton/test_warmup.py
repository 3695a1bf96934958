"""Kernels compile side by side before anything is launched."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
import time

import pytest
import torch

from dsv4_plugin import warmup
from dsv4_plugin.cache.step import TILED
from dsv4_plugin.kernels import launch
from dsv4_plugin.kernels.attention import kernel as attention
from dsv4_plugin.kernels.norm import kernel
from dsv4_plugin.kernels.packed import fp8
from dsv4_plugin.tools.kernel_work import FLASH
from dsv4_plugin.tools.make import make_checkpoint
from lab.kit import mode
from lab.kit.targets import FakeGPU
from lab.paths import ROOT
from tests.conftest import A_LAYER_OF_EACH, SMALL


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


@pytest.mark.skipif(mode.INTERPRET or mode.DEVICE != "cpu", reason="compiles for an absent GPU")
def test_what_was_compiled_is_found_again(tmp_path, monkeypatch):
    """By another device's name nothing of it is in this process's memory: as at the next start."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.zeros(2, 160, dtype=torch.bfloat16)
    compiled = []
    with FakeGPU("sm80") as gpu:
        for start in ("first", "second"):
            gpu.get_current_device = lambda start=start: f"fake:{start} start"
            with warmup.compiled() as found, warmup.unknown() as new:
                warmup._compile_together(lambda: kernel.rms_norm(x, x[0], 1e-6), (0, 1))
            assert found.total() == 1
            compiled.append(new)
    assert compiled == [["normalise"], []]


PROGRAM = """
import logging, sys
import torch
from dsv4_plugin import load
from dsv4_plugin.kernels.step import StepBuilder
from dsv4_plugin.warmup import Padding, nothing, warm_up
from lab.kit.targets import FakeGPU

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
with FakeGPU("sm80"):
    whole = load(sys.argv[1], dtype="bfloat16", kv_dtype="fp8")
    caches, tables, _ = nothing(whole.model, whole.layout, torch.device("cpu"))
    steps = StepBuilder(whole.config, whole.layout, 1, "cpu")
    padding = Padding(whole.model, steps, caches, tables)
    warm_up(padding, torch.device("cpu"), [(1, 1, 1)])
"""


@pytest.mark.thorough
@pytest.mark.skipif(mode.INTERPRET or mode.DEVICE != "cpu", reason="compiles for an absent GPU")
def test_the_second_start_compiles_nothing(tmp_path):
    directory, cache = tmp_path / "checkpoint", tmp_path / "cache"
    make_checkpoint(directory, "tiny", 2, SMALL | A_LAYER_OF_EACH, tokenizer=False)
    environ = {"DSV4_KERNELS": "triton", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(directory)],
            env=os.environ | environ, check=True, stdout=subprocess.PIPE, text=True, timeout=600,
        )  # fmt: skip
        (line,) = re.findall(r"^Warm-up: (\d+) kernels in .* of which (\d+) .* in (.*)\.$",
                             done.stdout, re.M)  # fmt: skip
        said.append(line)
    (needed, compiled, where), (again, later, _) = said
    assert 10 < int(needed) == int(compiled) == int(again)
    assert later == "0"
    assert where == str(cache)


def test_linears_are_compiled_for_every_number_of_rows(monkeypatch):
    for chip in ("sm80", "sm86", "sm90", "sm120", "gfx942"):
        monkeypatch.setattr(launch, "architecture", lambda chip=chip: chip)
        chosen = launch.pick(fp8.LINEARS)
        tiles = chosen.bits.plain
        for rows, requests in ((8192, 512), (8192, 4), (256, 64)):
            some = [n for n, _, _ in warmup.shapes(FLASH, rows, requests, 1 << 20)]
            assert {tiles.of(n, chosen.line) for n in some} == {tiles.few, tiles.some, tiles.many}


def test_attention_is_compiled_for_keys_in_pages_at_every_length(monkeypatch):
    """Few rows and many, of prompts and not of prompts."""
    for chip in ("sm80", "sm86", "sm90", "sm120", "gfx942"):
        monkeypatch.setattr(launch, "architecture", lambda chip=chip: chip)
        few = launch.pick(attention.LAUNCHES).fp8[-2].below
        for rows, requests in ((8192, 512), (8192, 4), (256, 64)):
            needed = warmup.shapes(FLASH, rows, requests, 1 << 20)
            found = {(length, n >= few, query >= TILED) for n, query, length in needed}
            kinds = ((False, False), (True, False), (True, True))
            assert found >= {(length, *kind) for _, _, length in needed for kind in kinds}


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
