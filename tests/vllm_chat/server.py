"""`vllm serve` on the tiny checkpoint, with scripted words, and its log and metrics."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MODEL = "tiny"
LIFETIME = 600
"""Most seconds a test server lives, whatever becomes of the test."""
START = 180
FLAGS = (
    "--dtype float32 --max-model-len 4096 --kv-cache-memory-bytes 500000000 --enforce-eager "
    "--max-num-seqs 16 --tokenizer-mode deepseek_v4 --tool-call-parser deepseek_v4 "
    "--reasoning-parser deepseek_v4 --enable-auto-tool-choice "
    "--logits-processors tests.vllm_chat.script:Script"
)


class Server:
    """A running server: `with Server(checkpoint, log) as server`."""

    def __init__(
        self,
        checkpoint: Path,
        log: Path,
        flags: str = FLAGS,
        environ: dict[str, str] | None = None,
    ) -> None:
        self._environ = environ or {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        program = str(Path(sys.executable).parent / "vllm")
        self._command = ["timeout", str(LIFETIME), "nice", "-n", "5", program, "serve"]
        self._command += [str(checkpoint), "--served-model-name", MODEL, *flags.split()]
        self._command += ["--host", "127.0.0.1", "--port", str(port)]

    def __enter__(self) -> Server:
        environ = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | self._environ
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                self._command, env=environ, stdout=out, stderr=out, start_new_session=True
            )
        limit = time.monotonic() + START
        while time.monotonic() < limit and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
            else:
                return self
        self._stop()
        raise RuntimeError(f"the server did not start:\n{self.read_log()[-5000:]}")

    def __exit__(self, *exception: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        """End the process group that the server leads."""
        for number in (signal.SIGINT, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, number)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                continue
            return

    def read_log(self) -> str:
        return self.log.read_text(errors="replace")

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The decoded answer; an HTTP error's too."""
        request = urllib.request.Request(
            self.url + path,
            json.dumps({"model": MODEL} | body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error) | {"status": error.code}

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        found = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert found, name
        return sum(map(float, found))


def scripted(ids: Sequence[int]) -> dict[str, Any]:
    """Request fields that make the model say `ids`."""
    return {"vllm_xargs": {"script": list(ids)}}
