"""Prefill and decode speed of this project and of transformers, in one run on this machine.

Each engine runs in a process of its own, one after another, over the same three cases; the table
gives tokens per second and the ratio to transformers (float32: its bfloat16 does not run here).
Rows are appended to benchmarks/results/serving.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from lab.paths import ROOT, STUBS

RESULTS = Path(__file__).parent / "results" / "serving.csv"
DTYPES = ("float32", "bfloat16")
CASES = ((1, 2048), (8, 512), (1, 6000))
"""(requests, prompt tokens)."""
PEER = "transformers-float32"
ENGINES = (PEER, *(f"{e}-{d}" for e in ("local", "vllm", "sglang") for d in DTYPES))


@dataclass(frozen=True)
class Row:
    """Tokens per second of one engine and case."""

    engine: str
    requests: int
    prompt: int
    prefill: float
    decode: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--sglang", default=sys.executable, help="the Python that has SGLang")
    parser.add_argument("--worker", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        for row in _work(args.worker, args.checkpoint):
            print("ROW " + json.dumps(asdict(row)), flush=True)
        return
    rows = [row for engine in args.engines for row in _spawn(engine, args.checkpoint, args.sglang)]
    _report(rows)


def _spawn(engine: str, checkpoint: Path, sglang: str) -> list[Row]:
    python = sglang if engine.startswith("sglang") else sys.executable
    command = [python, "-m", "benchmarks.serving", str(checkpoint), "--worker", engine]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # by default vLLM computes on all cores but one
        "OMP_NUM_THREADS": str(os.cpu_count()),
    }
    if python == sglang:
        environment["PYTHONPATH"] = os.pathsep.join([str(STUBS), str(ROOT)])
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{engine} failed with exit code {done.returncode}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    return [Row(**json.loads(line.removeprefix("ROW "))) for line in lines]


def _report(rows: list[Row]) -> None:
    peers = {(r.requests, r.prompt): r for r in rows if r.engine == PEER}
    print(f"{'engine':22}{'case':>10}{'prefill':>10}{'decode':>9}{'x prefill':>11}{'x decode':>10}")
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
    new = not RESULTS.exists()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", newline="") as file:
        out = csv.writer(file)
        if new:
            out.writerow(["time", "machine", *Row.__annotations__, "x_prefill", "x_decode"])
        for row in rows:
            peer = peers.get((row.requests, row.prompt))
            ratios = [row.prefill / peer.prefill, row.decode / peer.decode] if peer else [0, 0]
            print(
                f"{row.engine:22}{row.requests:>4} x {row.prompt:<4}{row.prefill:>9.0f}"
                f"{row.decode:>9.1f}{ratios[0]:>11.1f}{ratios[1]:>10.1f}"
            )
            machine = f"{platform.machine()} {os.cpu_count()} cores"
            values = [round(v, 2) for v in (row.prefill, row.decode, *ratios)]
            out.writerow([stamp, machine, row.engine, row.requests, row.prompt, *values])


def _work(engine: str, checkpoint: Path) -> list[Row]:
    name, dtype = engine.split("-")
    run = {"transformers": _transformers, "local": _local, "vllm": _vllm, "sglang": _sglang}[name](
        checkpoint, dtype
    )
    rows = []
    for requests, prompt in CASES:
        prefill, decode = run(requests, prompt)
        rows.append(Row(engine, requests, prompt, prefill, decode))
    return rows


Runner = Callable[[int, int], tuple[float, float]]
"""(requests, prompt tokens) -> tokens per second of (prefill, decode)."""


def _prompts(requests: int, length: int) -> list[list[int]]:
    import torch

    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 100000, (requests, length), generator=g).tolist()


def _transformers(checkpoint: Path, dtype: str) -> Runner:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()

    @torch.no_grad()
    def run(requests: int, length: int, steps: int = 4) -> tuple[float, float]:
        ids = torch.tensor(_prompts(requests, length))
        start = time.perf_counter()
        out = model(ids, use_cache=True, logits_to_keep=1)
        prefill = time.perf_counter() - start
        for step in range(steps + 1):
            if step == 1:
                start = time.perf_counter()
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        decode = time.perf_counter() - start
        return requests * length / prefill, requests * steps / decode

    return run


def _local(checkpoint: Path, dtype: str) -> Runner:
    import torch

    from dsv4_plugin import load
    from dsv4_plugin.batch import Batch

    local = load(checkpoint, dtype=dtype)

    @torch.inference_mode()
    def run(requests: int, length: int, steps: int = 32) -> tuple[float, float]:
        prompts = [torch.tensor(p) for p in _prompts(requests, length)]
        everyone = list(range(requests))
        times = []
        for _ in range(2):
            batch = Batch(local.model, local.layout, [length + steps + 1] * requests, 2048)
            start = time.perf_counter()
            token = local.model.head(batch.prefill(prompts)).argmax(-1)
            times.append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(steps):
            token = local.model.head(batch.decode(everyone, token)).argmax(-1)
        decode = time.perf_counter() - start
        return requests * length / min(times), requests * steps / decode

    return run


def _vllm(checkpoint: Path, dtype: str) -> Runner:
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(checkpoint),
        dtype=dtype,
        max_model_len=8192,
        max_num_batched_tokens=2048,
        max_num_seqs=16,
        kv_cache_memory_bytes=2 << 30,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )

    core = engine.llm_engine

    def once(prompts: list[list[int]], tokens: int) -> tuple[float, float]:
        """Seconds until every request has its first token, and from there to the end."""
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = first = time.perf_counter()
        waiting = {f"{start}-{i}" for i in range(len(prompts))}
        for name, prompt in zip(sorted(waiting), prompts, strict=True):
            core.add_request(name, {"prompt_token_ids": prompt}, params)
        while core.has_unfinished_requests():
            answered = {out.request_id for out in core.step()}
            if waiting:
                waiting -= answered
                first = time.perf_counter()
        return first - start, time.perf_counter() - first

    def run(requests: int, length: int, steps: int = 32) -> tuple[float, float]:
        prompts = _prompts(requests, length)
        once(prompts, 2)
        times = [once(prompts, 1 + steps) for _ in range(2)]
        prefill, decode = (min(t) for t in zip(*times, strict=True))
        return requests * length / prefill, requests * steps / decode

    return run


def _sglang(checkpoint: Path, dtype: str) -> Runner:
    from sglang import Engine

    engine = Engine(
        model_path=str(checkpoint),
        device="cpu",
        dtype=dtype,
        chunked_prefill_size=2048,
        max_total_tokens=16384,
        max_running_requests=8,
        disable_radix_cache=True,
        skip_tokenizer_init=True,
        log_level="warning",
    )

    def once(prompts: list[list[int]], tokens: int) -> float:
        sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
        start = time.perf_counter()
        engine.generate(input_ids=prompts, sampling_params=sampling)
        return time.perf_counter() - start

    def run(requests: int, length: int, steps: int = 32) -> tuple[float, float]:
        prompts = _prompts(requests, length)
        once(prompts, 2)
        first, all_tokens = (min(once(prompts, n) for _ in range(2)) for n in (1, 1 + steps))
        return requests * length / first, requests * steps / (all_tokens - first)

    return run


if __name__ == "__main__":
    main()
