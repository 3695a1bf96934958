"""Safetensors folders: headers, a check that reads no weights, and tensors one at a time."""

from __future__ import annotations

import logging
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dsv4_plugin.checkpoint.names import (
    EXPERT,
    GATE,
    Stored,
    as_found,
    is_for_images,
    is_order,
    is_unread_scale,
    stored_tensors,
    with_drafter,
    with_int4,
)
from dsv4_plugin.checkpoint.spelling import natives
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.json_file import LARGEST, as_object, parse_json, printable, read_object, shown

log = logging.getLogger("dsv4_plugin")

INDEX = "model.safetensors.index.json"
MTP = "mtp."
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.uint8,
    "U8": torch.uint8,
    "F8_E4M3": torch.uint8,
    "F8_E8M0": torch.uint8,
}
"""safetensors' dtypes as they are read: one-byte formats as raw bytes, never as values."""


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is; dtype is safetensors' name (BF16, F32, I64, ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_headers(directory: str | Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint folder, from the files' headers alone.

    Raises:
        FileNotFoundError: no safetensors files, or one that the index names is missing.
        ValueError: a truncated or unreadable file.
    """
    directory = Path(directory)
    index = _read_index(directory / INDEX) if (directory / INDEX).is_file() else {}
    single = directory / "model.safetensors"
    if index:
        files = [directory / name for name in sorted(set(index.values()))]
    else:
        files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory} has no *.safetensors files")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {INDEX} names it")
        for name, info in _read_header(file).items():
            if name in tensors:
                other = tensors[name].file.name
                raise ValueError(
                    f"{printable(name)} is in {other} and in {file.name}; allowed is one"
                )
            tensors[name] = info
    for name, where in index.items():
        if name in tensors and tensors[name].file.name != where:
            found = tensors[name].file.name
            raise ValueError(f"{printable(name)} is in {found}; {INDEX} says {where}")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name. Raises ValueError."""
    files = as_object(read_object(path).get("weight_map"), f"{path}: weight_map")
    for name, file in files.items():
        plain = isinstance(file, str) and file.isprintable() and len(file) <= 255
        if not plain or Path(file).name != file:
            raise ValueError(
                f"{path}: weight_map.{printable(name)} is {shown(file)}; it must be the name of a "
                "file beside it"
            )
    if not files:
        raise ValueError(f"{path}: weight_map is empty; it must name the file of every tensor")
    return files


def _read_header(file: Path) -> dict[str, TensorInfo]:
    """What safetensors' own reader demands: tensors lie side by side and fill the file."""
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{file} is truncated: {size} bytes do not hold its header")
        if length > LARGEST:
            raise ValueError(f"{file} has a header of {length:,} bytes; allowed are {LARGEST:,}")
        header = as_object(parse_json(f.read(length), f"{file}: the header"), f"{file}: the header")
    notes = as_object(header.pop("__metadata__", {}), f"{file}: __metadata__")
    if not all(isinstance(note, str) for note in notes.values()):
        raise ValueError(f"{file}: __metadata__ is {shown(notes)}; its values must be text")
    first = 8 + length
    found = [_tensor_info(file, name, info, first) for name, info in header.items()]
    end = first
    for name, info in sorted(found, key=lambda pair: (pair[1].offset, pair[1].nbytes)):
        if info.offset != end:
            raise ValueError(
                f"{file}: {printable(name)} begins at byte {info.offset - first} of the data; "
                f"the tensor before it ends at {end - first}"
            )
        end += info.nbytes
    if size != end:
        fault = "is truncated" if size < end else "is longer than its header says"
        raise ValueError(f"{file} {fault}: {size} bytes, the header asks for {end}")
    return dict(found)


def _tensor_info(file: Path, name: str, info: Any, first: int) -> tuple[str, TensorInfo]:
    """An entry of a header, as read. Raises ValueError."""
    match info:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]} if (
            len(shape) <= 8 and all(type(n) is int and n >= 0 for n in shape) and 0 <= begin <= end
        ):
            return name, TensorInfo(file, dtype, tuple(shape), first + begin, end - begin)
    raise ValueError(
        f"{file}: {printable(name)} is {shown(info)}; it must have a dtype (text), a shape (a list "
        "of sizes) and data_offsets (begin and end)"
    )


def check_checkpoint(
    config: ModelConfig, directory: str | Path, mtp: bool = False
) -> dict[str, TensorInfo]:
    """Check every tensor's presence, shape and dtype before any weight is read; return the headers
    by the authors' names.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the first tensors that are missing, misshapen, of a wrong dtype or unexpected.
    """
    found = natives(config, read_headers(directory))
    problems = list(problems_of(config, found, mtp))
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        named = "; ".join(problems[:3])
        raise ValueError(f"checkpoint {directory} does not fit its config.json: {named}{more}")
    return found


def problems_of(
    config: ModelConfig, found: Mapping[str, TensorInfo], mtp: bool = False
) -> Iterator[str]:
    """What does not fit config.json, a sentence per tensor: gates of another number of experts,
    missing ones, misshapen ones and those of a wrong dtype, unexpected ones; the drafter's too,
    where it is wanted."""
    config = with_int4(with_drafter(config, found) if mtp else config, found)
    dtypes = {name: info.dtype for name, info in found.items()}
    expected = as_found(config, stored_tensors(config, mtp), dtypes)
    yield from _other_gates(config, expected, found)
    yield from (f"{name} is missing" for name in expected if name not in found)
    for name, stored in expected.items():
        info = found.get(name)
        if info is None:
            continue
        if info.dtype not in stored.dtypes:
            allowed = " or ".join(stored.dtypes)
            variant = _variant(config)
            yield f"{name} is {printable(info.dtype)}, config.json ({variant}) asks for {allowed}"
        elif info.shape != stored.shape and {info.shape, stored.shape} != {(), (1,)}:
            asked = list(stored.shape)
            yield f"{name} has shape {shown(list(info.shape))}, config.json asks for {asked}"
        elif info.nbytes != prod(info.shape) * DTYPES[info.dtype].itemsize:
            yield f"{name} has {info.nbytes} bytes, which is not what its shape and dtype need"
    yield from _mixed_scales(expected, found)
    yield from (
        f"{printable(name)} is unexpected"
        for name in found
        if name not in expected
        and (mtp or not name.startswith(MTP))
        and not is_for_images(config, name)
        and not is_unread_scale(expected, name)
        and not is_order(expected, name)
    )


def _mixed_scales(expected: Mapping[str, Stored], found: Mapping[str, TensorInfo]) -> Iterator[str]:
    """GPTQ's, of the experts of a layer: they lie in one tensor, as they are."""
    first: dict[tuple[str, str], str] = {}
    for name in expected:
        if name.endswith(".scales") and name in found and (expert := EXPERT.fullmatch(name)):
            other = first.setdefault((expert[1], expert[3]), found[name].dtype)
            if found[name].dtype != other:
                yield f"{name} is {printable(found[name].dtype)}, other experts' are {other}"


def _other_gates(
    config: ModelConfig, expected: Mapping[str, Stored], found: Mapping[str, TensorInfo]
) -> Iterator[str]:
    """Said first: experts that were pruned otherwise leave thousands of tensors over or missing."""
    for name in expected:
        if name.endswith(GATE) and name in found and found[name].shape:
            rows = found[name].shape[0]
            if rows != config.n_routed_experts:
                yield (
                    f"{name} is of {rows:,} experts, n_routed_experts is {config.n_routed_experts}"
                )


def _variant(config: ModelConfig) -> str:
    if config.experts == "plain":
        return "no quantization_config"
    if config.experts == "gptq":
        return "int4 in GPTQ's layout"
    return f"FP8 with {config.experts.upper()} experts"


def read_tensors(
    headers: Mapping[str, TensorInfo], progress: bool = True, mtp: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The main model's tensors, or the drafter's instead, one at a time, file by file.

    One-byte formats come as uint8.

    Files are mapped: only what is copied out of a tensor is read, and when the next tensor is
    asked for, its memory is given back. Use a tensor before that.
    """
    files: dict[Path, list[str]] = {}
    skipped = set()
    for name, info in headers.items():
        if name.startswith(MTP) == mtp:
            files.setdefault(info.file, []).append(name)
        elif not mtp:
            skipped.add(name.split(".")[1])
    if skipped:
        log.info("%d draft stages of the checkpoint are skipped.", len(skipped))
    total = sum(headers[name].nbytes for names in files.values() for name in names)
    with tqdm(total=total, desc="loading", unit="B", unit_scale=True, disable=not progress) as bar:
        for file, names in files.items():
            with file.open("rb") as f:
                mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
            for name in names:
                yield name, _tensor(mapped, headers[name])
                _forget(mapped, headers[name])
                bar.update(headers[name].nbytes)


def read_tensor(info: TensorInfo) -> Tensor:
    """One tensor, as `read_tensors` gives it."""
    with info.file.open("rb") as f:
        return _tensor(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY), info)


def _tensor(mapped: mmap.mmap, info: TensorInfo) -> Tensor:
    dtype = DTYPES[info.dtype]
    count = info.nbytes // dtype.itemsize
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=info.offset).view(info.shape)


def _forget(mapped: mmap.mmap, info: TensorInfo) -> None:
    """Give a tensor's pages back, as far as no other tensor lies in them."""
    start = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
    length = info.offset + info.nbytes - start
    if length >= mmap.PAGESIZE and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED, start, length // mmap.PAGESIZE * mmap.PAGESIZE)
