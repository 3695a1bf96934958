"""PTX text to a list of instructions, as far as Triton's output goes: one entry, no calls."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

SPECIAL = {"tid", "ctaid", "ntid", "nctaid", "laneid", "warpid"}


@dataclass(frozen=True)
class Type:
    """kind: u, s, b (bits), f, B (bfloat16) or p (predicate); width in bits."""

    kind: str
    width: int


@cache
def type_of(suffix: str) -> Type:
    """The type an opcode's suffix names: packed pairs are bits."""
    named = {
        "pred": Type("p", 1),
        "bf16": Type("B", 16),
        "f16x2": Type("b", 32),
        "bf16x2": Type("b", 32),
        "u16x2": Type("b", 32),
        "s16x2": Type("b", 32),
        "f32x2": Type("b", 64),
    }
    return named.get(suffix) or Type(suffix[0], int(suffix[1:]))


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Special:
    name: str


@dataclass(frozen=True)
class Immediate:
    bits: int


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter, or the one shared-memory array."""

    name: str


@dataclass(frozen=True)
class Vector:
    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Memory:
    base: Operand
    offset: int


Operand = Register | Special | Immediate | Symbol | Vector | Memory


@dataclass(frozen=True)
class Instruction:
    """op: the opcode split at its dots. predicate: register name or None; negated: run if false."""

    op: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    text: str


@dataclass(frozen=True)
class Program:
    """params: (type, name) in order. labels: index of the instruction that follows."""

    name: str
    params: list[tuple[str, str]]
    instructions: list[Instruction]
    labels: dict[str, int]
    widths: dict[str, int]

    @cache  # noqa: B019  (programs live as long as the kernels they belong to)
    def width(self, register: str) -> int:
        """Bits of a register's storage."""
        if register in self.widths:
            return self.widths[register]
        stem = re.match(r"[a-zA-Z_]+", register)
        assert stem
        return self.widths[stem[0] + "*"]

    @property
    def atomics(self) -> bool:
        """On global memory."""
        return any(i.op[0] in ("atom", "red") and "shared" not in i.op for i in self.instructions)

    def __hash__(self) -> int:
        return id(self)


def parse(text: str) -> Program:
    """Raises ValueError where the text holds no entry."""
    entry = re.search(r"\.entry\s+([\w$]+)", text)
    if entry is None:
        raise ValueError("the PTX text has no .entry")
    name = entry[1]
    head = text[entry.start() :]
    opening = head.index("{")
    pattern = r"\.param\s+\.(\w+)[^,\n]*?\b(" + re.escape(name) + r"_param_\d+)"
    params = re.findall(pattern, head[:opening])
    reader = _Reader()
    for line in re.sub(r"//[^\n]*", "", _body(head[opening:])).split("\n"):
        reader.line(line.strip())
    return Program(name, params, reader.finished(), reader.labels, reader.widths)


def _body(text: str) -> str:
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return text[1:i]
    raise ValueError("the PTX entry is not closed")


class _Reader:
    """Lines to statements, declarations and labels."""

    def __init__(self) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.widths: dict[str, int] = {}

    def line(self, line: str) -> None:
        while label := re.match(r"([$\w]+):\s*", line):
            self.labels[label[1]] = len(self.instructions)
            line = line[label.end() :]
        line = line.strip()
        if line.startswith(("{", "}")):  # scopes of inline assembly
            line = line[1:].strip()
        if line.startswith(".reg"):
            self._registers(line)
        elif line and not line.startswith("."):
            for statement in line.rstrip("}").split(";"):
                if statement.strip():
                    self.instructions.append(_instruction(statement.strip()))

    def _registers(self, line: str) -> None:
        declared = re.match(r"\.reg\s+\.(\w+)\s+(.*);", line)
        assert declared
        width = max(type_of(declared[1]).width, 8)
        for name in declared[2].split(","):
            many = re.match(r"%?(\w+)<\d+>", name.strip())
            self.widths[many[1] + "*" if many else name.strip().lstrip("%")] = width

    def finished(self) -> list[Instruction]:
        return [self._resolve(i) for i in self.instructions]

    def _resolve(self, i: Instruction) -> Instruction:
        """Inline assembly names registers without '%'."""
        if i.op[0] == "bra":
            return i
        operands = tuple(self._register(o) for o in i.operands)
        return Instruction(i.op, operands, i.predicate, i.negated, i.text)

    def _register(self, o: Operand) -> Operand:
        if isinstance(o, Vector):
            return Vector(tuple(self._register(p) for p in o.parts))
        if isinstance(o, Memory):
            return Memory(self._register(o.base), o.offset)
        if isinstance(o, Symbol):
            numbered = re.match(r"([a-zA-Z_]+)\d+$", o.name)
            if o.name in self.widths or (numbered and numbered[1] + "*" in self.widths):
                return Register(o.name)
        return o


def _instruction(text: str) -> Instruction:
    predicate, negated, rest = None, False, text
    guard = re.match(r"@(!?)%?(\w+)\s+(.*)", text, re.S)
    if guard:
        negated, predicate, rest = bool(guard[1]), guard[2], guard[3]
    parts = re.match(r"([\w.:]+)\s*(.*)", rest, re.S)
    assert parts, text
    op = tuple(parts[1].replace("shared::cta", "shared").split("."))
    return Instruction(op, tuple(_operands(parts[2])), predicate, negated, text)


def _operands(text: str) -> Iterable[Operand]:
    depth, start = 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            yield _operand(text[start:i])
            start = i + 1
    if text[start:].strip():
        yield _operand(text[start:])


def _operand(text: str) -> Operand:
    text = text.strip()
    if text[0] == "{":
        return Vector(tuple(_operands(text[1:-1])))
    if text[0] == "[":
        memory = re.match(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        assert memory, text
        return Memory(_operand(memory[1]), int(memory[2], 0) if memory[2] else 0)
    if text[0] == "%":
        name = text[1:]
        return Special(name) if name.split(".")[0] in SPECIAL else Register(name)
    if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}|0[dD][0-9A-Fa-f]{16}", text):
        return Immediate(int(text[2:], 16))
    if re.fullmatch(r"-?(0[xX])?[0-9a-fA-F]+U?", text) and (text[0].isdigit() or text[0] == "-"):
        return Immediate(int(text.rstrip("U"), 0))
    return Symbol(text)
