"""Small products that some exporters pack, compressors and indexers, and the network holds plain:
FP8 in the first uploads of compressed-tensors, int4 in some of AutoRound."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsv4_plugin.checkpoint.names import unpacked
from dsv4_plugin.checkpoint.values import check_values
from dsv4_plugin.config import FP8_BLOCK, ModelConfig
from dsv4_plugin.quant.e4m3 import decode_ue8m0, e4m3_values
from dsv4_plugin.quant.int4 import decode_int4, from_gptq

_WHOLE = ({"weight", "scale"}, {"qweight", "scales"})


class Unpacking:
    """Keeps a weight's tensors until all have come, in any order."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self._parts: dict[str, dict[str, Tensor]] = {}

    def feed(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What is certain by this tensor: itself, or a weight in float32, or nothing yet."""
        module, leaf = unpacked(self.config, name) or ("", "weight")
        if not module or (leaf == "weight" and tensor.element_size() > 1):
            yield name, tensor
            return
        check_values(self.config, name, tensor)
        if leaf in ("qzeros", "g_idx"):
            return
        parts = self._parts.setdefault(module, {})
        parts[leaf] = tensor.clone()  # a mapped one is given back
        if set(parts) in _WHOLE:
            del self._parts[module]
            yield f"{module}.weight", _values(parts)

    def left(self) -> int:
        """Scales of weights that are not packed. Raises ValueError where a weight has none."""
        for module, parts in self._parts.items():
            for leaf in ("weight", "qweight"):
                if leaf in parts:
                    raise ValueError(f"{module}.{leaf} is packed and has no scales")
        return len(self._parts)


def _values(parts: dict[str, Tensor]) -> Tensor:
    """float32 [out, in]."""
    if "qweight" in parts:
        return decode_int4(from_gptq(parts["qweight"]), parts["scales"].t())
    codes, scale = parts["weight"].view(torch.uint8), parts["scale"]
    scale = decode_ue8m0(scale.view(torch.uint8)) if scale.element_size() == 1 else scale.float()
    wide = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
    return e4m3_values(codes) * wide[: codes.shape[0], : codes.shape[1]]
