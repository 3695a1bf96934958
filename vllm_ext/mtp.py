"""The drafter vLLM loads for `--speculative-config '{"method": "mtp", ...}'`.

vLLM drives it as it drives its own: the first pass takes all tokens of a step, shifted by one, with
the streams that the target left; further passes take single drafts with the drafter's own streams.
"""

from __future__ import annotations

from torch import Tensor

from dsv4_plugin.config import ModelConfig
from dsv4_plugin.model.mtp import MTP
from dsv4_plugin.warmup import MTPPadding, Shape
from vllm_ext.draft import DraftModel
from vllm_ext.parallel import VllmParallel


class DeepseekV4MTP(DraftModel):
    @staticmethod
    def make(config: ModelConfig, parallel: VllmParallel) -> MTP:
        return MTP(config, parallel)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The next token of each position [T], the streams there [T, R * D] -> streams."""
        self.begin(len(input_ids))
        running, network = self.parallel.running, self.model.network
        assert running.step is not None
        h = hidden_states.unflatten(1, (self.config.hc_mult, -1))
        ids = input_ids.int()
        out = network(h, self.embed_input_ids(ids), ids, running.step, running.caches[0])
        return out.flatten(1)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        streams = hidden_states.unflatten(1, (self.config.hc_mult, -1))
        return self.parallel.gather_logits(self.lm_head(self.model.network.collapse(streams)))

    def padding(self, shape: Shape) -> None:
        caches, tables = self.spare()
        MTPPadding(self.model.network, self.steps, caches, tables)(shape)
