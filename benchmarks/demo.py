"""A server on a checkpoint, one streamed chat with the openai client, and a clean stop."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI

QUESTION = "In one sentence: what does a sliding window see?"
START_LIMIT = 300.0
"""Seconds a server may take to become healthy."""
VLLM_FLAGS = (
    "--tokenizer-mode deepseek_v4 --tool-call-parser deepseek_v4 --reasoning-parser deepseek_v4 "
    "--enable-auto-tool-choice --max-model-len 4096 --kv-cache-memory-bytes 500000000 "
    "--max-num-seqs 16 --enforce-eager"
)
SGLANG_FLAGS = (
    "--device cpu --dtype float32 --max-total-tokens 8192 --max-running-requests 8 "
    "--sleep-on-idle --reasoning-parser deepseek-v4 --tool-call-parser deepseekv4"
)
STUBS = Path(__file__).parents[1] / "tests" / "sglang" / "stubs"
"""Stand-ins for CUDA packages that SGLang imports on a CPU too."""


@contextmanager
def server(engine: str, checkpoint: Path, log: Path) -> Iterator[str]:
    """A server on a free local port: its base URL; ended by its own process group."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command, environment = _command(engine, checkpoint.resolve())
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "deepseek-v4"]
    environment |= {"HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            env=os.environ | environment,
            cwd=log.parent,
            start_new_session=True,
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _command(engine: str, checkpoint: Path) -> tuple[list[str], dict[str, str]]:
    """The server's command line and what it needs in the environment."""
    if engine == "vllm":
        vllm = str(Path(sys.executable).parent / "vllm")
        return [vllm, "serve", str(checkpoint), *VLLM_FLAGS.split()], {}
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint)]
    environment = {"PYTHONPATH": str(STUBS.resolve()), "OMP_NUM_THREADS": "1"}
    return command + SGLANG_FLAGS.split(), environment


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    limit = time.monotonic() + START_LIMIT
    while time.monotonic() < limit:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with exit code {process.returncode}; see {log}")
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    raise SystemExit(f"the server was not healthy after {START_LIMIT:.0f} s; see {log}")


def chat(url: str, question: str, tokens: int) -> None:
    """Ask once, print the answer as it streams, then tokens per second."""
    client = OpenAI(base_url=url, api_key="none")
    print(f"\nYou: {question}\nDeepSeek-V4 (random weights): ", end="", flush=True)
    start, first, used = time.perf_counter(), 0.0, 0
    stream = client.chat.completions.create(
        model="deepseek-v4",
        messages=[{"role": "user", "content": question}],
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"chat_template_kwargs": {"thinking": False}},
    )
    for chunk in stream:
        if chunk.usage is not None:
            used = chunk.usage.completion_tokens
        for choice in chunk.choices:
            first = first or time.perf_counter() - start
            print(choice.delta.content or "", end="", flush=True)
    seconds = time.perf_counter() - start - first
    print(f"\n\nfirst token after {first:.2f} s, then {(used - 1) / seconds:.1f} tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--engine", choices=("vllm", "sglang"), default="vllm")
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    log = args.checkpoint.resolve().parent / f"demo-{args.engine}.log"
    print(f"starting {args.engine} on {args.checkpoint} (log: {log}) ...", flush=True)
    with server(args.engine, args.checkpoint, log) as url:
        print("\n".join(line for line in log.read_text().splitlines() if "dsv4-plugin" in line))
        chat(url, QUESTION, args.tokens)
    print("server stopped")


if __name__ == "__main__":
    main()
