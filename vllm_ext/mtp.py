"""The drafter vLLM loads for `--speculative-config '{"method": "mtp", ...}'`.

vLLM drives it as it drives its own: the first pass takes all tokens of a step, shifted by one, with
the streams that the target left; further passes take single drafts with the drafter's own streams.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context

from dsv4_plugin.cache.layer import LayerCache
from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.cache.step import Step
from dsv4_plugin.checkpoint.files import MTP as PREFIX
from dsv4_plugin.checkpoint.load import load_weights
from dsv4_plugin.checkpoint.names import stored_tensors
from dsv4_plugin.config import SWA
from dsv4_plugin.kernels.step import StepBuilder
from dsv4_plugin.model.mtp import MTP
from dsv4_plugin.warmup import nothing
from vllm_ext.cache import CacheBlocks, GroupMetadata
from vllm_ext.config import cache_layout, model_config_of
from vllm_ext.parallel import VllmParallel

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Drafter(nn.Module):
    """What vLLM reaches for as `model`: it puts the target's embedding here."""

    def __init__(self, network: MTP) -> None:
        super().__init__()
        self.network = network


class DeepseekV4MTP(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = model_config_of(vllm_config)
        self.config = config
        self.parallel = VllmParallel(
            config,
            vllm_config.model_config.dtype,
            vllm_config.parallel_config.enable_expert_parallel,
        )
        self.model = Drafter(MTP(config, self.parallel))
        self.layout = replace(cache_layout(config, vllm_config), page={}, ring={})
        spec = {"block_size": self.layout.window_block, "window": config.sliding_window}
        self.cache = CacheBlocks("draft", self.layout.window.words, spec)
        self.device = torch.device(vllm_config.device_config.device)
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.steps = StepBuilder(config, self.layout, rows, self.device)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Raises ValueError where the checkpoint lacks a tensor."""
        mine = ((name, tensor) for name, tensor in weights if name.startswith(PREFIX))
        needed = {name for name in stored_tensors(self.config, True) if name.startswith(PREFIX)}
        load_weights(self.model.network, mine, needed)
        return {name for name, _ in self.named_parameters()}

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.model.embed_tokens(input_ids)
        return out

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """The next token of each position [T], the streams there [T, R * D] -> streams."""
        step, cache = self._step(len(input_ids))
        h = hidden_states.unflatten(1, (self.config.hc_mult, -1))
        ids = input_ids.int()
        return self.model.network(h, self.embed_input_ids(ids), ids, step, cache).flatten(1)

    def _step(self, n_tokens: int) -> tuple[Step, LayerCache]:
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # before caches exist: padding
            caches, tables, ends = nothing(self.model.network, self.layout, self.device)
            given = tables, ends, ends[:1], n_tokens, n_tokens, n_tokens
            return self.steps.build(*given), caches[0]
        group: GroupMetadata = metadata[self.cache.prefix]
        table = group.table
        tables = BlockTables(table, table, table[:, 0], self.cache.stride, 0, 0)
        lengths = n_tokens, group.longest_query, group.longest
        step = self.steps.build(tables, group.query_start, group.seq_lens, *lengths)
        return step, LayerCache.bind(self.layout, SWA, self.cache.storage, None, None)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        streams = hidden_states.unflatten(1, (self.config.hc_mult, -1))
        return self.parallel.gather_logits(self.lm_head(self.model.network.collapse(streams)))
