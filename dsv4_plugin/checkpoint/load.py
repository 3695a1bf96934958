"""From checkpoint tensors to a network's parameters."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from dsv4_plugin.checkpoint.files import MTP
from dsv4_plugin.checkpoint.names import (
    is_for_images,
    is_unread_scale,
    parameter_name,
    stored_tensors,
    unpacked,
)
from dsv4_plugin.checkpoint.spelling import native
from dsv4_plugin.checkpoint.unpack import Unpacking
from dsv4_plugin.checkpoint.values import check_values
from dsv4_plugin.model.loading import give
from dsv4_plugin.model.transformer import Network, WeightBytes

log = logging.getLogger("dsv4_plugin")


def load_weights(
    model: Network, tensors: Iterable[tuple[str, Tensor]], needed: Iterable[str] = ()
) -> None:
    """Give each (name, full tensor) to the network (see `model.loading`) and finalize it.

    Tensors of other pipeline stages and ranks are passed over. Tensors of a checkpoint file are
    mapped, not read: only the parts that are taken come into memory.

    Raises ValueError where one of the names `needed` did not come, or a tensor is damaged.
    """
    parameters = {name for name, _ in model.named_parameters()}
    expected = stored_tensors(model.config)
    taken, filled, images, scales = set(), set(), 0, 0
    unpacking = Unpacking(model.config)
    for given, tensor in tensors:
        name = native(model.config, given)
        if is_for_images(model.config, name):
            images += 1
            continue
        if is_unread_scale(expected, name) and not unpacked(model.config, name):
            scales += 1
            continue
        if tensor.element_size() == 1:
            tensor = tensor.view(torch.uint8)  # codes and UE8M0 scales move as bytes
        for whole, weight in unpacking.feed(name, tensor):
            taken.add(whole)
            path = parameter_name(whole)
            if give(model, path, weight):
                check_values(model.config, whole, weight)
                filled.add(path)
    scales += unpacking.left()
    missing = set(needed) - taken
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} tensors, {min(missing)} among them")
    if images:
        log.info("Vision-Exp is served for text: %d tensors for images are skipped.", images)
    if scales:
        log.info("%d scales are skipped: what they belong to is not rounded.", scales)
    model.weight_bytes = _weight_bytes(model)
    unfilled = {n for n in parameters if ".experts." not in n} - filled
    assert not unfilled, f"{min(unfilled)} was not loaded"
    model.finalize_weights()


def load_drafter(drafter: Network, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """`load_weights` of what an engine reads of a whole checkpoint.

    Raises ValueError where it lacks a tensor of the drafter.
    """
    mine = ((name, tensor) for name, tensor in tensors if name.startswith(MTP))
    needed = {name for name in stored_tensors(drafter.config, True) if name.startswith(MTP)}
    load_weights(drafter, mine, needed)


def _weight_bytes(model: Network) -> WeightBytes:
    packed = plain = 0
    for param in model.parameters():
        if param.dtype == torch.uint8:
            packed += param.nbytes
        else:
            plain += param.nbytes
    return WeightBytes(packed, plain)
