"""Where vLLM's breakable CUDA graphs break (its mode PIECEWISE, without torch.compile).

A graph holds what depends on the number of rows alone. A step's metadata and the layers' attention
run anew between its segments; what they hand on lies where the segments look for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from vllm.compilation.breakable_cudagraph import (
    BreakableCUDAGraphCapture,
    eager_break_during_capture,
)

from dsv4_plugin.model import fused


def breaking_attention() -> Callable[[Tensor, int], Tensor]:
    """The core's `attend`, into a buffer of the graph that is captured, if one is.

    To be called once vLLM has decided whether it uses such graphs, which is when it has made its
    configuration: the decorator asks at once.
    """

    @eager_break_during_capture
    def attend_into(out: Tensor, x: Tensor, block: int) -> None:
        out.copy_(fused.attend(x, block))

    def attend(x: Tensor, block: int) -> Tensor:
        if not BreakableCUDAGraphCapture.is_active():
            return fused.attend(x, block)
        out = torch.empty_like(x)
        attend_into(out, x, block)
        return out

    return attend
