"""The model classes SGLang loads: the core's network, and its MTP layer as SGLang's draft model, on
SGLang's pools and logits processor."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_device, get_exec, get_model, get_schedule
from torch import Tensor, nn

from dsv4_plugin.checkpoint.files import MTP as PREFIX
from dsv4_plugin.checkpoint.load import load_drafter, load_weights
from dsv4_plugin.checkpoint.names import stored_tensors
from dsv4_plugin.model.mtp import MTP
from dsv4_plugin.model.transformer import Transformer
from sglang_ext import chains
from sglang_ext.active import check_active
from sglang_ext.config import cache_layout, model_config
from sglang_ext.parallel import SglangParallel
from sglang_ext.pool import drafts

log = logging.getLogger("sglang.srt.dsv4")


class Served(nn.Module):
    """What SGLang asks of both."""

    model: Transformer | MTP

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        check_active()
        dtype = torch.get_default_dtype()
        name = str(dtype).removeprefix("torch.")
        self.config = model_config(config)
        self.layout = cache_layout(
            self.config,
            name,
            get_model().kv_cache_dtype,
            get_schedule().page_size,
            get_exec().kernel.enable_deepseek_v4_fp4_indexer,
            drafts(),
        )
        self.parallel = SglangParallel(self.config, dtype)
        self.logits_processor = LogitsProcessor(config)
        self.loaded = False

    def get_attention_sliding_window_size(self) -> int:
        return self.config.sliding_window

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Raises ValueError where the checkpoint lacks a tensor."""
        if self.loaded:
            raise NotImplementedError("a running server's weights cannot be replaced so far")
        self.loaded = True
        self.load(weights)
        log.info("%s.", self.model.weight_bytes)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        raise NotImplementedError


class DeepseekV4PluginForCausalLM(Served):
    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config)
        self.model = Transformer(self.config, self.parallel)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        mine = ((name, tensor) for name, tensor in weights if not name.startswith(PREFIX))
        load_weights(self.model, mine, stored_tensors(self.config))

    def get_embed_and_head(self) -> tuple[nn.Module, nn.Module]:
        """What the drafter shares."""
        return self.model.embed, self.model.head

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch
    ) -> LogitsProcessorOutput:
        """input_ids [T]; positions follow from lengths. With drafts, the hidden states that SGLang
        keeps are the streams [T, R * D]."""
        backend, ids, streams = get_attn_backend(), input_ids.int(), None
        step, caches = backend.forward_metadata, backend.token_to_kv_pool.layers
        if drafts():
            h = self.model.run(self.model.spread(ids), ids, step, caches)
            hidden, streams = self.model.collapse(h), h.flatten(1)
        else:
            hidden = self.model(ids, step, caches)
        head = self.model.head
        return self.logits_processor(
            input_ids, hidden, head, forward_batch, hidden_states_before_norm=streams
        )


class DeepseekV4PluginForCausalLMNextN(Served):
    """The MTP layer. SGLang gives it the next token of each position and the streams there, which
    are the target's, or its own behind the last token."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__(config)
        if get_device().device == "cpu":
            chains.install()
        self.model = MTP(self.config, self.parallel)
        self.layout = self.layout.windows_only()

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        load_drafter(self.model, weights)

    def set_embed_and_head(self, embed: nn.Module, head: nn.Module) -> None:
        self.embed, self.head = embed, head

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch
    ) -> LogitsProcessorOutput:
        backend, ids = get_attn_backend(), input_ids.int()
        step, (cache,) = backend.forward_metadata, backend.token_to_kv_pool.layers
        h = forward_batch.spec_info.hidden_states.unflatten(1, (self.config.hc_mult, -1))
        h = self.model(h, self.embed(ids), ids, step, cache)
        return self.logits_processor(
            input_ids, self.model.collapse(h), self.head, forward_batch,
            hidden_states_before_norm=h.flatten(1),
        )  # fmt: skip


EntryClass = [DeepseekV4PluginForCausalLM, DeepseekV4PluginForCausalLMNextN]
