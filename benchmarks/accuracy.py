"""dsv4-mini's accuracy per skill on held-out conversations, through the engines and formats.

An answer is right if its content and its calls (names, arguments, order) are; reasoning may differ.
Each variant runs in a process of its own. Rows are appended to benchmarks/results/accuracy.csv.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from shutil import rmtree
from typing import Any

from dsv4_plugin.chat import Encoder, Message, StreamParser, TokenBytes, collect
from dsv4_plugin.config import ModelConfig
from training.skills import SKILLS, Conversation, held_out, remembered

RESULTS = Path(__file__).parent / "results" / "accuracy.csv"
DISTANCES = (200, 1000, 4000)
"""Tokens between what is said and the question about it."""
EFFORTS = ("none", "high", "max")
MOST = 128
"""Tokens of an answer."""
BATCH = 25
VARIANTS: dict[str, dict[str, Any]] = {
    "local-float32": {"dtype": "float32"},
    "local-bfloat16": {"dtype": "bfloat16"},
    "local-fp8-kv": {"dtype": "bfloat16", "kv_dtype": "fp8"},
    "local-fp8-kv-fp4-indexer": {"dtype": "bfloat16", "kv_dtype": "fp8", "index_dtype": "fp4"},
    "local-fp8-weights": {"dtype": "bfloat16", "convert": "base"},
    "local-fp8-fp4-weights": {"dtype": "bfloat16", "kv_dtype": "fp8", "convert": "fp8-fp4"},
    "local-mtp": {"dtype": "bfloat16", "drafts": 1},
    "vllm-float32": {"dtype": "float32"},
    "vllm-bfloat16": {"dtype": "bfloat16"},
    "vllm-fp8-kv": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
}

Generate = Callable[[Sequence[list[int]]], list[list[int]]]
"""Prompts -> greedy answers, eos included."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--count", type=int, default=100, help="conversations per skill")
    parser.add_argument("--distances", nargs="*", type=int, default=DISTANCES)
    parser.add_argument("--worker", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print("ROW " + json.dumps(_work(args)), flush=True)
        return
    if not ModelConfig.from_pretrained(args.checkpoint).num_nextn_predict_layers:
        args.variants = [v for v in args.variants if "drafts" not in VARIANTS[v]]
    for i, variant in enumerate(args.variants):
        row = _spawn(variant, args)
        _report(variant, row, args, header=i == 0)


def _spawn(variant: str, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.accuracy", str(args.checkpoint)]
    command += ["--worker", variant, "--count", str(args.count), "--distances"]
    command += map(str, args.distances)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    rows = [line for line in done.stdout.splitlines() if line.startswith("ROW ")]
    if done.returncode or not rows:
        raise SystemExit(f"{variant} failed with exit code {done.returncode}")
    return dict(json.loads(rows[0].removeprefix("ROW ")))


def _report(variant: str, row: dict[str, float], args: argparse.Namespace, header: bool) -> None:
    """Accuracies in percent; reasoning lengths in tokens."""
    if header:
        print(f"{'':26}" + "".join(f"{name:>12}" for name in row))
    print(f"{variant:26}" + "".join(f"{value:12.1f}" for value in row.values()), flush=True)
    new = not RESULTS.exists()
    RESULTS.parent.mkdir(exist_ok=True)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
    with RESULTS.open("a", newline="") as file:
        out = csv.writer(file)
        if new:
            out.writerow(["time", "variant", "count", "measure", "value"])
        out.writerows([stamp, variant, args.count, name, value] for name, value in row.items())


def _work(args: argparse.Namespace) -> dict[str, float]:
    name = args.worker.partition("-")[0]
    options = dict(VARIANTS[args.worker])
    checkpoint = _converted(args.checkpoint, options.pop("convert", None))
    generate = {"local": _local, "vllm": _vllm}[name](checkpoint, options)
    judge = Judge(args.checkpoint)
    row = {}
    for skill in SKILLS:
        if skill not in ("memory", "effort"):
            row[skill] = judge.accuracy(generate, list(held_out(skill, args.count)))
    for distance in args.distances:
        row[f"memory@{distance}"] = judge.accuracy(
            generate, list(remembered(args.count, distance, judge.tokens))
        )
    for effort in EFFORTS:
        some = [c for c in held_out("effort", 4 * args.count) if c.effort == effort][: args.count]
        row[f"effort={effort}"] = judge.accuracy(generate, some)
        row[f"tokens@{effort}"] = judge.reasoning_tokens
    return row


class Judge:
    """Compares answers with the right ones; `reasoning_tokens` is the last comparison's mean."""

    def __init__(self, checkpoint: Path) -> None:
        self.encoder = Encoder.from_pretrained(checkpoint)
        self.bytes = TokenBytes(self.encoder.tokenizer)
        self.reasoning_tokens = 0.0

    def tokens(self, c: Conversation) -> int:
        return len(self.prompt(c))

    def prompt(self, c: Conversation) -> list[int]:
        return self.encoder.encode(
            c.messages[:-1],
            c.tools,
            thinking=c.thinking,
            effort=c.effort,
            response_format=c.response_format,
        ).ids

    def accuracy(self, generate: Generate, conversations: list[Conversation]) -> float:
        """Percent of right answers."""
        conversations.sort(key=self.tokens)
        right = reasoning = 0
        for start in range(0, len(conversations), BATCH):
            some = conversations[start : start + BATCH]
            answers = generate([self.prompt(c) for c in some])
            for c, ids in zip(some, answers, strict=True):
                message = self.parse(c, ids)
                right += self.fits(c, message)
                reasoning += len(self.encoder.ids([message.reasoning or ""]))
        self.reasoning_tokens = reasoning / len(conversations)
        return 100 * right / len(conversations)

    def parse(self, c: Conversation, ids: list[int]) -> Message:
        parser = StreamParser(c.thinking, c.tools, self.bytes)
        return collect([*parser.feed_ids(ids), *parser.finish("stop")])

    def fits(self, c: Conversation, message: Message) -> bool:
        right = c.messages[-1]
        calls = [(call.name, _object(call.arguments)) for call in message.tool_calls]
        wanted = [
            (call["function"]["name"], json.loads(call["function"]["arguments"]))
            for call in right.get("tool_calls", ())
        ]
        return calls == wanted and (message.content or "").strip() == right["content"]


def _object(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _converted(checkpoint: Path, fmt: str | None) -> Path:
    """The checkpoint in another format, made beside it when it is not there yet."""
    if fmt is None:
        return checkpoint
    from dsv4_plugin.checkpoint.convert import convert_checkpoint

    directory = checkpoint.with_name(f"{checkpoint.name}-{fmt}")
    weights = checkpoint / "model.safetensors"
    if directory.exists() and directory.stat().st_mtime < weights.stat().st_mtime:
        rmtree(directory)
    if not directory.exists():
        convert_checkpoint(checkpoint, directory, fmt)
    return directory


def _local(checkpoint: Path, options: dict[str, Any]) -> Generate:
    from dsv4_plugin import load

    drafts = options.pop("drafts", 0)
    model = load(checkpoint, mtp=drafts > 0, **options)
    return lambda prompts: model.generate(prompts, MOST, num_speculative_tokens=drafts)


def _vllm(checkpoint: Path, options: dict[str, Any]) -> Generate:
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(checkpoint),
        max_model_len=8192,
        max_num_batched_tokens=2048,
        max_num_seqs=BATCH,
        kv_cache_memory_bytes=1 << 30,
        skip_tokenizer_init=True,
        **options,
    )
    params = SamplingParams(temperature=0, max_tokens=MOST, stop_token_ids=[1], detokenize=False)

    def generate(prompts: Sequence[list[int]]) -> list[list[int]]:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [list(o.outputs[0].token_ids) for o in engine.generate(inputs, params)]

    return generate


if __name__ == "__main__":
    main()
