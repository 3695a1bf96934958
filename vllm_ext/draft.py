"""What vLLM's drafters of both kinds have in common: window layers of their own in one cache
entry, and steps over them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.forward_context import get_forward_context, override_forward_context

from dsv4_plugin.cache.layer import LayerCache, bind_layers
from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.checkpoint.load import load_drafter
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.kernels.dispatch import use_triton
from dsv4_plugin.kernels.step import StepBuilder
from dsv4_plugin.model.dspark import DSpark
from dsv4_plugin.model.mtp import MTP
from dsv4_plugin.warmup import Shape, nothing, shapes, warm_up
from vllm_ext.cache import CacheBlocks, GroupMetadata
from vllm_ext.config import cache_layout, drafter_config
from vllm_ext.model import share
from vllm_ext.parallel import VllmParallel

if TYPE_CHECKING:
    from vllm.config import VllmConfig


class Drafter(nn.Module):
    """What vLLM reaches for as `model`: it puts the target's embedding here."""

    confidence_head: nn.Module | None = None

    def __init__(self, network: MTP | DSpark) -> None:
        super().__init__()
        self.network = network


class DraftModel(nn.Module):
    """Adapters of one kind say how their network is made, and what a warm-up runs of it.

    together: a step's requests bring blocks of rows that see one another.
    """

    together = False
    window = 0
    """Rows before a query's own that have to be kept, beyond those of a layer of the target."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = drafter_config(vllm_config)
        self.config = config
        self.parallel = VllmParallel(
            config,
            vllm_config.model_config.dtype,
            vllm_config.parallel_config.enable_expert_parallel,
        )
        network = self.make(config, self.parallel)
        self.model, self.ratios = Drafter(network), network.ratios
        self.layout = cache_layout(config, vllm_config).windows_only()
        words = self.layout.window.words * len(self.ratios)
        window = config.sliding_window + self.window
        self.cache = CacheBlocks(
            "draft", words, {"block_size": self.layout.window_block, "window": window}
        )
        self.cache.changed = self._changed
        self.caches: list[LayerCache] = []
        self.device = torch.device(vllm_config.device_config.device)
        scheduler = vllm_config.scheduler_config
        speculative = vllm_config.speculative_config
        assert speculative is not None
        self.drafts = speculative.num_speculative_tokens
        self.limits = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
        self.steps = StepBuilder(config, self.layout, self.limits[0], self.device)
        self.begin = eager_break_during_capture(self._begin)
        self._compiled_for = -1

    @staticmethod
    def make(config: ModelConfig, parallel: VllmParallel) -> MTP | DSpark:
        raise NotImplementedError

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Raises ValueError where the checkpoint lacks a tensor."""
        load_drafter(self.model.network, weights)
        return {name for name, _ in self.named_parameters()}

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.model.embed_tokens(input_ids)
        return out

    def _begin(self, n_tokens: int) -> None:
        """As the target's: the step of so many rows, for all layers."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # before caches exist: padding
            caches, tables, ends = nothing(self.model.network, self.layout, self.device)
            given = tables, ends, ends[:1], n_tokens, n_tokens, n_tokens
            together = False
        else:
            group: GroupMetadata = metadata[self.cache.prefix]
            caches, tables, together = self.caches, self._tables(group.table), self.together
            lengths = n_tokens, group.longest_query, group.longest
            given = tables, group.query_start, group.seq_lens, *lengths
        step = self.steps.build(*given, together=together)
        self.parallel.running.begin(step, caches)

    def _tables(self, window: Tensor) -> BlockTables:
        return BlockTables(window, window, window[:, 0], self.cache.stride, 0, 0)

    def _changed(self, entry: CacheBlocks) -> None:
        self.parallel.running.forget()
        self.caches = []
        if entry.storage is not None:
            self.caches = bind_layers(self.layout, self.ratios, entry.storage, None, None)
            self._compile()

    def _compile(self) -> None:
        """Compile what drafting needs, when caches are bound, which is before graphs are."""
        if not use_triton(self.device) or self._compiled_for == self.cache.stride:
            return
        self._compiled_for = self.cache.stride
        with override_forward_context(None):
            c, longest = self.config, self.config.sliding_window
            needed = shapes(c, *self.limits, longest=longest, drafts=self.width)
            warm_up(self.padding, self.device, needed, share())

    @property
    def width(self) -> int:
        """Rows behind its first that a request brings to a pass, beside prompts and single ones."""
        return self.drafts

    def padding(self, shape: Shape) -> None:
        raise NotImplementedError

    def spare(self) -> tuple[list[LayerCache], BlockTables]:
        """Caches of no request's rows, and their tables."""
        caches, _, _ = nothing(self.model.network, self.layout, self.device)
        return caches, BlockTables.of_nothing((self.cache.stride, 0, 0), self.device)
