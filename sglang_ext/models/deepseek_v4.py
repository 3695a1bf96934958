"""The model class SGLang loads: the core's network on SGLang's pools and logits processor."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import get_attn_backend
from sglang.srt.runtime_context import get_exec, get_model, get_schedule
from torch import Tensor, nn

from dsv4_plugin.checkpoint.files import MTP
from dsv4_plugin.checkpoint.load import load_weights
from dsv4_plugin.checkpoint.names import stored_tensors
from dsv4_plugin.model.transformer import Transformer
from sglang_ext.active import check_active
from sglang_ext.config import cache_layout, model_config
from sglang_ext.parallel import SglangParallel

log = logging.getLogger("sglang.srt.dsv4")


class DeepseekV4PluginForCausalLM(nn.Module):
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
        )
        self.parallel = SglangParallel(self.config, dtype)
        self.model = Transformer(self.config, self.parallel)
        self.logits_processor = LogitsProcessor(config)
        self.loaded = False

    def get_attention_sliding_window_size(self) -> int:
        return self.config.sliding_window

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Raises ValueError where the checkpoint lacks a tensor."""
        if self.loaded:
            raise NotImplementedError("a running server's weights cannot be replaced so far")
        self.loaded = True
        mine = ((name, tensor) for name, tensor in weights if not name.startswith(MTP))
        load_weights(self.model, mine, stored_tensors(self.config))
        log.info("%s.", self.model.weight_bytes)

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, positions: Tensor, forward_batch: ForwardBatch
    ) -> LogitsProcessorOutput:
        """input_ids [T]; positions follow from lengths."""
        backend = get_attn_backend()
        caches = backend.token_to_kv_pool.layers
        hidden = self.model(input_ids.int(), backend.forward_metadata, caches)
        return self.logits_processor(input_ids, hidden, self.model.head, forward_batch)


EntryClass = DeepseekV4PluginForCausalLM
