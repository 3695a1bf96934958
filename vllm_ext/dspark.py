"""The drafter vLLM loads for `--speculative-config '{"method": "dspark", ...}'`, which only its V2
runner drives: a pass over blocks, and the window rows of every token that the target has verified.

vLLM gives each block as many rows as there are drafts. Its rows take the slots that the next
step's tokens will; the window before them reaches a row further back than a layer of the target
looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from dsv4_plugin.config import ModelConfig
from dsv4_plugin.model.dspark import DSpark
from dsv4_plugin.warmup import Shape, nobody
from vllm_ext.draft import DraftModel
from vllm_ext.parallel import VllmParallel

Slots = Sequence[Tensor | None] | Tensor | None
"""vLLM's numbers of window rows, -1 for none; of each layer, or of all."""


class DeepseekV4DSpark(DraftModel):
    together = True
    window = 1
    has_own_lm_head = has_own_embed_tokens = False
    draft_id_to_target_id = None

    @staticmethod
    def make(config: ModelConfig, parallel: VllmParallel) -> DSpark:
        return DSpark(config, parallel)

    @property
    def network(self) -> DSpark:
        return cast(DSpark, self.model.network)

    def get_draft_kv_cache_layer_names(self) -> list[str]:
        """Of each stage."""
        return [self.cache.prefix] * len(self.ratios)

    def get_draft_attn_causal(self) -> list[bool]:
        return [False] * len(self.ratios)

    def combine_hidden_states(self, means: Tensor) -> Tensor:
        """Means over the streams behind the layers it reads [T, layers * D] -> [T, D]."""
        return self.network.join(means)

    def precompute_and_store_context_kv(
        self, main: Tensor, positions: Tensor, slots: Slots = None
    ) -> None:
        """Write the window rows of tokens of the target; none, where vLLM has no caches yet."""
        if isinstance(slots, (list, tuple)):
            slots = slots[0]
        if slots is None or not self.caches:
            return
        assert isinstance(slots, Tensor)
        block, row = self.layout.window_block, self.layout.window.parts["kv"].codec.words
        address = slots // block * self.cache.stride + slots % block * row
        cis = self.steps.window_cis(positions)
        self.network.store(main, cis, address.where(slots >= 0, -1), self.caches)

    def forward(
        self, input_ids: Tensor, positions: Tensor, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Rows of blocks: ids [T] -> y [T, D], not normed. Positions follow from lengths, which
        vLLM cuts at the longest text's end: the last drafts are bad ones."""
        self.begin(len(input_ids))
        running, ids = self.parallel.running, input_ids.int()
        assert running.step is not None
        embedding = self.embed_input_ids(ids)
        out: Tensor = self.network(embedding, ids, running.step, running.caches)
        return out

    def compute_draft_logits(self, y: Tensor) -> Tensor:
        """y [T, D] -> float32 [T, V], to be corrected."""
        return self.parallel.gather_logits(self.lm_head(self.network.normed(y))).float()

    def markov_embed(self, ids: Tensor) -> Tensor:
        return self.network.stages[-1].markov_head.embed(ids)

    def markov_bias(self, e: Tensor) -> Tensor:
        return self.network.stages[-1].markov_head.logits(e)

    def compute_confidence(self, y: Tensor, e: Tensor) -> Tensor:
        """y [T, D] and e [T, K] of the token before each draft -> how likely it is kept [T]."""
        return self.network.stages[-1].confidence_head(y, e).sigmoid()

    def map_draft_to_target(self, ids: Tensor) -> Tensor:
        return ids

    @property
    def width(self) -> int:
        return self.drafts - 1

    def padding(self, shape: Shape) -> None:
        rows, query, _ = shape
        zeros = {"dtype": self.parallel.dtype, "device": self.device}
        d, dspark = self.config.hidden_size, self.network.dspark
        main = self.network.join(torch.zeros(rows, len(dspark.target_layer_ids) * d, **zeros))
        caches, tables = self.spare()
        step = nobody(self.steps, tables, shape)
        self.network.store(main, self.steps.window_cis(step.position), step.window_write, caches)
        if query == self.drafts:
            step = nobody(self.steps, tables, shape, together=True)
            ids = torch.zeros(rows, dtype=torch.int32, device=self.device)
            self.network.normed(self.network(torch.zeros(rows, d, **zeros), ids, step, caches))
