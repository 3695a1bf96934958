"""Mistakes put into kernels one at a time: each has to make a test fail.

    python -m tests.triton.mutants [name ...]

A mutant runs in a copy of the tree, in the strict interpreter or, where only compiled code shows
the mistake, emulated.
"""

# ruff: noqa: E501  (MUTANTS is a table)

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.paths import ROOT

KERNELS = "dsv4_plugin/kernels"


@dataclass(frozen=True)
class Mutant:
    """In `file` (of KERNELS), `old` becomes `new`; tests/triton/test_{test}.py must fail, those
    that `only` names (pytest's -k). compiled: as emulated sm80 code."""

    name: str
    file: str
    old: str
    new: str
    test: str
    only: str = ""
    compiled: bool = False


DEVICE, STEP, QKV = "device.py", "step/kernel.py", "qkv/kernel.py"
COMPRESS, STREAMS, GATE = "compress/kernel.py", "streams/kernel.py", "gate/kernel.py"
EXPERTS, PACKED = "experts/kernel.py", "packed/kernel.py"
ATTENTION, INDEX, BITS = "paged_attention/kernel.py", "paged_index/kernel.py", "bits.py"
ARRIVAL, FUSED = "arrival.py", "../model/fused.py"

MUTANTS = [
    # Masks and guards
    Mutant("padding rows get a position", STEP, "tl.where(real, position, -1)", "position", "step"),
    Mutant("rows past the end are placed", STEP, "inside & (row <", "inside | (row <", "step"),
    Mutant("holes get an address", STEP, "number >= 0, address, -1", "number >= -9, address, -1", "step"),
    Mutant("rows without a slot are written", QKV, "if row >= 0:", "if row >= -1:", "qkv"),
    Mutant("heads past the last", QKV, "if head < H:", "if head <= H:", "qkv"),
    Mutant("the ring is read in every window", COMPRESS, "kept = used & middle\n        top", "kept = used & (middle | True)\n        top", "compress", "hca"),
    Mutant("columns past the last", STREAMS, "used = (n < N)[None, :] & (d < D)[:, None]", "used = (n < N)[None, :] & (d < D + 9)[:, None]", "streams"),
    Mutant("experts past the last compete", GATE, "tl.where(e < E, (ordered", "tl.where(e < E + 1, (ordered", "gate"),
    Mutant("no guard for a block that nobody sees", ATTENTION, 'safe = tl.where(top == float("-inf"), 0.0, top)', "safe = top", "paged_attention", "decode"),
    Mutant("entries that do not exist yet are seen", ATTENTION, "sees = i[None, :] < seen[:, None]", "sees = i[None, :] <= seen[:, None]", "paged_attention", "prefill"),
    Mutant("entries that a row does not see are chosen", INDEX, "seen = tl.minimum((tl.load(position + t) + 1) // RATIO, n)", "seen = n", "paged_index", "topk"),
    Mutant("rows of no pair are stored", EXPERTS, "tl.store(at, gate, mask=real[:, None] &", "tl.store(at, gate, mask=(pair[:, None] >= 0) &", "experts", "nobody or one_expert"),
    Mutant("rows of nobody are added", EXPERTS, "here = (id >= 0) & (id < E)", "here = id < E", "experts", "nobody"),
    Mutant("outputs past the last", PACKED, "used = (n < N)[:, None] & (word < K // 4)[None, :]", "used = (n < N + 9)[:, None] & (word < K // 4)[None, :]", "experts", "packed_product and fp8"),
    # Off by one
    Mutant("the window is one too long", ATTENTION, "(i[None, :] > pos[:, None] - SPAN)", "(i[None, :] >= pos[:, None] - SPAN)", "paged_attention", "prefill or tiles"),
    Mutant("an entry closes a token late", COMPRESS, "(begin + R <= end)", "(begin + R < end)", "compress", "csa"),
    Mutant("early windows are too few", COMPRESS, "early = begin + HALVES", "early = begin + HALVES - 1", "compress", "csa"),
    Mutant("the ring's row after, not before", COMPRESS, "(first + RING_ROWS - 1) % RING_ROWS", "first % RING_ROWS", "compress", "drafts"),
    Mutant("one choice too few", GATE, "for i in tl.static_range(K):", "for i in tl.static_range(K - 1):", "gate"),
    Mutant("one Sinkhorn turn too few", STREAMS, "for _ in range(1, iters):", "for _ in range(2, iters):", "streams", "2-4-72"),
    Mutant("a search turn too few", STEP, "SEARCH = 16", "SEARCH = 3", "step"),
    Mutant("a block too few", EXPERTS, "+ (M - 1)) // M", "+ (M - 2)) // M", "experts", "place"),
    Mutant("blocks of the expert before", EXPERTS, "first = tl.sum(tl.where(number < e,", "first = tl.sum(tl.where(number < e - 1,", "experts", "place"),
    # Wrong index
    Mutant("scales start a word late", DEVICE, "word = PLAIN // 4 + (D - PLAIN) // 2 + tl", "word = PLAIN // 4 + (D - PLAIN) // 2 + 1 + tl", "qkv"),
    Mutant("scales of the wrong blocks", ATTENTION, "(b % 4) * 8", "(b % 2) * 8", "paged_attention", "decode"),
    Mutant("the angles of the next pair", DEVICE, "cis + even_at - PLAIN + 1", "cis + even_at - PLAIN + 2", "qkv"),
    Mutant("rows and columns of the mixing change places", STREAMS, "r[None, None, :] * R + r[None, :, None]", "r[None, :, None] * R + r[None, None, :]", "streams", "2-4-72"),
    Mutant("the other half is pooled", COMPRESS, "token += (HALVES - 1) * C", "token += 0 * C", "compress", "csa"),
    Mutant("ties go to the higher entry", GATE, "| (EXPERTS - 1 - e)", "| e", "gate"),
    Mutant("the key's scale is dropped", INDEX, "0) * scale\n", "0) * 256.0\n", "paged_index", "scores"),
    Mutant("choices of another row", ATTENTION, "at = chosen + first.to(tl.int64) * choices + i", "at = chosen + i", "paged_attention", "decode"),
    Mutant("nibbles change places", PACKED, "even = tl.join(tl.join(k0, k4)", "even = tl.join(tl.join(k4, k0)", "experts", "every_code"),
    Mutant("the scale of the next block", PACKED, "* (COUNT // 4) + word[None, :]", "* (COUNT // 4) + 0 * word[None, :]", "experts", "every_code"),
    Mutant("one scale for all rows", PACKED, "at = n // HEIGHT *", "at = n // 128 *", "experts", "grouped"),
    Mutant("weights of the first choice", EXPERTS, "tl.load(weight + pair,", "tl.load(weight + pair // PAIRS * PAIRS,", "experts", "plain"),
    # Arithmetic that is nearly right
    Mutant("a scale by multiplication", BITS, "(bits & 0x7FFFFF) > 0x600000", "(bits & 0x7FFFFF) >= 0x600000", "kit"),
    Mutant("ties of e4m3 away from zero", BITS, "size + 0x7FFFF + ((size >> 20) & 1)", "size + 0x80000", "kit"),
    Mutant("no rounding to the model's dtype", QKV, "(x.to(tl.float32) * rms * w).to(kind).to(tl.float32)", "x.to(tl.float32) * rms * w", "qkv", "real"),
    Mutant("multiply-adds are fused", QKV, "enable_fp_fusion=False", "enable_fp_fusion=True", "qkv", "real", compiled=True),
    Mutant("a carry is not packed", COMPRESS, "top = tl.where(stored, lse, top + log(safe))", "top = tl.where(stored, lse, top)", "compress", "csa"),
    Mutant("segments after a carry do not wait", COMPRESS, "begin += left.to(tl.int32)", "begin += 0", "compress", "filled"),
    Mutant("segments after a carry are left out", COMPRESS, "(opens <= its_end)", "(opens < 0)", "compress", "filled"),
    Mutant("only one segment after a carry is taken", COMPRESS, "& (who > after)", "& (who > 9 * after + 9)", "compress", "filled"),
    Mutant("the weights' middle part is dropped", STREAMS, "                total = tl.dot(x, middle, total)\n", "", "streams", "4096 or 264"),
    Mutant("the sink is left out", ATTENTION, "total = tl.full((M,), 1.0, tl.float32)", "total = tl.full((M,), 0.0, tl.float32)", "paged_attention", "prefill"),
    Mutant("the limit bounds the gate below too", EXPERTS, "gate = tl.minimum(gate.to(x.dtype.element_ty).to(tl.float32), limit)", "gate = tl.maximum(tl.minimum(gate.to(x.dtype.element_ty).to(tl.float32), limit), -limit)", "experts", "plain"),
    Mutant("the tensor's scale is dropped", PACKED, "one *= tl.load(top) * FP4_UNIT", "one *= FP4_UNIT", "experts", "packed_product and nvfp4"),
    # Between programs
    Mutant("the last but one goes on", ARRIVAL, "== programs - 1", "== tl.maximum(programs - 2, 0)", "streams", "order"),
    Mutant("counters are not put back", ARRIVAL, "tl.store(counter, 0)", "pass", "streams", "order"),
    Mutant("no barrier before an arrival", ARRIVAL, "    tl.debug_barrier()", "    # tl.debug_barrier()", "streams", "order"),
    Mutant("an arrival orders nothing", ARRIVAL, 'sem="acq_rel"', 'sem="relaxed"', "streams", "order"),
    Mutant("sums are read through L1", STREAMS, 'other=0.0, cache_modifier=".cg")\n    return tl.rsqrt', "other=0.0)\n    return tl.rsqrt", "streams", "order"),
    Mutant("tiles share a counter", STREAMS, "is_last(counter + tl.program_id(0), chunks)", "is_last(counter, chunks)", "streams", "order"),
    Mutant("pieces are merged from the last one's on", ATTENTION, "cell = (t * places + piece) * H + h\n        m =", "cell = (t * places + (piece + tl.program_id(2)) % pieces) * H + h\n        m =", "paged_attention", "order"),
    Mutant("pieces past a row's last are waited for", ATTENTION, "tl.minimum(pieces, step)):", "tl.minimum(places, step)):", "paged_attention", "order"),
    Mutant("head blocks share a counter", ATTENTION, "tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)\n            if", "tl.program_id(0)\n            if", "paged_attention", "decode and 64-fp8-4-512"),
    Mutant("the last program chooses among its own", INDEX, "j < parts * K", "j < K", "paged_index", "many_blocks"),
    # Graphs
    Mutant("attention is captured with its metadata", FUSED, "out = model.attend(x, i)", "out = attend(x, i)", "vllm", compiled=True),
    # Addresses
    Mutant("int32 page addresses", COMPRESS, "number = tl.load(page_table + begin // PAGE).to(tl.int64)", "number = tl.load(page_table + begin // PAGE)", "compress", "gigabytes"),
    Mutant("int32 addresses of experts", EXPERTS, "e = tl.load(expert_of + block).to(tl.int64)", "e = tl.load(expert_of + block)", "experts", "gigabytes"),
    Mutant("int32 window addresses", STEP, "mask=real, other=-1).to(tl.int64)", "mask=real, other=-1)", "step"),
    Mutant("int32 block addresses", ATTENTION, "mask=ok, other=-1).to(tl.int64)\n    ok", "mask=ok, other=-1)\n    ok", "paged_attention", "gigabytes"),
    Mutant("int32 key addresses", INDEX, "number.to(tl.int64) * block_stride", "number * block_stride", "paged_index", "gigabytes"),
]  # fmt: skip


def run(mutant: Mutant, tree: Path) -> str:
    """'' when a test fails as it should, else what went wrong."""
    path = tree / KERNELS / mutant.file
    text = path.read_text()
    if mutant.old not in text:
        return "its text is no longer there"
    path.write_text(text.replace(mutant.old, mutant.new, 1))
    env = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    env |= {"DSV4_TEST_GPU": "sm80"} if mutant.compiled else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    command.append(f"tests/triton/test_{mutant.test}.py")
    if mutant.only:
        command += ["-k", mutant.only]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, timeout=300)
    path.write_text(text)
    if done.returncode == 0:
        return "survived"
    broken = ("SyntaxError", "NameError", "IndentationError", "ImportError", "no tests ran")
    if done.returncode != 1 or any(word in done.stdout for word in broken):
        return "did not run: " + done.stdout[-300:]
    return ""


def main(names: list[str]) -> int:
    """Exit code 1 if a mutant survives."""
    chosen = [m for m in MUTANTS if not names or any(n in m.name for n in names)]
    failures = 0
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        for part in ("dsv4_plugin", "tests", "pyproject.toml"):
            source, target = ROOT / part, tree / part
            target.parent.mkdir(exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        for mutant in chosen:
            start = time.monotonic()
            wrong = run(mutant, tree)
            failures += bool(wrong)
            seconds = time.monotonic() - start
            print(f"{'caught' if not wrong else wrong.upper()}: {mutant.name} ({seconds:.0f} s)")
    print(f"{len(chosen) - failures} of {len(chosen)} mutants caught")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
