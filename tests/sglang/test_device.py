"""The adapter as on a GPU, with the emulator in the GPU's place: chunks, a batch, decoding."""

from __future__ import annotations

import pytest

from dsv4_plugin import load
from dsv4_plugin.tools.make import make_checkpoint
from tests.conftest import A_LAYER_OF_EACH, random_ids
from tests.tolerances import clear_choices

from .server import Server

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
    model = load(checkpoint, dtype="bfloat16", kv_dtype="fp8")
    clear = [clear_choices(model, output.prompt, output.ids) for output in found]
    assert sum(clear) >= NEW
