"""A server in a process group of its own, and requests to it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MODEL = "deepseek-v4"
"""The name under which checkpoints are served."""
LIFETIME = 900
START = 300
"""Seconds it may take to become healthy."""


class Server:
    """A running server: `with Server(command, log) as server`.

    Args:
        command: without `--host` and `--port`, which name a free local port.
        log: file that takes its output.
        environ: further environment variables. The plugin's network serves unless DSV4_MODEL says
            otherwise, also where `auto` would leave it to the engine, as on CPUs with AMX.

    lifetime: seconds it lives at most, whatever becomes of the test.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environ: dict[str, str] | None = None
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self.lifetime = LIFETIME
        self.command = ["nice", "-n", "5", *command, "--host=127.0.0.1", f"--port={port}"]
        self.environ = {"DSV4_MODEL": "plugin"} | os.environ | {"HF_HUB_OFFLINE": "1"}
        # Else vLLM closes an idle connection after 5 s, perhaps just when a client asks again.
        self.environ |= {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600"} | (environ or {})

    def __enter__(self) -> Server:
        self.launch()
        try:
            self._wait()
        except BaseException:  # Ctrl-C, too, after which nobody would end it.
            self.stop()
            raise
        return self

    def _wait(self) -> None:
        limit = time.monotonic() + START
        while time.monotonic() < limit and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.5)
            else:
                return
        raise RuntimeError(f"the server did not start:\n{self.read_log()[-5000:]}")

    def launch(self) -> None:
        """Start the process; `with` also waits until it is healthy."""
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                ["timeout", "--foreground", str(self.lifetime), *self.command],
                env=self.environ,
                cwd=self.log.parent,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __exit__(self, *exception: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process group that the server leads."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, number)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                continue
            return

    def read_log(self) -> str:
        return self.log.read_text(errors="replace")

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The decoded JSON answer (None where it is empty). Raises RuntimeError with the status
        and the server's text on an HTTP error."""
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

    def metric(self, name: str, path: str = "/metrics") -> float:
        """The sum of a metric over its labels."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            text = answer.read().decode()
        found = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
        assert found, name
        return sum(map(float, found))
