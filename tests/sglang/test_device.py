"""The adapter as on a GPU, with the emulator in the GPU's place: chunks, a batch, decoding."""

from __future__ import annotations

from dsv4_plugin import load
from tests.conftest import random_ids
from tests.tolerances import clear_choices

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


def test_the_server_gives_torch_s_tokens(serve, tiny):
    """Greedy tokens of three requests; where two logits nearly tie, either may be chosen."""
    prompts = [random_ids(n, seed=n).tolist() for n in (5, 140, 20)]
    with serve(*OPTIONS, testing="emulate", environ={"DSV4_KERNELS": "triton"}) as server:
        found = server.generate_all(prompts, NEW, at_once=3, logprobs=False)
        assert "Triton" in server.read_log()
    model = load(tiny, dtype="bfloat16", kv_dtype="fp8")
    clear = [clear_choices(model, output.prompt, output.ids) for output in found]
    assert sum(clear) >= NEW
