"""How a checkpoint's tensors reach the modules that compute with them.

`give` hands a full tensor down to the module that its name says. A module that takes a rank's part
of one, or another form, or chooses among them, has a method `take(name, tensor)` for all that lies
below it. Elsewhere a parameter takes the whole tensor.
"""

from __future__ import annotations

from torch import Tensor, nn


def give(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """Hand down a tensor; name: below the module. False: it is not of this process (a pipeline
    stage's, another rank's expert)."""
    take = getattr(module, "take", None)
    return bool(take(name, tensor)) if take is not None else give_below(module, name, tensor)


def give_below(module: nn.Module, name: str, tensor: Tensor) -> bool:
    """The same, to what the module consists of."""
    child, _, rest = name.partition(".")
    if rest:
        found = module._modules.get(child)
        return found is not None and give(found, rest, tensor)
    param = module._parameters.get(child)
    if param is None:
        return False
    assert param.shape == tensor.shape, (name, param.shape, tensor.shape)
    param.data.copy_(tensor)
    return True


def shard(tensor: Tensor, dim: int, rank: int, n: int) -> Tensor:
    """A rank's part of a full tensor that ranks share along `dim`: n each."""
    return tensor.narrow(dim, rank * n, n)
