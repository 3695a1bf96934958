"""dsv4-mini in float32 through four engines: held-out conversations, the same greedy ids.

    python -m tests.compare_mini CHECKPOINT --sglang PYTHON

Each engine runs in a process of its own. Where an engine's answer leaves transformers', the two
tokens are scored by transformers on what came before: below TIE there was nothing to choose between
them, anything else is a failure. (After a tie the answers go separate ways.)
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from itertools import zip_longest
from pathlib import Path

from dsv4_plugin.tools.conversations import SKILLS, held_out
from lab.engines import EOS, Setting, ask
from tests.sglang.reference import Reference
from tests.sglang.server import Output
from training.data import Renderer

ENGINES = ("local", "vllm", "sglang")
MOST = 128
"""Tokens of an answer."""
TIE = 1e-5
"""Difference of two tokens' log-probabilities."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    sglang = {"type": os.path.abspath, "default": sys.executable}
    parser.add_argument("--sglang", **sglang, help="the Python that has SGLang")
    parser.add_argument("--conversations", type=int, default=100)
    args = parser.parse_args()
    renderer = Renderer()
    drawn = zip(*(held_out(skill, args.conversations) for skill in SKILLS), strict=True)
    conversations = [c for some in drawn for c in some][: args.conversations]
    prompts = [renderer.prompt(c) for c in conversations]
    answers = {}
    for engine in ("transformers", *args.engines):
        start = time.monotonic()
        python = args.sglang if engine == "sglang" else sys.executable
        found = ask(engine, args.checkpoint, Setting("float32"), prompts, MOST, python)
        answers[engine] = found.ids
        tokens = sum(map(len, found.ids))
        ended = sum(ids[-1] == EOS for ids in found.ids)
        print(
            f"{engine}: {len(prompts)} answers, {tokens} tokens, {ended} ended by the model, "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )
    reference = Reference(args.checkpoint)
    differing = 0
    for i, prompt in enumerate(prompts):
        for engine in args.engines:
            found, expected = answers[engine][i], answers["transformers"][i]
            if found == expected:
                continue
            gap, place = difference(reference, prompt, expected, found)
            differing += gap >= TIE
            print(
                f"{i} ({conversations[i].skill}) {engine}: token {place} is "
                f"{found[place : place + 1]}, transformers' {expected[place : place + 1]}; "
                f"log-probabilities {gap:.1e} apart" + ("" if gap >= TIE else ", a tie")
            )
    same = all(answers[engine] == answers["transformers"] for engine in args.engines)
    print("all answers are the same" if same else f"{differing} differ, beyond ties")
    raise SystemExit(1 if differing else 0)


def difference(
    reference: Reference, prompt: list[int], expected: list[int], found: list[int]
) -> tuple[float, int]:
    """How far apart transformers holds the first two tokens that differ, and where they are.

    An answer that ends where the other goes on is infinitely far from it.
    """
    pairs = enumerate(zip_longest(expected, found))
    place = next(i for i, (a, b) in pairs if a != b)
    if place >= min(len(expected), len(found)):
        return float("inf"), place
    before = [*prompt, *expected[:place]]
    gaps = [
        reference.errors(Output(before, ids[place : place + 1], [], 0))[0]
        for ids in (expected, found)
    ]
    return abs(gaps[0] - gaps[1]), place


if __name__ == "__main__":
    main()
