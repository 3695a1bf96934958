"""dsv4-mini, the trained small checkpoint: from its compact form to the full native layout.

Compact are: rows of the embedding for the tokens that occur (the head's are the same, and one more
row stands for all other tokens), and no hash table, since a rule makes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsv4_plugin.checkpoint.files import MTP
from dsv4_plugin.checkpoint.names import expected_tensors
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.tools.make import new_folder, tokenizer_files

COMPACT = Path(__file__).parents[2] / "training" / "mini"
"""Where a source checkout keeps it."""
CONFIG, WEIGHTS, VOCABULARY = "config.json", "compact.safetensors", "vocabulary.json"
UNUSED = "head.unused"
DSPARK, NOISE = "dspark.safetensors", "embed.noise"
"""A drafter of blocks, compact likewise, and what it has its noise token embedded as."""
DSPARK_CONFIG: dict[str, Any] = {
    "compress_ratios": [0, 4, 128, 4, 0, 0, 0],
    "dspark_block_size": 5,
    "dspark_markov_rank": 32,
    "dspark_noise_token_id": 128799,
    "dspark_target_layer_ids": [1, 2, 3],
    "n_mtp_layers": 3,
}
"""What a checkpoint with it has in config.json in place of the MTP layer's."""


def make_mini(directory: str | Path, compact: Path = COMPACT, dspark: bool = False) -> ModelConfig:
    """Write dsv4-mini as a checkpoint folder in bfloat16 with the real tokenizer.

    Args:
        dspark: with its DSpark drafter in place of the MTP layer.

    Raises:
        FileNotFoundError: `compact` lacks a file (it is not part of the installed package).
        FileExistsError: `directory` exists and is not empty.
    """
    for name in (CONFIG, WEIGHTS, VOCABULARY, *([DSPARK] if dspark else [])):
        if not (compact / name).is_file():
            raise FileNotFoundError(
                f"{compact / name} does not exist; preset mini needs a source checkout"
            )
    hf: dict[str, Any] = json.loads((compact / CONFIG).read_text())
    weights = load_file(compact / WEIGHTS)
    if dspark:
        hf |= DSPARK_CONFIG
        main = {name: t for name, t in weights.items() if not name.startswith(MTP)}
        weights = main | load_file(compact / DSPARK)
    config = ModelConfig.from_hf(hf)
    ids = torch.tensor(json.loads((compact / VOCABULARY).read_text()))
    tensors = expand(config, weights, ids)
    with new_folder(directory) as folder:
        for source in tokenizer_files():
            copyfile(source, folder / source.name)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
        (folder / CONFIG).write_text(json.dumps(hf, indent=2))
    return config


def expand(config: ModelConfig, compact: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Compact tensors and the full id of each row -> every tensor of the native layout.

    Raises ValueError for tensors that do not fit the configuration.
    """
    tensors = {name: tensor for name, tensor in compact.items() if name not in (UNUSED, NOISE)}
    rows = tensors["embed.weight"]
    shape = (config.vocab_size, config.hidden_size)
    for name in [n for n in tensors if n == "embed.weight" or ".markov_head." in n]:
        known = tensors[name]
        full = torch.zeros(config.vocab_size, known.shape[1], dtype=known.dtype)
        tensors[name] = full.index_copy(0, ids, known)
    if config.dspark is not None:
        tensors["embed.weight"][config.dspark.noise_token_id] = compact[NOISE]
    head = compact[UNUSED].expand(shape).index_copy(0, ids, rows)
    tensors["head.weight"] = head
    for layer in range(config.num_hash_layers):
        table = hash_table(torch.arange(config.vocab_size), config.n_routed_experts)
        tensors[f"layers.{layer}.ffn.gate.tid2eid"] = table
    drafts = config.dspark is not None or config.num_nextn_predict_layers > 0
    expected = expected_tensors(config, mtp=drafts)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(dict(found.items() ^ expected.items()))
        raise ValueError(f"{WEIGHTS} does not fit {CONFIG}: {', '.join(wrong[:3])}")
    return tensors


def hash_table(ids: Tensor, experts: int) -> Tensor:
    """The hash layer's rule: token ids [N] -> two different experts [N, 2]."""
    first = ids % experts
    second = (first + 1 + ids // experts % (experts - 1)) % experts
    return torch.stack([first, second], 1)
