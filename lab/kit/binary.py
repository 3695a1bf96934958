"""What a compiled kernel takes: registers, spills, shared memory, instructions.

The disassembler and the assembler come with Triton; no CUDA toolkit is needed.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = 16
"""Bytes of one, on NVIDIA GPUs since Volta."""
NARROW = r"(global|buffer)_load_([us]?byte|[us]?short)"
MMA = ("HMMA", "QMMA", "IMMA", "HGMMA", "QGMMA", "UTCHMMA", "UTCQMMA", "v_mfma")


@dataclass(frozen=True)
class Resources:
    """registers, spill (bytes per thread, stored or of scratch), shared (bytes of a block);
    instructions by name; loop_spills: spill instructions inside loops; narrow_loads: global
    loads of fewer than 4 bytes, which nothing loads ahead of time; loop: instructions by name of
    the innermost loop that multiplies most, or else is longest; mma: tensor-core instructions."""

    registers: int
    spill: int
    shared: int
    instructions: Counter[str]
    loop_spills: int
    narrow_loads: int
    loop: Counter[str]

    @property
    def mma(self) -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith(MMA))

    def of(self, *prefixes: str) -> int:
        return sum(n for name, n in self.instructions.items() if name.startswith(prefixes))


def resources(kernels: Sequence[Any]) -> list[Resources]:
    """Of kernels compiled by Triton for one target, NVIDIA or AMD, in order."""
    if kernels and "cubin" in kernels[0].asm:
        return [_nvidia(k, lines) for k, lines in zip(kernels, sass(kernels), strict=True)]
    return [_amd(k) for k in kernels]


def _nvidia(kernel: Any, sass: Sequence[Line]) -> Resources:
    with tempfile.NamedTemporaryFile() as cubin:
        Path(cubin.name).write_bytes(kernel.asm["cubin"])
        usage = _run("cuobjdump", "--dump-resource-usage", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    names = Counter(line.name for line in sass)
    loops = _loops(sass)
    in_loops = Counter(line.name for line in {line for loop in loops for line in loop})
    return Resources(
        registers=int(found[1]),
        spill=int(found[2]),
        shared=kernel.metadata.shared,
        instructions=names,
        loop_spills=sum(n for name, n in in_loops.items() if name.startswith(("LDL", "STL"))),
        narrow_loads=sum(
            n for k, n in names.items() if k.startswith("LDG") and re.search(r"\.[US](8|16)", k)
        ),
        loop=_main(loops),
    )


def _run(tool: str, *args: str) -> str:
    return subprocess.run([TOOLS / tool, *args], capture_output=True, text=True, check=True).stdout


class Line(NamedTuple):
    """guard: the predicate under which it is executed, as "@!P0 "; "": always."""

    address: int
    name: str
    operands: str
    guard: str = ""


def sass(kernels: Sequence[Any]) -> list[list[Line]]:
    """All kernels' code is disassembled as one: the tool takes 0.3 s to start."""
    arch = re.search(r"\.target sm_(\w+)", kernels[0].asm["ptx"])
    assert arch
    codes = [_code(k.asm["cubin"]) for k in kernels]
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(b"".join(codes))
        text = _run("nvdisasm", "--binary", f"SM{arch[1]}", file.name)
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)(.*)"
    found = [
        Line(int(at, 16), name, operands, guard)
        for at, guard, name, operands in re.findall(pattern, text)
    ]
    assert len(found) * INSTRUCTION == sum(map(len, codes)), "instructions that were not read"
    lines = iter(found)
    return [list(islice(lines, len(code) // INSTRUCTION)) for code in codes]


def _code(cubin: bytes) -> bytes:
    """The one section of code in an ELF file."""
    (headers,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<I20xQQ", cubin, headers + i * size) for i in range(count)]
    (code,) = (
        cubin[at : at + length]
        for name, at, length in sections
        if cubin.startswith(b".text.", sections[names][1] + name)
    )
    return code


def _loops(sass: Sequence[Line]) -> list[list[Line]]:
    """Of each backward branch, what leads to it from its target on. A branch that is also reached
    otherwise than through its target closes no loop: it leads back from where the compiler puts
    what is seldom executed, behind the program's end."""
    before: dict[int, list[int]] = {line.address: [] for line in sass}
    targets = {line.address: _target(line) for line in sass}
    for line, after in pairwise(sass):
        if not _ends(line):
            before[after.address].append(line.address)
    for address, target in targets.items():
        if target in before:
            before[target].append(address)
    found = []
    for address, target in targets.items():
        if target is None or target >= address:  # a jump to itself ends the program
            continue
        inside, open_ = {target}, [address]
        while open_:
            at = open_.pop()
            if at not in inside:
                inside.add(at)
                open_ += before[at]
        if target == sass[0].address or sass[0].address not in inside:
            found.append([line for line in sass if line.address in inside])
    return found


def _target(line: Line) -> int | None:
    """Of a branch."""
    found = re.search(r"\b0x([0-9a-f]+)\s*;", line.operands)
    return int(found[1], 16) if found and line.name.startswith("BRA") else None


def _ends(line: Line) -> bool:
    """Is nothing executed behind it? A condition is a guard, or of a warp the first operand."""
    always = not line.guard and "," not in line.operands
    return always and line.name.split(".")[0] in ("BRA", "BRX", "JMP", "RET", "EXIT")


def _main(loops: Sequence[Sequence[Line]]) -> Counter[str]:
    """Of loops around one another the inner one multiplies as much in fewer instructions. (Those of
    tcgen05 do not say how much.)"""
    named = [Counter(line.name for line in loop) for loop in loops]

    def order(loop: Counter[str]) -> tuple[int, int, int]:
        tensor = sum(n for name, n in loop.items() if name.startswith(MMA))
        return multiply_adds(loop), tensor, -loop.total() if tensor else loop.total()

    return max(named, key=order, default=Counter())


def multiply_adds(instructions: Mapping[str, int]) -> int:
    """A warp's on tensor cores, by the shapes in the instructions' names."""
    total = 0
    for name, count in instructions.items():
        if not name.startswith(MMA):
            continue
        of_four_warps = re.search(r"\.(\d+)x(\d+)x(\d+)", name)
        of_one = re.search(r"\.168(\d+)", name)
        if of_four_warps:
            m, n, k = map(int, of_four_warps.groups())
            total += count * m * n * k // 4
        elif of_one:
            total += count * 16 * 8 * int(of_one[1])
    return total


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
        narrow_loads=sum(n for k, n in names.items() if re.match(NARROW, k)),
        loop=Counter(),
    )
