"""The adapter as on a GPU, with the emulator in its place: chunks, a batch, decoding, drafts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dsv4_plugin import load
from dsv4_plugin.tools.make import make_checkpoint
from tests.conftest import A_LAYER_OF_EACH, random_ids
from tests.tolerances import clear_choices

from .server import Output, Server

NEW = 4
OPTIONS = (
    "--dtype=bfloat16",
    "--kv-cache-dtype=fp8_e4m3",
    "--chunked-prefill-size=128",
    "--max-total-tokens=4096",
    "--max-running-requests=4",
    "--watchdog-timeout=3600",
    "--skip-server-warmup",
)


@pytest.mark.thorough
def test_the_server_gives_torch_s_tokens(tmp_path):
    """Greedy tokens of three requests; where two logits nearly tie, either may be chosen."""
    checkpoint = tmp_path / "three"
    make_checkpoint(checkpoint, "tiny", 2, A_LAYER_OF_EACH)
    prompts = [random_ids(n, seed=n).tolist() for n in (5, 140, 20)]
    environ = {"DSV4_KERNELS": "triton"}
    log = tmp_path / "log"
    with Server(checkpoint, *OPTIONS, log=log, testing="emulate", environ=environ) as server:
        found = server.generate_all(prompts, NEW, at_once=3, logprobs=False)
        assert "Triton" in server.read_log()
    check(checkpoint, found)


@pytest.mark.thorough
def test_a_server_with_drafts_gives_torch_s_tokens(tmp_path):
    """Drafts that torch's tokens say are right, wrong, and wrong in the middle. (What SGLang has
    kernels for is torch's, as the server's device is the CPU.)"""
    checkpoint, file = tmp_path / "three", tmp_path / "drafts"
    make_checkpoint(checkpoint, "tiny", 2, A_LAYER_OF_EACH | {"num_nextn_predict_layers": 1})
    prompts = [random_ids(n, seed=n).tolist() for n in (5, 140, 20)]
    new = 2 * NEW
    model = load(checkpoint, dtype="bfloat16", kv_dtype="fp8")
    texts = [p + model.generate([p], new, ignore_eos=True)[0] for p in prompts]
    file.write_text(json.dumps(list(zip(texts, (-1, 0, 1), strict=True))))
    environ = {"DSV4_KERNELS": "triton", "DSV4_DRAFTS": str(file)}
    mtp, log = "--speculative-algorithm=EAGLE", tmp_path / "log"
    with Server(
        checkpoint, *OPTIONS, mtp, log=log, testing="emulate,drafts", environ=environ
    ) as server:
        found = server.generate_all(prompts, new, at_once=3, logprobs=False)
        kept = [float(n) for n in re.findall(r"accept len: ([0-9.]+)", server.read_log())]
    assert max(kept) > 1
    check(checkpoint, found)


def check(checkpoint: Path, found: list[Output]) -> None:
    model = load(checkpoint, dtype="bfloat16", kv_dtype="fp8")
    clear = [clear_choices(model, output.prompt, output.ids) for output in found]
    assert sum(clear) >= NEW
