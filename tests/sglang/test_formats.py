"""Formats and ranks: what float32 on one rank does not cover."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dsv4_plugin.engine import load
from dsv4_plugin.tools.make import make_checkpoint
from tests.tolerances import BF16

from .reference import Reference
from .server import FLOAT32, Output, Server
from .test_exact import N, ids, prompts

SIZES = ("--max-total-tokens=8192", "--max-running-requests=8", "--chunked-prefill-size=256")


def local_errors(directory: Path, kv_dtype: str, outputs: list[Output]) -> list[float]:
    """Mean distance of each output's logprobs from the core's own engine, in the same formats,
    over the logits' standard deviation."""
    model = load(directory, "bfloat16", kv_dtype)
    errors = []
    for output in outputs:
        logits = model.logits(torch.tensor([*output.prompt, *output.ids]))[-N - 1 : -1]
        picked = logits.log_softmax(-1).gather(1, torch.tensor(output.ids)[:, None])[:, 0]
        difference = (torch.tensor(output.logprobs) - picked).abs().mean()
        errors.append(float(difference / logits.std()))
    return errors


pytestmark = pytest.mark.thorough


@pytest.mark.parametrize(("option", "kv_dtype"), [("fp8_e4m3", "fp8"), ("auto", "bfloat16")])
def test_bfloat16(serve, tiny: Path, option: str, kv_dtype: str):
    """The model's rows in each format, cold, cached and in company, as in the core's engine."""
    with serve("--dtype=bfloat16", f"--kv-cache-dtype={option}", *SIZES) as server:
        asked = prompts(700, seed=40)[6:]
        cold = server.generate_all(asked, N, at_once=4)
        warm = server.generate_all(asked, N, at_once=1)
    assert max(local_errors(tiny, kv_dtype, cold + warm)) < BF16
    assert sum(output.cached for output in warm) > 0


@pytest.mark.parametrize(
    "fmt", ["fp8-fp4", "nvfp4", "base", "0731", "vision", "ct-nvfp4", "ct-w4a16", "gptq"]
)
def test_packed_weights_and_fp4_indexer_keys(tmp_path_factory, fmt: str):
    """Quantised weights, and an option that SGLang itself refuses on a CPU."""
    folder = tmp_path_factory.mktemp("packed")
    make_checkpoint(folder / "tiny", "tiny", fmt=fmt)
    options = ("--dtype=float32", "--enable-deepseek-v4-fp4-indexer", *SIZES)
    with Server(folder / "tiny", *options, log=folder / "log") as server:
        output = server.generate([0, *ids(350, 61)], N)
        log = server.read_log()
    assert "Float32 rows, FP4Index keys" in log
    assert "GiB of them packed" in log
    model = load(folder / "tiny", "float32", index_dtype="fp4")
    logits = model.logits(torch.tensor([*output.prompt, *output.ids]))[-N - 1 : -1]
    picked = logits.log_softmax(-1).gather(1, torch.tensor(output.ids)[:, None])[:, 0]
    assert (torch.tensor(output.logprobs) - picked).abs().mean() / logits.std() < BF16


@pytest.mark.parametrize("experts", [(), ("--ep-size=2",)])
def test_two_ranks_without_radix_cache(serve, judge: Reference, experts: tuple[str, ...]):
    options = (*FLOAT32, *SIZES[:2], "--tp-size=2", "--disable-radix-cache", *experts)
    with serve(*options, environ={"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}) as server:
        judge.check(server.generate_all(prompts(700, seed=50), N, at_once=8))
        judge.check([server.generate([0, *ids(300, 51)], N)])
