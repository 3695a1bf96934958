"""SGLang servers for tests, and requests to them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FLOAT32 = ("--dtype=float32", "--chunked-prefill-size=256")
PARSERS = ("--reasoning-parser=deepseek-v4", "--tool-call-parser=deepseekv4")
LIFETIME = 900
"""Most seconds a test server lives, whatever becomes of the test."""


@dataclass(frozen=True)
class Output:
    """A greedy generation: prompt and generated ids, their logprobs (empty where not asked for),
    and how many prompt tokens came from the cache."""

    prompt: list[int]
    ids: list[int]
    logprobs: list[float]
    cached: int


class Server:
    """A running server: `with Server(directory, "--page-size=128") as server`.

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
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self.command = [
            "timeout", "--foreground", str(LIFETIME), "nice", "-n", "5",
            sys.executable, "-m", "sglang.launch_server",
            "--host=127.0.0.1", f"--port={port}", f"--model-path={directory}",
            "--device=cpu", "--sleep-on-idle", "--log-level=info", *options,
        ]  # fmt: skip
        paths = [HERE / "stubs", HERE / "plugin"]
        self.environ = os.environ | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "DSV4_TESTING": testing,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            **(environ or {}),
        }

    def __enter__(self) -> Server:
        self.launch()
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
            else:
                return self
        self.stop()
        raise RuntimeError(f"the server did not start:\n{self.read_log()[-5000:]}")

    def launch(self) -> None:
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                self.command,
                env=self.environ,
                cwd=self.log.parent,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def __exit__(self, *exception: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server by its own process id; it takes its children along."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def read_log(self) -> str:
        return self.log.read_text(errors="replace")

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The decoded JSON answer (None where it is empty). Raises RuntimeError with the server's
        text on an HTTP error."""
        with self._open(path, body) as answer:
            return json.loads(answer.read() or "null")

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The JSON of each server-sent event."""
        with self._open(path, body | {"stream": True}) as answer:
            for line in answer:
                data = line.decode().strip().removeprefix("data: ")
                if data.startswith("{"):
                    yield json.loads(data)

    def _open(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            return urllib.request.urlopen(request, timeout=300)
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{error.code}: {error.read().decode()}") from None

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
