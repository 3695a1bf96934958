"""The attention backend: from SGLang's batch to the core's step, once per forward.

On a GPU a decode step is captured in a CUDA graph. What differs from step to step then lies in
buffers: block tables, which are filled before a replay, and SGLang's own lengths and request rows,
which the graph reads. Rows beyond the batch have length 0 and are padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from torch import Tensor

from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.cache.step import Step
from dsv4_plugin.kernels.dispatch import use_triton
from dsv4_plugin.kernels.step import StepBuilder
from dsv4_plugin.model.mtp import MTP
from dsv4_plugin.warmup import MTPPadding, Padding, shapes, warm_up
from sglang_ext.pool import KVPool, drafts

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

NAME = "dsv4_plugin"


class Backend(AttentionBackend):
    """Holds the step of the running forward; the attention itself is the core's.

    Pools are asked for in every step: they are the runner's, which may replace them.
    """

    forward_metadata: Step

    def __init__(self, runner: ModelRunner, ahead: int = 0) -> None:
        """ahead: of a decode step, tokens behind the length that SGLang says (`DraftSteps`)."""
        super().__init__()
        if not isinstance(runner.token_to_kv_pool, KVPool):
            raise RuntimeError(
                f"attention backend {NAME} serves dsv4-plugin's models only; "
                "leave --attention-backend out"
            )
        self.runner, self.ahead = runner, ahead
        if ahead:
            self.steps = self._builder(self.requests)
            return
        args, device = runner.server_args, torch.device(runner.device)
        chunk = args.chunked_prefill_size or 0
        verified = self.requests * (1 + drafts())
        rows = max(chunk if chunk > 0 else args.max_prefill_tokens, verified)
        self.steps = self._builder(rows)
        if use_triton(device):
            self._warm_up(device)

    def _builder(self, rows: int) -> StepBuilder:
        pool = self.token_to_kv_pool
        return StepBuilder(pool.config, pool.layout, rows, self.runner.device)

    @property
    def token_to_kv_pool(self) -> KVPool:
        pool: KVPool = self.runner.token_to_kv_pool
        return pool

    @property
    def req_to_token_pool(self) -> Any:
        return self.runner.req_to_token_pool

    @property
    def requests(self) -> int:
        return int(self.req_to_token_pool.size)

    @property
    def longest(self) -> int:
        """Tokens of a request, at most."""
        return int(self.req_to_token_pool.req_to_token.shape[1])

    def _warm_up(self, device: torch.device) -> None:
        """Compile what serving needs, before a graph is captured."""
        pool, parallel = self.token_to_kv_pool, self.runner.model.parallel
        strides = pool.window.stride, pool.page.stride, pool.ring.stride
        tables = BlockTables.of_nothing(strides, device)
        network = self.runner.model.model
        kind = MTPPadding if isinstance(network, MTP) else Padding
        padding = kind(network, self.steps, pool.layers, tables)
        longest = self.longest if pool.layout.page else pool.config.sliding_window
        needed = shapes(pool.config, self.steps.rows, self.requests, longest, drafts())
        warm_up(padding, device, needed, (parallel.rank, parallel.size))

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Of a step that is not replayed. SGLang's lengths are those after the step, but for drafts
        that are verified, and those that are drafted one by one."""
        batch, mode = forward_batch, forward_batch.forward_mode
        lengths, longest = batch.seq_lens.int(), self._longest(batch)
        query, ahead = 1, self.ahead
        if mode.is_target_verify():
            query = ahead = batch.spec_info.draft_token_num
        counts = torch.full_like(lengths, query)
        if mode.is_extend_or_draft_extend_or_mixed(include_draft_extend_v2=True):
            counts, query = batch.extend_seq_lens, max(batch.extend_seq_lens_cpu)
        start = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
        rows = len(lengths) if mode.is_decode() else len(batch.input_ids)
        lengths, longest = lengths + ahead, longest + ahead
        if rows > self.steps.rows:  # more than SGLang said
            self.steps = self._builder(rows)
        self.forward_metadata = self.steps.build(
            self._tables(batch, longest), start, lengths, rows, query, longest
        )

    @staticmethod
    def _longest(batch: ForwardBatch) -> int:
        known = batch.seq_lens_cpu if batch.seq_lens_cpu is not None else batch.seq_lens
        return int(known.max())

    def _tables(self, batch: ForwardBatch, longest: int) -> BlockTables:
        """Of every request, as far as the longest needs them."""
        pool, request = self.token_to_kv_pool, batch.req_pool_indices.long()
        firsts = torch.arange(0, max(1, longest), pool.page_size, device=request.device)
        slots = self.req_to_token_pool.req_to_token[request[:, None], firsts]
        return pool.tables(slots, request)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Buffers that graphs of at most max_bs requests, one token each, read."""
        assert max_num_tokens == max_bs
        pool, device = self.token_to_kv_pool, torch.device(self.runner.device)
        blocks = -(-self.longest // pool.page_size)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.graph_steps = self._builder(max_bs)
        self.graph_window, self.graph_page = zeros(max_bs, blocks), zeros(max_bs, blocks)
        self.graph_ring = zeros(max_bs)
        self.graph_rows = torch.arange(max_bs + 1, dtype=torch.int32, device=device)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Of requests beyond the batch."""
        return 0

    def init_forward_metadata_out_graph(
        self, forward_batch: ForwardBatch, in_capture: bool = False
    ) -> None:
        """Fill the block tables, before a capture or replay."""
        found = self._tables(forward_batch, self._longest(forward_batch))
        n, blocks = found.page.shape
        self.graph_window[:n, :blocks] = found.window
        self.graph_page[:n, :blocks] = found.page
        self.graph_ring[:n] = found.ring

    def init_forward_metadata_in_graph(self, forward_batch: ForwardBatch) -> None:
        """Recorded: the step, of lengths and tables as they are when it is replayed. Made for the
        longest request there may be; kernels go by the lengths on the device."""
        lengths = forward_batch.seq_lens.int()
        n = len(lengths)
        real = (lengths > 0).sum(dtype=torch.int32)
        pool = self.token_to_kv_pool
        tables = BlockTables(
            self.graph_window[:n], self.graph_page[:n], self.graph_ring[:n],
            pool.window.stride, pool.page.stride, pool.ring.stride,
        )  # fmt: skip
        start = torch.minimum(self.graph_rows[: n + 1], real)
        self.forward_metadata = self.graph_steps.build(tables, start, lengths, n, 1, self.longest)

    def support_triton(self) -> bool:
        return False


class DraftSteps:
    """What SGLang's EAGLE worker has as the backend of its drafts: one for each behind the first,
    which all are of the same lengths and write one row further each."""

    def __init__(self, runner: ModelRunner, number: int) -> None:
        self.attn_backends = [Backend(runner, ahead + 1) for ahead in range(number)]

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)
