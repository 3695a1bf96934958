"""SGLang servers for tests, and greedy generations from them."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lab import server
from lab.paths import ROOT, STUBS

HERE = Path(__file__).parent
FLOAT32 = ("--dtype=float32", "--chunked-prefill-size=256")
PARSERS = ("--reasoning-parser=deepseek-v4", "--tool-call-parser=deepseekv4")


@dataclass(frozen=True)
class Output:
    """A greedy generation: prompt and generated ids, their logprobs (empty where not asked for),
    and how many prompt tokens came from the cache."""

    prompt: list[int]
    ids: list[int]
    logprobs: list[float]
    cached: int


class Server(server.Server):
    """A running server: `with Server(directory, "--page-size=128", log=log) as running`.

    Args:
        testing: what the test plugin does, see plugin/dsv4_testing.py.
        environ: further environment variables.
    """

    def __init__(
        self,
        directory: Path,
        *options: str,
        log: Path,
        testing: str = "poison",
        environ: dict[str, str] | None = None,
        python: str = sys.executable,
    ) -> None:
        command = [
            python, "-m", "sglang.launch_server", f"--model-path={directory}",
            "--device=cpu", "--sleep-on-idle", "--log-level=info", *options,
        ]  # fmt: skip
        paths = [STUBS, HERE / "plugin", ROOT]
        common = {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "DSV4_TESTING": testing,
            "OMP_NUM_THREADS": "1",
            # A health check generates a token by default, which takes emulated kernels seconds.
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
        }
        super().__init__(command, log, common | (environ or {}))

    def generate(self, prompt: list[int], n: int, logprobs: bool = True) -> Output:
        """A greedy generation of n tokens. (SGLang mixes batches only without logprobs.)"""
        sampling = {"temperature": 0, "max_new_tokens": n, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": logprobs}
        answer = self.post("/generate", body)
        meta = answer["meta_info"]
        found = [entry[0] for entry in meta.get("output_token_logprobs", ())]
        return Output(prompt, answer["output_ids"], found, meta["cached_tokens"])

    def generate_all(
        self, prompts: list[list[int]], n: int, at_once: int, logprobs: bool = True
    ) -> list[Output]:
        """Greedy generations of n tokens, `at_once` requests in flight."""
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(lambda prompt: self.generate(prompt, n, logprobs), prompts))
