"""The model class vLLM loads: the core's network on vLLM's layers and caches."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from dsv4_plugin.cache.step import Step, StepBuilder
from dsv4_plugin.checkpoint.files import MTP
from dsv4_plugin.checkpoint.load import load_weights
from dsv4_plugin.checkpoint.names import expected_tensors
from dsv4_plugin.engine import Batch
from dsv4_plugin.model.transformer import Transformer
from vllm_ext.cache import GroupMetadata, PagedCaches
from vllm_ext.config import SERVED_TYPE, cache_layout, model_config_of
from vllm_ext.parallel import VllmParallel

if TYPE_CHECKING:
    from vllm.config import VllmConfig

log = logging.getLogger("vllm.dsv4")


class DeepseekV4ForCausalLM(nn.Module):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.model_config.hf_config.model_type != SERVED_TYPE:
            raise RuntimeError(
                "dsv4-plugin's model was chosen but its configuration hook did not run; "
                "is another plugin replacing it?"
            )
        config = model_config_of(vllm_config)
        self.config = config
        self.layout = cache_layout(config, vllm_config)
        self.parallel = VllmParallel(config, vllm_config.model_config.dtype)
        self.model = Transformer(config, self.parallel)
        self.caches = PagedCaches(config, self.layout)
        self.steps = StepBuilder(config, self.layout)
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Raises ValueError where the checkpoint lacks a tensor."""
        mine = ((name, tensor) for name, tensor in weights if not name.startswith(MTP))
        taken = load_weights(self.model, mine, self.parallel.rank)
        missing = expected_tensors(self.config).keys() - taken
        if missing:
            raise ValueError(
                f"the checkpoint lacks {len(missing)} tensors, {min(missing)} among them"
            )
        return {name for name, _ in self.named_parameters()}

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.model.embed(input_ids)
        return out

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """input_ids [T], perhaps padded -> hidden states [T, D]; positions follow from lengths."""
        input_ids = input_ids.long()
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            return self._profile(input_ids)
        step = self._step(metadata)
        n = len(step.window_write)
        hidden: Tensor = self.model(input_ids[:n], step, self.caches.layers())
        return nn.functional.pad(hidden, (0, 0, 0, len(input_ids) - n))

    def _step(self, metadata: dict[str, GroupMetadata]) -> Step:
        batch = metadata[self.caches.window.prefix]
        tables = self.caches.tables(metadata)
        return self.steps.build(tables, batch.query_start, batch.seq_lens)

    def _profile(self, input_ids: Tensor) -> Tensor:
        """A run before caches exist: one request, in caches of its own."""
        batch = Batch(self.model, self.layout, [len(input_ids)], len(input_ids))
        return batch.run([(0, input_ids)])

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        if hidden_states.device.type == "cpu":
            hidden_states = hidden_states.float()
        logits: Tensor | None = self.logits_processor(self.model.head, hidden_states)
        return logits
