"""The attention backend: from SGLang's batch to the core's step, once per forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from dsv4_plugin.cache.device_step import DeviceStepBuilder
from dsv4_plugin.cache.step import Step, StepBuilder
from dsv4_plugin.kernels.dispatch import use_triton
from dsv4_plugin.kernels.step import DeviceStep
from sglang_ext.pool import KVPool

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

NAME = "dsv4_plugin"


class Backend(AttentionBackend):
    """Holds the step of the running forward; the attention itself is the core's."""

    forward_metadata: Step | DeviceStep

    def __init__(self, runner: ModelRunner) -> None:
        super().__init__()
        if not isinstance(runner.token_to_kv_pool, KVPool):
            raise RuntimeError(
                f"attention backend {NAME} serves dsv4-plugin's models only; "
                "leave --attention-backend out"
            )
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.steps = StepBuilder(self.token_to_kv_pool.config, self.token_to_kv_pool.layout)
        self.on_device = use_triton(torch.device(runner.device))

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        batch = forward_batch
        lengths = batch.seq_lens.long()
        extending = batch.forward_mode.is_extend()
        counts = batch.extend_seq_lens.long() if extending else torch.ones_like(lengths)
        request = batch.req_pool_indices.long()
        known = batch.seq_lens_cpu if batch.seq_lens_cpu is not None else lengths
        longest = int(known.max())
        firsts = torch.arange(0, longest, self.token_to_kv_pool.page_size, device=request.device)
        slots = self.req_to_token_pool.req_to_token[request[:, None], firsts]
        tables = self.token_to_kv_pool.tables(slots, request)
        start = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        if self.on_device:
            rows = len(batch.input_ids)
            query = max(batch.extend_seq_lens_cpu) if extending else 1
            builder = self._device_steps(rows, request.device)
            step = builder.build(tables, start, lengths, rows, query, longest)
            self.forward_metadata = step
        else:
            self.forward_metadata = self.steps.build(tables, start, lengths)

    def _device_steps(self, rows: int, device: torch.device) -> DeviceStepBuilder:
        """Fresh buffers: the overlap scheduler prepares a batch while another runs."""
        pool = self.token_to_kv_pool
        return DeviceStepBuilder(pool.config, pool.layout, rows, device)

    def support_triton(self) -> bool:
        return False
