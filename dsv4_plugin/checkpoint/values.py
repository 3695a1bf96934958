"""Values that no checkpoint has, found while its small tensors are read."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4_plugin.checkpoint.names import G_IDX, SCALE
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.quant.int4 import GPTQ_ZEROS

LARGEST = 1 << 22
"""Values. Larger weights that are not packed (embedding, head, experts in bfloat16) are not looked
through: that would read all of a tensor of which a rank takes a part."""
_E4M3_NAN, _UE8M0_NAN = 0x7F, 0xFF


def check_values(config: ModelConfig, name: str, tensor: Tensor) -> None:
    """Raise ValueError, naming the tensor, where it holds what would make every answer wrong.

    Args:
        tensor: as it is read from a file; of one byte per value: raw.
    """
    if name.endswith("tid2eid"):
        _check_experts(name, tensor, config.n_routed_experts)
    elif name.endswith(".weight_shape"):
        _check_shape(config, name, tensor)
    elif name.endswith(".qzeros"):
        if not any(bool((tensor == word).all()) for word in GPTQ_ZEROS):
            raise ValueError(f"{name} has zeros other than 8, or than 7 throughout")
    elif name.endswith(G_IDX):
        if not torch.equal(tensor, torch.arange(len(tensor)) // config.int4_block):
            raise ValueError(
                f"{name} orders the inputs otherwise than 0, 0, ...; allowed is "
                f"{config.int4_block} of each, ascending"
            )
    elif SCALE.fullmatch(name):
        _check_scales(name, tensor)
    elif tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel() <= LARGEST:
        _refuse(name, ~tensor.isfinite(), "values that are not finite")


def _check_experts(name: str, table: Tensor, experts: int) -> None:
    low, high = table.min().item(), table.max().item()
    if low < 0 or high >= experts:
        raise ValueError(
            f"{name} names expert {low if low < 0 else high}; n_routed_experts is {experts}, so "
            f"allowed are 0 to {experts - 1}"
        )


def _check_shape(config: ModelConfig, name: str, shape: Tensor) -> None:
    true = [config.moe_intermediate_size, config.hidden_size]
    if ".w2." in name:
        true.reverse()
    if shape.tolist() != true:
        raise ValueError(f"{name} is {shape.tolist()}; the weight is {true}")


def _check_scales(name: str, scales: Tensor) -> None:
    codes = scales if scales.element_size() > 1 else scales.view(torch.uint8)
    if codes.is_floating_point():
        _refuse(name, ~scales.isfinite(), "scales that are not finite")
        if not name.endswith(".scales"):  # AutoRound turns a block round by a negative one
            _refuse(name, scales < 0, "negative scales")
    elif name.endswith(".weight_scale"):  # e4m3; the sign is the highest bit
        _refuse(name, codes & 0x7F == _E4M3_NAN, "scales that are not numbers")
        _refuse(name, codes > _E4M3_NAN, "negative scales")
    else:
        _refuse(name, codes == _UE8M0_NAN, "scales that are not numbers")
    if not codes.any():
        raise ValueError(f"{name} has nothing but zeros; a weight needs scales")


def _refuse(name: str, wrong: Tensor, what: str) -> None:
    count = int(wrong.sum())
    if count:
        raise ValueError(f"{name} has {count:,} {what} among {wrong.numel():,}; it is damaged")
