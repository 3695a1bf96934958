"""What drafts are worth: tokens per step and per second of dsv4-mini's answers, with MTP, with
DSpark and without, for few and many requests, in one run on this machine.

    python -m benchmarks.drafts .cache/checkpoints/mini .cache/checkpoints/mini-dspark

A step with drafts takes longer than one without (`x step`): drafting takes time, and so do the rows
that are verified. Drafts pay where a step brings more tokens than that: `x speed` is tokens per
step by `x step`. One thread computes, and its own seconds count, so that other work on the machine
does not. Rows are appended to benchmarks/results/drafts.csv.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import time
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import torch

from benchmarks.accuracy import Judge
from dsv4_plugin import load
from dsv4_plugin.batch import Sampler
from dsv4_plugin.engine import LocalModel
from dsv4_plugin.speculate import Speculator
from dsv4_plugin.tools.conversations import SKILLS, held_out

RESULTS = Path(__file__).parent / "results" / "drafts.csv"
REQUESTS = (1, 4, 16)
MOST = 96
"""Tokens of an answer."""
CHUNK = 1024
DRAFTS = {
    "none": (0, 0.0),
    "mtp-1": (1, 0.0),
    "mtp-2": (2, 0.0),
    "dspark-3": (3, 0.0),
    "dspark-5": (5, 0.0),
    "dspark-5 sure": (5, 0.8),
}
"""Tokens drafted, and the confidence below which a draft is not looked at."""


@dataclass(frozen=True)
class Row:
    """Of decoding alone: steps count once for each request that is in them."""

    drafts: str
    requests: int
    accepted: float
    per_step: float
    seconds_per_step: float

    @property
    def per_second(self) -> float:
        return self.requests * self.per_step / self.seconds_per_step


class Timed:
    """Answers to prompts with a time for every step."""

    def __init__(self, model: LocalModel, n: int, confidence: float) -> None:
        self.model, self.n = model, n
        self.speculator = Speculator(model, n, confidence) if n else None

    @torch.inference_mode()
    def __call__(self, prompts: list[list[int]], most: int) -> tuple[list[list[int]], float]:
        start = time.process_time()
        if self.speculator is None:
            found = self.model.generate(prompts, most, chunk=CHUNK)
        else:
            found = self.speculator.generate(prompts, most, Sampler(0.0, None), CHUNK, False)
        return found, time.process_time() - start


def measured(name: str, timed: Timed, groups: list[list[list[int]]]) -> Row:
    """Of groups of prompts, each in flight at once."""
    speculator, steps, seconds, tokens = timed.speculator, 0, 0.0, 0
    timed(groups[0], 2)
    if speculator:
        speculator.steps = speculator.accepted = speculator.drafted = 0
    for prompts in groups:
        first = timed(prompts, 1)[1]
        counted = (speculator.steps, speculator.accepted) if speculator else (0, 0)
        answers, all_of_it = timed(prompts, MOST)
        new = sum(len(answer) - 1 for answer in answers)
        steps += speculator.steps - counted[0] if speculator else new
        seconds += all_of_it - first
        tokens += new
    requests = len(groups[0])
    accepted = speculator.accepted / speculator.drafted if speculator else 0.0
    return Row(name, requests, accepted, tokens / steps, seconds * requests / steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mini", type=Path)
    parser.add_argument("dspark", type=Path, help="mini with its block drafter")
    parser.add_argument("--groups", type=int, default=24, help="requests in all, of each case")
    args = parser.parse_args()
    torch.set_num_threads(1)
    judge = Judge(args.mini)
    conversations = [c for skill in SKILLS for c in held_out(skill, 4)]
    prompts = [judge.prompt(c) for c in conversations[:: max(1, len(conversations) // 16)]]
    models = {
        "mtp": load(args.mini, "bfloat16", mtp=True),
        "dspark": load(args.dspark, "bfloat16", mtp=True),
    }
    for requests in REQUESTS:
        asked = list(islice(cycle(prompts), max(args.groups, requests)))
        groups = [asked[i : i + requests] for i in range(0, len(asked) - requests + 1, requests)]
        plain: Row | None = None
        for name, (n, confidence) in DRAFTS.items():
            model = models["dspark" if name.startswith("dspark") else "mtp"]
            row = measured(name, Timed(model, n, confidence), groups)
            plain = plain or row
            report(row, plain)


def report(row: Row, plain: Row) -> None:
    """A line of the table, and of the file."""
    step = row.seconds_per_step / plain.seconds_per_step
    speed = row.per_second / plain.per_second
    print(
        f"{row.requests:>3} requests, {row.drafts:14}: {100 * row.accepted:3.0f} % accepted, "
        f"{row.per_step:.2f} tokens a step, x step {step:.2f}, {row.per_second:6.1f} tokens/s, "
        f"x speed {speed:.2f}",
        flush=True,
    )
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        out = csv.writer(file)
        if new:
            out.writerow(
                ["time", "machine", "requests", "drafts", "accepted", "tokens a step", "x step",
                 "tokens/s", "x speed"]
            )  # fmt: skip
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
        machine = f"{platform.machine()} {os.cpu_count()} cores"
        values = [round(v, 3) for v in (row.accepted, row.per_step, step, row.per_second, speed)]
        out.writerow([stamp, machine, row.requests, row.drafts, *values])


if __name__ == "__main__":
    main()
