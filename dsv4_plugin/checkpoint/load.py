"""From checkpoint tensors to a network's parameters."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from dsv4_plugin.checkpoint.names import EXPERT, parameter_name
from dsv4_plugin.model.parallel import take_shard
from dsv4_plugin.model.transformer import Transformer


def load_weights(
    model: Transformer, tensors: Iterable[tuple[str, Tensor]], rank: int = 0
) -> set[str]:
    """Copy each (name, full tensor) into the network and finalize it; return the names taken.

    A parameter with a `weight_loader(param, tensor)` splits the tensor itself (engines' layers);
    one with a `shard_dim` takes this rank's part along it; others take all.
    """
    parameters = dict(model.named_parameters())
    taken = set()
    for name, tensor in tensors:
        taken.add(name)
        expert = EXPERT.fullmatch(name)
        if expert is not None:
            owner = model.get_submodule(expert[1])
            owner.load_expert(int(expert[2]), expert[3], tensor)  # type: ignore[operator]
            continue
        param = parameters[parameter_name(name)]
        loader = getattr(param, "weight_loader", None)
        if loader is not None:
            loader(param, tensor)
        else:
            take_shard(param, tensor, rank, getattr(param, "shard_dim", None))
    model.finalize_weights()
    return taken
