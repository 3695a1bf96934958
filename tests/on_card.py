"""Everything that wants a GPU, one after the other, into one JSON file.

    python -m tests.on_card [--quick] [--out gpu-test.json]     # `make test-gpu`

The kernels' tests on the device; `dsv4 gpu-check`; dsv4-mini's greedy answers through the local
engine and, where vLLM is installed, through vLLM without graphs and with them, beside the CPU's in
float32. What fails does not end the rest.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsv4_plugin import load
from dsv4_plugin.tools.conversations import SKILLS, held_out
from dsv4_plugin.tools.mini import make_mini
from lab.paths import ROOT
from training.data import Renderer

ANSWERS, MOST = 40, 128
"""Conversations, and tokens of an answer."""
ENGINES = ("local", "vllm-eager", "vllm-graphs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="of gpu-check; fewer tests")
    parser.add_argument("--out", default="gpu-test.json")
    parser.add_argument("--ask", nargs=3, metavar=("ENGINE", "CHECKPOINT", "FILE"))
    args = parser.parse_args()
    if args.ask:
        engine, checkpoint, file = args.ask
        Path(file).write_text(json.dumps(ask(engine, checkpoint)))
        return
    if not torch.cuda.is_available():
        raise SystemExit("tests.on_card needs a GPU that torch can use; torch.cuda finds none")
    steps = run(args.quick, args.out)
    print("\n".join(f"{'ok    ' if s['ok'] else 'FAILED'} {s['name']}: {s['said']}" for s in steps))
    raise SystemExit(not all(s["ok"] for s in steps))


def run(quick: bool, out: str) -> list[dict[str, Any]]:
    """Every step: its name, whether it was right, what it said last, and its seconds."""
    steps: list[dict[str, Any]] = []

    def step(name: str, command: Sequence[str], **environ: str) -> dict[str, Any]:
        start = time.monotonic()
        done = subprocess.run(
            command, env=os.environ | environ, cwd=ROOT, capture_output=True, text=True
        )
        lines = (done.stdout.strip() or done.stderr.strip()).splitlines() or [""]
        found = {"name": name, "ok": done.returncode == 0, "said": lines[-1][:300]}
        found |= {"seconds": round(time.monotonic() - start, 1)}
        if not found["ok"]:
            found["tail"] = (done.stdout + done.stderr)[-4000:]
        steps.append(found)
        Path(out).write_text(json.dumps(steps, indent=1))
        return found

    python = sys.executable
    some = ["tests/triton/test_step.py", "tests/triton/test_gate.py"] if quick else ["tests/triton"]
    step("kernels' tests", [python, "-m", "pytest", "-q", *some], DSV4_TEST_GPU="device")
    check = step(
        "gpu-check",
        [python, "-c", "import sys; from dsv4_plugin.tools.cli import main; sys.exit(main())",
         "gpu-check", *["--quick"] * quick],
    )  # fmt: skip
    if (ROOT / "gpu-check.json").exists():
        check["result"] = json.loads((ROOT / "gpu-check.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "mini"
        make_mini(checkpoint)
        expected = ask("cpu", str(checkpoint))
        for engine in ENGINES:
            if engine != "local" and importlib.util.find_spec("vllm") is None:
                continue
            file = Path(folder) / f"{engine}.json"
            asked = [python, "-m", "tests.on_card", "--ask", engine, str(checkpoint), str(file)]
            found = step(f"answers, {engine}", asked, DSV4_MODEL="plugin", HF_HUB_OFFLINE="1")
            if found["ok"]:
                found |= judged(expected, json.loads(file.read_text()))
    Path(out).write_text(json.dumps(steps, indent=1))
    return steps


def judged(expected: list[list[int]], found: list[list[int]]) -> dict[str, Any]:
    """Bfloat16 may leave float32 at a near tie: nine of ten have to be the same."""
    same = sum(a == b for a, b in zip(expected, found, strict=True))
    return {"ok": 10 * same >= 9 * len(expected), "said": f"{same} of {len(expected)} as the CPU's"}


def prompts() -> list[list[int]]:
    renderer = Renderer()
    drawn = zip(*(held_out(skill, ANSWERS) for skill in SKILLS), strict=True)
    return [renderer.prompt(c) for some in drawn for c in some][:ANSWERS]


def ask(engine: str, checkpoint: str) -> list[list[int]]:
    """Greedy ids of every answer: on the CPU in float32, on the GPU in bfloat16 with fp8 rows."""
    if engine == "cpu":
        return load(checkpoint, dtype="float32").generate(prompts(), MOST)
    if engine == "local":
        model = load(checkpoint, dtype="bfloat16", kv_dtype="fp8", device="cuda")
        return model.generate(prompts(), MOST)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(
        checkpoint, skip_tokenizer_init=True, dtype="bfloat16", kv_cache_dtype="fp8",
        max_model_len=8192, max_num_seqs=64, gpu_memory_utilization=0.2, seed=0,
        enforce_eager=engine == "vllm-eager",
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=MOST, detokenize=False)
    asked = [{"prompt_token_ids": p} for p in prompts()]
    return [list(o.outputs[0].token_ids) for o in llm.generate(asked, params, use_tqdm=False)]


if __name__ == "__main__":
    main()
