"""From a bfloat16 checkpoint to the published FP8, FP4 and int4 forms."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copyfile
from typing import Any

from torch import Tensor

from dsv4_plugin.checkpoint.files import MTP, check_checkpoint, read_headers, read_tensor
from dsv4_plugin.checkpoint.names import expected_tensors, with_drafter
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.json_file import read_object
from dsv4_plugin.tools.formats import exported_files, format_fields, pack
from dsv4_plugin.tools.make import new_folder, plan, write_shards


def convert_checkpoint(source: str | Path, directory: str | Path, fmt: str) -> ModelConfig:
    """Round an unquantised checkpoint into another format, shard by shard.

    A drafter is rounded too, where there is one. Files beside the weights (tokenizer,
    generation_config.json) are copied.

    Raises:
        ValueError: `source` is quantised or damaged, or `fmt` is not one of CONVERSIONS.
        FileExistsError: `directory` exists and is not empty.
    """
    source = Path(source)
    plain = ModelConfig.from_pretrained(source)
    if plain.experts != "plain":
        raise ValueError(
            f"{source} is quantised ({plain.experts} experts); only bfloat16 is converted"
        )
    if fmt not in CONVERSIONS:
        raise ValueError(f"format is {fmt!r}; allowed are {', '.join(CONVERSIONS)}")
    mtp = any(name.startswith(MTP) for name in read_headers(source))
    headers = check_checkpoint(plain, source, mtp)
    hf: dict[str, Any] = read_object(source / "config.json")
    hf |= format_fields(fmt, hf | {"num_hidden_layers": plain.num_hidden_layers})
    config = with_drafter(ModelConfig.from_hf(hf), headers)

    def packed(name: str) -> dict[str, Tensor]:
        return pack(config, name, read_tensor(headers[name]))

    with new_folder(directory) as folder:
        for file in source.iterdir():
            if file.is_file() and ".safetensors" not in file.name and file.name != "config.json":
                copyfile(file, folder / file.name)
        write_shards(folder, plan(config, expected_tensors(config, mtp)), packed)
        for name, content in {"config.json": hf, **exported_files(hf)}.items():
            (folder / name).write_text(json.dumps(content, indent=2))
    return config


CONVERSIONS = ("fp8-fp4", "base", "nvfp4", "ct-nvfp4", "ct-w4a16", "gptq")
