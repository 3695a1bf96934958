"""Safetensors folders: headers, a check that reads no weights, and tensors one at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from dsv4_plugin.checkpoint.names import expected_tensors
from dsv4_plugin.config import ModelConfig

INDEX = "model.safetensors.index.json"
FLOATS = ("BF16", "F32")
MTP = "mtp."


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is; dtype is safetensors' name (BF16, F32, I64, ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


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
    return {
        name: TensorInfo(file, info["dtype"], tuple(info["shape"])) for name, info in header.items()
    }


def check_checkpoint(config: ModelConfig, directory: str | Path) -> dict[str, TensorInfo]:
    """Check every tensor's presence, shape and dtype before any weight is read; return the headers.

    Raises:
        NotImplementedError: a quantised checkpoint.
        ValueError: the first tensors that are missing, misshapen, of a wrong dtype or unexpected.
    """
    if config.quant_method is not None:
        raise NotImplementedError(
            f"quantization_config.quant_method is {config.quant_method!r}; "
            "only unquantised (bfloat16 or float32) checkpoints are loaded so far"
        )
    found = read_headers(directory)
    expected = expected_tensors(config)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [
        f"{name} is unexpected"
        for name in found
        if name not in expected and not name.startswith(MTP)
    ]
    for name, shape in expected.items():
        info = found.get(name)
        if info is None:
            continue
        if info.shape != shape:
            problems.append(
                f"{name} has shape {list(info.shape)}, config.json asks for {list(shape)}"
            )
        allowed = ("I64", "I32") if name.endswith("tid2eid") else FLOATS
        if info.dtype not in allowed:
            problems.append(f"{name} is {info.dtype}, allowed are {', '.join(allowed)}")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(f"checkpoint {directory}: {'; '.join(problems[:3])}{more}")
    return found


def read_tensors(
    headers: dict[str, TensorInfo], progress: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """The main model's tensors, one at a time, file by file."""
    files: dict[Path, list[str]] = {}
    for name, info in headers.items():
        if not name.startswith(MTP):
            files.setdefault(info.file, []).append(name)
    total = sum(len(names) for names in files.values())
    with tqdm(total=total, desc="loading", unit="tensor", disable=not progress) as bar:
        for file, names in files.items():
            with safe_open(file, framework="pt") as f:
                for name in names:
                    yield name, f.get_tensor(name)
                    bar.update()
