"""Where vLLM's breakable CUDA graphs break (its mode PIECEWISE, without torch.compile).

A graph holds what depends on the number of rows alone. A step's metadata and the layers' attention
run anew between its segments; what they hand on lies where the segments look for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.compilation.breakable_cudagraph import (
    BreakableCUDAGraphCapture,
    eager_break_during_capture,
)

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.step import Step
from dsv4_plugin.kernels.packed import Both, plain
from dsv4_plugin.model.parallel import Attend


@dataclass
class Running:
    """The step that runs and its caches, for attention that a graph's replay calls: what it was
    called with when the graph was captured is of another step.

    layers: how many attentions there are.
    """

    step: Step | None = None
    caches: Sequence[LayerCache] = ()
    layers: int = 0

    def begin(self, step: Step, caches: Sequence[LayerCache]) -> None:
        assert len(caches) == self.layers
        self.step, self.caches = step, caches

    def forget(self) -> None:
        """No step runs: its caches may go."""
        self.step, self.caches = None, ()

    def breaking(self, attention: Attend) -> Attend:
        """The next layer's attention, into a buffer of the graph that is captured, if one is.

        To be called once vLLM has decided whether it uses such graphs, which is when it has made
        its configuration: the decorator asks at once.
        """
        layer = self.layers
        self.layers += 1

        @eager_break_during_capture
        def attend_into(out: Tensor, *given: Tensor) -> None:
            """given: tensors, because vLLM has to know what it keeps of a capture."""
            assert self.step is not None
            x = given[0] if len(given) == 1 else Both.of(*given)
            out.copy_(attention(x, self.step, self.caches[layer]))

        def attend(x: Tensor | Both, step: Step, cache: LayerCache) -> Tensor:
            if not BreakableCUDAGraphCapture.is_active():
                return attention(x, step, cache)
            out = torch.empty_like(plain(x))
            attend_into(out, *(x.tensors() if isinstance(x, Both) else (x,)))
            return out

        return attend
