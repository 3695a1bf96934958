"""What a compiled kernel takes: registers, spills, shared memory, instructions.

The disassembler and the assembler come with Triton; no CUDA toolkit is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MMA = ("HMMA", "QMMA", "IMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "v_mfma")


@dataclass(frozen=True)
class Resources:
    """registers, spill (bytes per thread, stored or of scratch), shared (bytes of a block);
    instructions by name; loop_spills: spill instructions inside loops; byte_loads: global loads
    of single bytes; mma: tensor-core instructions."""

    registers: int
    spill: int
    shared: int
    instructions: Counter[str]
    loop_spills: int
    byte_loads: int

    @property
    def mma(self) -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith(MMA))

    def of(self, *prefixes: str) -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith(prefixes))


def resources(kernel: Any) -> Resources:
    """Of a kernel compiled by Triton, for NVIDIA or AMD."""
    return _nvidia(kernel) if "cubin" in kernel.asm else _amd(kernel)


def _nvidia(kernel: Any) -> Resources:
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", cubin)
        text = _run("nvdisasm", "-c", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    names, in_loops = _sass(text)
    return Resources(
        registers=int(found[1]),
        spill=int(found[2]),
        shared=kernel.metadata.shared,
        instructions=names,
        loop_spills=sum(n for name, n in in_loops.items() if name.startswith(("LDL", "STL"))),
        byte_loads=sum(
            n for k, n in names.items() if k.startswith("LDG") and re.search(r"\.[US]8", k)
        ),
    )


def _run(tool: str, *args: str | Path) -> str:
    return subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True).stdout


def _sass(text: str) -> tuple[Counter[str], Counter[str]]:
    """Instructions by name: all, and those between a backward branch and its target."""
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        code = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line)
        if code:
            target = re.search(r"`\((\.L_x_\d+)\)", code[2])
            if code[1].startswith("BRA") and target and target[1] in labels:
                first = labels[target[1]]
                if first < len(names):  # a jump to itself ends the program
                    loops.append((first, len(names)))
            names.append(code[1])
    inside = {j for first, last in loops for j in range(first, last + 1)}
    return Counter(names), Counter(names[j] for j in inside)


def _amd(kernel: Any) -> Resources:
    text = kernel.asm["amdgcn"]

    def number(pattern: str) -> int:
        found = re.search(pattern, text)
        return int(found[1]) if found else 0

    lines = [line.split()[0] for line in text.splitlines() if re.match(r"\s+[a-z]+_\w+", line)]
    names = Counter(lines)
    return Resources(
        registers=number(r"\.vgpr_count:\s+(\d+)"),
        spill=number(r"\.private_segment_fixed_size:\s+(\d+)"),
        shared=kernel.metadata.shared,
        instructions=names,
        loop_spills=sum(n for k, n in names.items() if k.startswith("scratch_")),
        byte_loads=sum(
            n for k, n in names.items() if re.match(r"(global|buffer)_load_[us]byte", k)
        ),
    )
