"""Safetensors folders: headers, a check that reads no weights, and tensors one at a time."""

from __future__ import annotations

import json
import logging
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dsv4_plugin.checkpoint.names import stored_tensors
from dsv4_plugin.config import ModelConfig

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
    index = directory / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        files = [directory / name for name in names]
    else:
        single = directory / "model.safetensors"
        files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{directory} has no *.safetensors files")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing; {INDEX} names it")
        tensors |= _read_header(file)
    return tensors


def _read_header(file: Path) -> dict[str, TensorInfo]:
    size = file.stat().st_size
    with file.open("rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise ValueError(f"{file} is truncated: {size} bytes do not hold its header")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    end = max((info["data_offsets"][1] for info in header.values()), default=0)
    if size != 8 + length + end:
        raise ValueError(
            f"{file} is truncated: {size} bytes, its header asks for {8 + length + end}"
        )
    tensors = {}
    for name, info in header.items():
        begin, stop = info["data_offsets"]
        tensors[name] = TensorInfo(
            file, info["dtype"], tuple(info["shape"]), 8 + length + begin, stop - begin
        )
    return tensors


def check_checkpoint(
    config: ModelConfig, directory: str | Path, mtp: bool = False
) -> dict[str, TensorInfo]:
    """Check every tensor's presence, shape and dtype before any weight is read; return the headers.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the first tensors that are missing, misshapen, of a wrong dtype or unexpected.
    """
    found = read_headers(directory)
    problems = list(problems_of(config, found, mtp))
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"checkpoint {directory}: {'; '.join(problems[:3])}{more}")
    return found


def problems_of(
    config: ModelConfig, found: Mapping[str, TensorInfo], mtp: bool = False
) -> Iterator[str]:
    """What does not fit config.json, a sentence per tensor: missing ones, misshapen ones and those
    of a wrong dtype, unexpected ones."""
    expected = stored_tensors(config, mtp)
    yield from (f"{name} is missing" for name in expected if name not in found)
    for name, stored in expected.items():
        info = found.get(name)
        if info is None:
            continue
        if info.dtype not in stored.dtypes:
            allowed = " or ".join(stored.dtypes)
            yield f"{name} is {info.dtype}, config.json ({_variant(config)}) asks for {allowed}"
        elif info.shape != stored.shape:
            yield f"{name} has shape {list(info.shape)}, config.json asks for {list(stored.shape)}"
        elif info.nbytes != prod(info.shape) * DTYPES[info.dtype].itemsize:
            yield f"{name} has {info.nbytes} bytes, which is not what its shape and dtype need"
    yield from (
        f"{name} is unexpected"
        for name in found
        if name not in expected and not name.startswith(MTP)
    )


def _variant(config: ModelConfig) -> str:
    if config.experts == "plain":
        return "no quantization_config"
    return f"FP8 with {config.experts.upper()} experts"


def read_tensors(
    headers: Mapping[str, TensorInfo], progress: bool = True, mtp: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The main model's tensors, or the MTP layer's instead, one at a time, file by file.

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
        log.info("%d multi-token-prediction stages of the checkpoint are skipped.", len(skipped))
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
