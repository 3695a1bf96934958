"""dsv4-mini in vLLM's and SGLang's servers on this machine, measured by `dsv4 bench`: one page.

`--native` adds the engines' own V4; where one does not start, the page says why.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path

from benchmarks import demo
from dsv4_plugin.tools.bench import page
from dsv4_plugin.tools.bench.report import Run, code, machine, path_of, runs_in
from dsv4_plugin.tools.bench.server import Facts
from dsv4_plugin.tools.cli import main as dsv4
from lab.server import MODEL

RESULTS = Path(__file__).parent / "results" / "bench-serve"
NAMES = {"vllm": "vLLM", "sglang": "SGLang"}
FLAGS = {
    "vllm": "--dtype bfloat16",
    "sglang": "--dtype bfloat16 --max-total-tokens 32768 --enable-metrics",
}
"""Beside the demo's: the same number format in both, and SGLang counts its cache hits."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--sglang", type=os.path.abspath, help="the Python that has SGLang")
    parser.add_argument("--native", action="store_true", help="the engines' own V4 too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--concurrency", default="1,2,4,8")
    parser.add_argument("--dataset", default="random")
    parser.add_argument("--input-len", default="256")
    parser.add_argument("--output-len", default="64")
    parser.add_argument("--requests", default="32")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob("*.json"):
        old.unlink()
    bad = 0
    for engine in NAMES if args.sglang else ["vllm"]:
        for whose in ("plugin", "native") if args.native else ("plugin",):
            bad |= measure(args, engine, whose)
    print("\n".join(map(str, page.write(runs_in(args.out), args.out))))
    return bad


def measure(args: argparse.Namespace, engine: str, whose: str) -> int:
    """A server's life, and the exit code. The plugin's has to serve; of the engine's own V4 the
    page says why it does not."""
    label = f"{NAMES[engine]}-{whose}"
    log = args.checkpoint.resolve().parent / f"bench-serve-{engine}-{whose}.log"
    python = args.sglang if engine == "sglang" else sys.executable
    server = demo.server(engine, args.checkpoint.resolve(), log, python, FLAGS[engine])
    server.environ["DSV4_MODEL"] = whose
    flags = demo.VLLM_FLAGS if engine == "vllm" else demo.SGLANG_FLAGS
    print(f"{label}: starting (log: {log}) ...", flush=True)
    command = [
        "--label", label, "--out", str(args.out), "--concurrency", args.concurrency,
        "--dataset", args.dataset, "--input-len", args.input_len, "--output-len", args.output_len,
        "--requests", args.requests, "--note", f"DSV4_MODEL={whose} {flags} {FLAGS[engine]}",
    ]  # fmt: skip
    try:
        with server:
            found = dsv4(["bench", f"{server.url}/v1", *command])
    except RuntimeError:
        if whose == "plugin":
            raise
        found = None
    if whose == "plugin" or path_of(args.out, label).exists():
        return int(found or 0)
    why = f"the server {'did not start' if found is None else 'answers no request'}: {reason(log)}"
    print(f"{label}: {why}", flush=True)
    started = time.strftime("%Y-%m-%dT%H:%M:%S")
    facts = Facts(engine, "", MODEL, None)
    Run(label, started, {}, facts, machine(True), code(), (), why).save(args.out)
    return 0


def reason(log: Path) -> str:
    """The first error of a log, which the later ones follow from; for one that says nothing the
    line of code that raised it."""
    before = ""
    for line in log.read_text(errors="replace").splitlines():
        found = re.search(r"\b(?:\w*Error|\w*Exception)(?:: .+|$)", line)
        if found and "WARNING" not in line:
            return (found[0] if ": " in found[0] else f"{found[0]}: {before}")[:200]
        if line.strip(" ^~"):
            before = line.strip()
    return "see its log"


if __name__ == "__main__":
    raise SystemExit(main())
