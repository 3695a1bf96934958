"""The model class vLLM loads: the core's network on vLLM's layers and caches."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.sequence import IntermediateTensors

from dsv4_plugin.checkpoint.files import MTP
from dsv4_plugin.checkpoint.load import load_weights
from dsv4_plugin.checkpoint.names import stored_tensors
from dsv4_plugin.kernels.dispatch import use_triton
from dsv4_plugin.kernels.step import StepBuilder
from dsv4_plugin.model.transformer import Transformer
from dsv4_plugin.tools.plan import GIB, workspace_bytes
from dsv4_plugin.warmup import Padding, nothing, shapes, warm_up
from vllm_ext.cache import GroupMetadata, PagedCaches
from vllm_ext.config import SERVED_TYPE, cache_layout, drafts_of, model_config_of
from vllm_ext.parallel import VllmParallel

if TYPE_CHECKING:
    from vllm.config import VllmConfig

log = logging.getLogger("vllm.dsv4")

STREAMS = "streams"
"""What travels between pipeline stages: the residual streams [T, R, D]."""


def share() -> tuple[int, int]:
    """This process among those of the machine that compile the same, and their number."""
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


class DeepseekV4ForCausalLM(nn.Module):
    supports_pp: ClassVar[Literal[True]] = True
    supports_eagle3: ClassVar[Literal[True]] = True
    """By this vLLM knows models whose drafter reads their layers."""
    has_own_lm_head = has_own_embed_tokens = False
    requires_raw_input_tokens: ClassVar[Literal[True]] = True
    """Of later stages too: vLLM's V2 runner gives them no ids otherwise, and their number is the
    step's."""

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
        self.parallel = VllmParallel(
            config,
            vllm_config.model_config.dtype,
            vllm_config.parallel_config.enable_expert_parallel,
        )
        self.model = Transformer(config, self.parallel, self.parallel.stages[self.parallel.stage])
        ratios = [[config.compress_ratios[i] for i in s] for s in self.parallel.stages]
        self.caches = PagedCaches(config, self.layout, ratios, self.parallel.stage)
        self.device = torch.device(vllm_config.device_config.device)
        scheduler = vllm_config.scheduler_config
        rows, longest = scheduler.max_num_batched_tokens, vllm_config.model_config.max_model_len
        self.limits = rows, scheduler.max_num_seqs, longest, drafts_of(vllm_config)
        self.steps = StepBuilder(config, self.layout, rows, self.device)
        self.begin = eager_break_during_capture(self._begin)
        self.caches.allocated = self._allocated
        self.caches.taken = self.parallel.running.forget
        self.cache_config = vllm_config.cache_config
        self.max_tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._streams: Tensor | None = None
        speculative = vllm_config.speculative_config
        if speculative is not None and speculative.method == "mtp":
            width = config.hc_mult * config.hidden_size
            self._streams = torch.zeros(rows, width, dtype=self.parallel.dtype, device=self.device)
        self._read: tuple[int, ...] = ()
        self._compiled_for: tuple[int, int, int] | None = None
        if self.model.first:  # where vLLM looks for what a drafter shares with its target
            self.model.embed_tokens = self.model.embed
        if self.model.last:
            self.lm_head = self.model.head

    def get_mtp_target_hidden_states(self) -> Tensor | None:
        """The last step's streams [T, R * D], what the MTP layer continues from: where captured
        graphs leave them, too."""
        return self._streams

    def set_aux_hidden_state_layers(self, layers: tuple[int, ...]) -> None:
        """A DSpark drafter reads the streams before these layers, which is behind others."""
        self._read = tuple(layer - 1 for layer in layers)

    def get_eagle3_default_aux_hidden_state_layers(self) -> tuple[int, ...]:
        assert self.config.dspark is not None
        return tuple(layer + 1 for layer in self.config.dspark.target_layer_ids)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Raises ValueError where the checkpoint lacks a tensor."""
        mine = ((name, tensor) for name, tensor in weights if not name.startswith(MTP))
        load_weights(self.model, mine, stored_tensors(self.config))
        log.info("%s.", self.model.weight_bytes)
        return {name for name, _ in self.named_parameters()}

    def _allocated(self) -> None:
        """vLLM has bound a set of caches: the one that serves has as many blocks as its
        configuration then says."""
        self._compile()
        if self.caches.window.blocks == self.cache_config.num_gpu_blocks:
            self.caches.report()
            self._report()

    def _compile(self) -> None:
        """Compile what serving needs, once: before vLLM measures memory or captures a graph, or
        when it binds caches, whichever comes first. Strides are compiled in, addresses are not."""
        if not use_triton(self.device) or self._compiled_for == self.caches.strides:
            return
        self._compiled_for = self.caches.strides
        caches, _, _ = nothing(self.model, self.layout, self.device)
        padding = Padding(self.model, self.steps, caches, self.caches.nothing(self.device))
        with override_forward_context(None):
            warm_up(padding, self.device, shapes(self.config, *self.limits), share())

    def _report(self) -> None:
        """One line per rank."""
        storage = self.caches.window.storage
        assert storage is not None
        log.info(
            "Rank %d of %d: layers %d-%d; %s; %.2f GiB of KV cache; workspace of about %.2f GiB "
            "for %d tokens.",
            torch.distributed.get_rank(),
            torch.distributed.get_world_size(),
            self.parallel.stages[self.parallel.stage].start,
            self.parallel.stages[self.parallel.stage].stop - 1,
            self.model.weight_bytes,
            storage.untyped_storage().nbytes() / GIB,
            workspace_bytes(self.config, self.parallel.size, self.max_tokens) / GIB,
            self.max_tokens,
        )

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        out: Tensor = self.model.embed(input_ids)
        return out

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]] | IntermediateTensors:
        """input_ids [T], perhaps padded -> hidden states [T, D]; positions follow from lengths.
        All pipeline stages but the last return the streams [T, R, D] instead; for DSpark there are
        also the means behind the layers that it reads, side by side [T, layers * D]."""
        self._compile()
        self.begin(len(input_ids))
        running = self.parallel.running
        assert running.step is not None
        step, caches, ids = running.step, running.caches, input_ids.int()
        if self._read:
            h, means = self.model.run_read(self.model.spread(ids), ids, step, caches, self._read)
            return self.model.collapse(h), [means]
        if self.model.first and self.model.last and self._streams is None:
            return self.model(ids, step, caches)
        if self.model.first:
            h = self.model.spread(ids)
        else:
            assert intermediate_tensors is not None
            h = intermediate_tensors[STREAMS]
        h = self.model.run(h, ids, step, caches)
        if self._streams is not None:
            self._streams[: len(h)] = h.flatten(1)
        return self.model.collapse(h) if self.model.last else IntermediateTensors({STREAMS: h})

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        shape = (batch_size, self.config.hc_mult, self.config.hidden_size)
        return IntermediateTensors({STREAMS: torch.zeros(shape, dtype=dtype, device=device)})

    def _begin(self, n_tokens: int) -> None:
        """Build the step of so many rows, from what vLLM knows of the running forward."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # before caches exist, or to keep data-parallel ranks in step: padding
            caches, _, ends = nothing(self.model, self.layout, self.device)
            tables = self.caches.nothing(self.device)
            given = tables, ends, ends[:1], n_tokens, n_tokens, n_tokens
        else:
            caches, tables = self.caches.layers(), self.caches.tables(metadata)
            group: GroupMetadata = metadata[self.caches.window.prefix]
            lengths = group.longest_query, group.longest
            given = tables, group.query_start, group.seq_lens, n_tokens, *lengths
        self.parallel.running.begin(self.steps.build(*given), caches)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.parallel.gather_logits(self.model.head(hidden_states))
