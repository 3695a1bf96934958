"""Damages to a checkpoint folder, drawn from a seeded generator.

Not drawn is what nothing can tell from another model: other bytes in a large weight, two tensors of
one shape exchanged, and config.json with another allowed value of a field that no tensor shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

from dsv4_plugin.checkpoint.files import INDEX, read_headers, read_tensor
from dsv4_plugin.checkpoint.names import SCALE
from dsv4_plugin.config import ModelConfig

UNSEEN = (
    "num_experts_per_tok index_topk qk_rope_head_dim sliding_window swiglu_limit "
    "routed_scaling_factor"
)
"""Fields that no tensor shows, and that have more than one allowed value."""
JUNK = (
    *(None, True, False, 0, 1, -1, 2, 3, 127, 10**9, 10**30, -(10**18), 0.5, -0.0, 1e300),
    *(float("nan"), float("inf"), float("-inf"), "", "text", "8", "é\n", "\ud800", "x" * 10_000),
    *([], [1], [None], ["a", "b"], [[[]]], list(range(1000)), {}, {"a": 1}, {"type": "yarn"}),
)
"""Values of every type, for any place in a JSON file."""


def damaged(folder: Path, random: Random) -> str:
    """Damage a folder of links to a checkpoint's files in one place; says how."""
    while True:
        kind = random.choice(KINDS)
        text = kind(folder, random)
        if text is not None:
            return f"{kind.__name__}: {text}"


def write(path: Path, data: bytes) -> None:
    """In place of a link."""
    path.unlink()
    path.write_bytes(data)


def junk(random: Random, value: Any) -> Any:
    """Something else: of another type, or near, or the same as text."""
    near = [str(value)]
    if type(value) in (int, float):
        near += [value + 1, value - 1, -value, 2 * value, float(value), value + 0.5]
    if isinstance(value, list):
        near += [value[:-1], value[::-1], [*value, *value[:1]], [junk(random, v) for v in value]]
    if isinstance(value, dict):
        key = random.choice(list(value) or [""])
        near += [
            {k: v for k, v in value.items() if k != key},
            value | {key: junk(random, value.get(key))},
            value | {f"{key}2": 1},
        ]
    return random.choice([*near, random.choice(JUNK)])


def flipped(data: bytes, random: Random, end: int) -> bytes:
    """One to three bytes of the first `end` changed."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 3)):
        changed[random.randrange(end)] = random.choice(
            [random.randrange(256), *b'0123456789"{}[],:']
        )
    return bytes(changed)


def shard(folder: Path, random: Random) -> tuple[Path, bytes, int]:
    """A file of tensors, its bytes, and how many of them are its header."""
    path = random.choice(sorted(folder.glob("*.safetensors")))
    data = path.read_bytes()
    return path, data, 8 + int.from_bytes(data[:8], "little")


def header_bytes(folder: Path, random: Random) -> str:
    path, data, end = shard(folder, random)
    write(path, flipped(data, random, end))
    return path.name


def lengths(folder: Path, random: Random) -> str:
    path, data, end = shard(folder, random)
    true = end - 8
    new = random.choice([true + 1, true - 1, 0, 1, 2 * true, 1 << 40, (1 << 64) - 1, len(data) - 8])
    write(path, new.to_bytes(8, "little") + data[8:])
    return f"{path.name} has a header of {new}"


def cuts(folder: Path, random: Random) -> str:
    path, data, end = shard(folder, random)
    size = random.choice([0, 1, 7, 8, end, random.randrange(len(data)), len(data) - 1])
    write(path, random.choice([data[:size], data + b"\0", data + data[end:]]))
    return f"{path.name} cut at {size}, or longer"


def header_entry(folder: Path, random: Random) -> str:
    """Offsets, dtypes, shapes, names and anything else in a header's JSON."""
    path, data, end = shard(folder, random)
    header = json.loads(data[8:end])
    name = random.choice(list(header))
    entry = header[name]
    place = random.choice(["entry", "name", "gone", "twice", *entry])
    if place == "entry":
        header[name] = junk(random, entry)
    elif place == "name":
        header[random.choice([f"{name}.", name[:-1], "", "é\n", "__metadata__"])] = header.pop(name)
    elif place == "gone":
        del header[name]
    elif place != "twice":
        header[name] = entry | {place: junk(random, entry[place])}
    text = json.dumps(header)
    if place == "twice":
        text = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(entry)}}}"
    write(path, len(text).to_bytes(8, "little") + text.encode() + data[end:])
    return f"{name}, {place}"


def index_entry(folder: Path, random: Random) -> str:
    index = json.loads((folder / INDEX).read_text())
    files = index["weight_map"]
    name = random.choice(list(files))
    place = random.choice(["file", "entry", "name", "gone", "map", "index", "bytes"])
    if place == "file":
        files[name] = random.choice(
            [*files.values(), "../x", "/dev/zero", "config.json", ".", "\0"]
        )
    elif place == "entry":
        files[name] = junk(random, files[name])
    elif place == "name":
        files[f"{name}2"] = files.pop(name)
    elif place == "gone":
        del files[name]
    elif place == "map":
        index["weight_map"] = junk(random, files)
    elif place == "index":
        index = junk(random, index)
    text = json.dumps(index).encode()
    write(folder / INDEX, flipped(text, random, len(text)) if place == "bytes" else text)
    return f"{name}, {place}"


def config_field(folder: Path, random: Random) -> str | None:
    path = folder / "config.json"
    hf = before = json.loads(path.read_text())
    name = random.choice(list(hf))
    place = random.choice(["value", "value", "value", "gone", "name", "all", "bytes"])
    if place == "value":
        hf = hf | {name: junk(random, hf[name])}
    elif place == "gone":
        hf = {k: v for k, v in hf.items() if k != name}
    elif place == "name":
        hf = {f"{k}s" if k == name else k: v for k, v in hf.items()}
    elif place == "all":
        hf = random.choice(JUNK)
    text = json.dumps(hf).encode()
    text = flipped(text, random, len(text)) if place == "bytes" else text
    if another_model(before, text):
        return None
    write(path, text)
    return f"{name}, {place}: {text.decode(errors='replace') if place == 'bytes' else hf!r:.300}"


def another_model(before: dict[str, Any], text: bytes) -> bool:
    try:
        config = ModelConfig.from_hf(json.loads(text))
    except (ValueError, RecursionError):
        return False
    true = ModelConfig.from_hf(before)
    return any(getattr(config, name) != getattr(true, name) for name in UNSEEN.split())


def values(folder: Path, random: Random) -> str | None:
    """Not numbers, or numbers that cannot be, in a small tensor."""
    headers = read_headers(folder)
    name = random.choice(list(headers))
    info, tensor = headers[name], read_tensor(headers[name]).clone()
    flat = tensor.view(-1)
    where = random.randrange(len(flat))
    if name.endswith("tid2eid"):
        flat[where] = random.choice([-1, 8, 1 << 40, -(1 << 62)])
    elif name.endswith("weight_shape"):
        flat[where] = random.choice([0, -1, 1 << 40, int(flat[where]) + 1])
    elif SCALE.fullmatch(name) and random.random() < 0.3:
        flat.zero_()
    elif SCALE.fullmatch(name) and tensor.dtype == torch.uint8:
        flat[where] = 255
    elif tensor.is_floating_point():
        flat[where] = random.choice([float("nan"), float("inf"), -float("inf")])
    else:
        return None
    data = bytearray(info.file.read_bytes())
    data[info.offset : info.offset + info.nbytes] = flat.view(torch.uint8).numpy().tobytes()
    write(info.file, bytes(data))
    return name


KINDS: list[Callable[[Path, Random], str | None]] = [
    header_bytes, lengths, cuts, header_entry, header_entry, index_entry, config_field,
    config_field, values,
]  # fmt: skip
