"""dsv4-mini's accuracy per skill on held-out conversations, through every engine and format.

An answer is right if its content and its calls (names, arguments, order) are; reasoning may differ.
With drafts, which make a full batch slower, a share of the conversations is asked; their answers
are compared with those that the engine gives without. Prints a table in markdown; rows are appended
to benchmarks/results/accuracy.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import rmtree

from dsv4_plugin.chat import Encoder, Message, StreamParser, TokenBytes, collect
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.tools.conversations import SKILLS, Conversation, accepts, held_out, remembered
from dsv4_plugin.tools.convert import convert_checkpoint
from dsv4_plugin.tools.mini import make_mini
from lab.engines import Answers, Setting, ask

RESULTS = Path(__file__).parent / "results" / "accuracy.csv"
DISTANCES = {200: 0.7, 1000: 0.2, 4000: 0.1}
"""Tokens between what is said and the question about it: share of the memory conversations."""
EFFORTS = ("none", "high", "max")
MOST = 128
"""Tokens of an answer."""
DRAFTED = 5
"""With drafts, one conversation of so many is asked."""
PLAIN = "bfloat16"
"""What a variant with drafts is without them."""
FORMATS: dict[str, tuple[Setting, str | None]] = {
    "float32": (Setting("float32"), None),
    "bfloat16": (Setting(), None),
    "fp8-kv": (Setting(kv_dtype="fp8"), None),
    "fp4-indexer": (Setting(kv_dtype="fp8", index_dtype="fp4"), None),
    "fp8-fp4": (Setting(kv_dtype="fp8"), "fp8-fp4"),
    "base": (Setting(kv_dtype="fp8"), "base"),
    "nvfp4": (Setting(kv_dtype="fp8"), "nvfp4"),
    "ct-nvfp4": (Setting(kv_dtype="fp8"), "ct-nvfp4"),
    "ct-w4a16": (Setting(kv_dtype="fp8"), "ct-w4a16"),
    "gptq": (Setting(kv_dtype="fp8"), "gptq"),
    "mtp": (Setting(drafts=1), None),
    "dspark": (Setting(drafts=5), "dspark"),
}
"""Of rows and activations, and of the checkpoint where it is another."""
ENGINES = ("local", "vllm", "sglang")
VARIANTS = [f"{engine}-{fmt}" for engine in ENGINES for fmt in FORMATS]
Test = tuple[str, Conversation]
"""The measure that a conversation counts for, and the conversation."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--count", type=int, default=100, help="conversations per skill")
    parser.add_argument("--sglang", type=os.path.abspath, help="the Python that has SGLang")
    jobs = os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=jobs, help="engines at once")
    args = parser.parse_args()
    judge = Judge(args.checkpoint)
    tests = list(drawn(args.count, judge.tokens))
    prompts = [judge.prompt(c) for _, c in tests]
    left_out = {v: reason for v in args.variants if (reason := why_not(v, args))}
    variants = [v for v in args.variants if v not in left_out]
    for fmt in {FORMATS[v.partition("-")[2]][1] for v in variants}:
        converted(args.checkpoint, fmt)
    print(f"{len(tests)} conversations, {sum(map(len, prompts))} prompt tokens", flush=True)

    def answered(variant: str) -> Answers | RuntimeError:
        engine, _, fmt = variant.partition("-")
        setting, packed = FORMATS[fmt]
        asked = prompts[:: every(variant)]
        python = args.sglang if engine == "sglang" else sys.executable
        checkpoint = converted(args.checkpoint, packed)
        start = time.monotonic()
        try:
            found = ask(engine, checkpoint, setting, asked, MOST, python, max(1, jobs // args.jobs))
        except RuntimeError as error:
            return error
        print(f"{variant}: {time.monotonic() - start:.0f} s", flush=True)
        return found

    rows: dict[str, dict[str, float]] = {}
    known: dict[str, Answers] = {}
    failed = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for variant, answers in zip(variants, pool.map(answered, variants), strict=True):
            if isinstance(answers, Answers):
                known[variant] = answers
                rows[variant] = judge.row(tests[:: every(variant)], answers) | same(variant, known)
                record(variant, args.count // every(variant), rows[variant])
            else:
                failed[variant] = answers
    print("\n" + "\n".join(table(rows)))
    for variant, reason in {**left_out, **failed}.items():
        print(f"{variant} is left out: {reason}")
    raise SystemExit(1 if failed else 0)


def every(variant: str) -> int:
    """One conversation of so many is asked."""
    return DRAFTED if FORMATS[variant.partition("-")[2]][0].drafts else 1


def same(variant: str, known: dict[str, Answers]) -> dict[str, float]:
    """Of answers with drafts, the percent that are token by token those without, if both were
    asked: in bfloat16 another order of a sum may decide between two tokens that are as likely."""
    engine, _, fmt = variant.partition("-")
    plain = known.get(f"{engine}-{PLAIN}")
    if not FORMATS[fmt][0].drafts or plain is None:
        return {}
    pairs = zip(known[variant].ids, plain.ids[:: every(variant)], strict=True)
    found = [with_drafts == without for with_drafts, without in pairs]
    return {"same": 100 * sum(found) / len(found)}


def why_not(variant: str, args: argparse.Namespace) -> str:
    """Why a variant cannot be measured, or nothing."""
    engine, _, fmt = variant.partition("-")
    if engine == "sglang" and fmt == "dspark":
        return "SGLang drafts in blocks on GPUs, with its own network"
    if engine == "vllm" and fmt == "dspark":
        return "vLLM drafts in blocks on GPUs only"
    if engine == "sglang" and args.sglang is None:
        return "--sglang names no Python"
    if fmt == "mtp" and not ModelConfig.from_pretrained(args.checkpoint).num_nextn_predict_layers:
        return "the checkpoint has no MTP layer"
    return ""


def drawn(count: int, tokens: Callable[[Conversation], int]) -> Iterator[Test]:
    """`count` held-out conversations of every skill: memory's by distance in `tokens`, a third of
    effort's for each."""
    for skill in SKILLS:
        if skill == "memory":
            for distance, share in DISTANCES.items():
                some = remembered(max(1, round(share * count)), distance, tokens)
                yield from ((f"memory@{distance}", c) for c in some)
        elif skill == "effort":
            several = list(held_out(skill, 2 * count + 20))
            for effort in EFFORTS:
                some = [c for c in several if c.effort == effort]
                yield from ((f"effort={effort}", c) for c in some[: -(-count // len(EFFORTS))])
        else:
            yield from ((skill, c) for c in held_out(skill, count))


class Judge:
    """Compares answers with the right ones."""

    def __init__(self, checkpoint: Path) -> None:
        self.encoder = Encoder.from_pretrained(checkpoint)
        self.bytes = TokenBytes(self.encoder.tokenizer)

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

    def row(self, tests: list[Test], answers: Answers) -> dict[str, float]:
        """Percent of right answers by measure; for every effort also the reasoning's mean tokens;
        with drafts, the percent of them that held, and a request's tokens in a step."""
        right: dict[str, list[float]] = {}
        for (measure, c), ids in zip(tests, answers.ids, strict=True):
            message = self.parse(c, ids)
            calls = [(call.name, call.arguments) for call in message.tool_calls]
            fits = accepts(c.messages[-1], message.content or "", calls)
            right.setdefault(measure, []).append(100 * fits)
            if c.skill == "effort":
                thought = len(self.encoder.ids([message.reasoning or ""]))
                right.setdefault(f"tokens@{c.effort}", []).append(thought)
        row = {measure: sum(values) / len(values) for measure, values in right.items()}
        if answers.accepted is None or answers.per_step is None:
            return row
        return row | {"drafts": 100 * answers.accepted, "tokens a step": answers.per_step}

    def parse(self, c: Conversation, ids: list[int]) -> Message:
        parser = StreamParser(c.thinking, c.tools, self.bytes)
        return collect([*parser.feed_ids(ids), *parser.finish("stop")])


def table(rows: dict[str, dict[str, float]]) -> list[str]:
    """Lines of markdown, a column for every measure that some row has."""
    measures = list(dict.fromkeys(measure for row in rows.values() for measure in row))
    lines = [f"| | {' | '.join(measures)} |", "|---" * (len(measures) + 1) + "|"]
    for variant, row in rows.items():
        cells = [f"{row[m]:.3g}" if m in row else "" for m in measures]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return lines


def record(variant: str, count: int, row: dict[str, float]) -> None:
    new = not RESULTS.exists()
    RESULTS.parent.mkdir(exist_ok=True)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
    with RESULTS.open("a", newline="") as file:
        out = csv.writer(file)
        if new:
            out.writerow(["time", "variant", "count", "measure", "value"])
        out.writerows([stamp, variant, count, name, round(v, 2)] for name, v in row.items())


def converted(checkpoint: Path, fmt: str | None) -> Path:
    """The checkpoint in another format, or dsv4-mini with its block drafter, made beside it when it
    is not there yet."""
    if fmt is None:
        return checkpoint
    directory = checkpoint.with_name(f"{checkpoint.name}-{fmt}")
    weights = checkpoint / "model.safetensors"
    if directory.exists() and directory.stat().st_mtime < weights.stat().st_mtime:
        rmtree(directory)
    if not directory.exists() and fmt == "dspark":
        make_mini(directory, dspark=True)
    elif not directory.exists():
        convert_checkpoint(checkpoint, directory, fmt)
    return directory


if __name__ == "__main__":
    main()
