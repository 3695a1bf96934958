"""The local engine: one process, on the CPU or a GPU. For tests, the command line, and readers.

It shows in the least code what an engine owes the network: block tables and lengths per step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dsv4_plugin.cache.layer import LayerCache, bind_layers, block_words
from dsv4_plugin.cache.layout import CacheLayout, resolve_kv_dtype
from dsv4_plugin.cache.paged import BlockTables
from dsv4_plugin.cache.step import Step
from dsv4_plugin.checkpoint.files import check_checkpoint, read_tensors
from dsv4_plugin.checkpoint.load import load_weights
from dsv4_plugin.checkpoint.names import with_drafter
from dsv4_plugin.config import SWA, ModelConfig
from dsv4_plugin.kernels.dispatch import use_triton
from dsv4_plugin.kernels.step import StepBuilder
from dsv4_plugin.model.dspark import DSpark
from dsv4_plugin.model.mtp import MTP
from dsv4_plugin.model.parallel import LocalParallel
from dsv4_plugin.model.transformer import Transformer

log = logging.getLogger("dsv4_plugin")

Drafter = MTP | DSpark
Draft = Literal["one", "block"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load(
    directory: str | Path,
    dtype: str = "auto",
    kv_dtype: str = "auto",
    index_dtype: str = "auto",
    mtp: bool = False,
    device: str = "cpu",
) -> LocalModel:
    """Load a checkpoint folder for local use.

    Args:
        dtype: 'float32', 'bfloat16', or 'auto' (what config.json says).
        kv_dtype: 'float32', 'bfloat16', 'fp8', or 'auto' (float32 for float32 models, else
            bfloat16).
        index_dtype: of indexer keys: 'auto' (as kv_dtype), 'bfloat16', 'fp8' or 'fp4'.
        mtp: load the drafter too, MTP or DSpark, for `generate(num_speculative_tokens=...)`.
        device: 'cpu', or 'cuda' (also 'cuda:1', ...).

    Raises:
        ValueError, FileNotFoundError, NotImplementedError: before any weight is read, in one
            sentence that names the field or tensor and what is allowed.
    """
    config = ModelConfig.from_pretrained(directory)
    place = _usable(device)
    dtype = config.torch_dtype if dtype == "auto" else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed are auto, {', '.join(DTYPES)}")
    kv_dtype = resolve_kv_dtype(kv_dtype, dtype)
    layout = CacheLayout.of(config, kv_dtype, index_dtype=index_dtype)
    if use_triton(place):
        layout.require_kernel_rows()
    headers = check_checkpoint(config, directory, mtp)
    parallel = LocalParallel(config, DTYPES[dtype])
    with place:
        model = Transformer(config, parallel)
    load_weights(model, read_tensors(headers))
    drafter: Drafter | None = None
    if mtp:
        drafting = with_drafter(config, headers)
        with place:
            drafter = (MTP if drafting.dspark is None else DSpark)(drafting, parallel)
        load_weights(drafter, read_tensors(headers, progress=False, mtp=True))
    log.info("%s.", model.weight_bytes)
    grown = layout.growth(config.compress_ratios)
    log.info("KV cache: %s, %.0f bytes per token.", layout.rows_named(), grown)
    return LocalModel(model, layout, drafter)


def _usable(device: str) -> torch.device:
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or not (number.isdecimal() or kind == device):
        raise ValueError(f"device is {device!r}; allowed are cpu, cuda, cuda:0, cuda:1, ...")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {device!r}; torch finds {torch.cuda.device_count()} GPUs here; 'cpu' is "
            "always allowed"
        )
    return torch.device(device)


class LocalModel:
    """A loaded network with caches of its own for each call."""

    def __init__(
        self, model: Transformer, layout: CacheLayout, drafter: Drafter | None = None
    ) -> None:
        self.model, self.drafter = model, drafter
        self.config = model.config
        self.layout = layout

    @torch.inference_mode()
    def logits(self, ids: Tensor, chunk: int = 256) -> Tensor:
        """Logits after every token: LongTensor [T] -> FloatTensor [T, vocab], in paged chunks."""
        batch = Batch(self.model, self.layout, [len(ids)], chunk)
        parts = [
            self.model.head(batch.run([(0, ids[a : a + chunk])]).float())
            for a in range(0, len(ids), chunk)
        ]
        return torch.cat(parts)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        chunk: int = 2048,
        ignore_eos: bool = False,
        num_speculative_tokens: int = 0,
        confidence: float = 0.0,
    ) -> list[list[int]]:
        """Continue every prompt by up to max_new_tokens ids, ending with eos where it comes.

        Args:
            temperature: 0 is greedy; else logits are divided by it and sampled.
            seed: of the sampler; None is a fresh one.
            chunk: most prompt tokens per step.
            num_speculative_tokens: tokens that the drafter adds per step; the answers are those of
                0, sooner where drafts are right. DSpark adds 1 to 5.
            confidence: of DSpark: drafts that are less likely to be right (0 to 1), and those
                behind them, are not looked at.

        Raises:
            ValueError: an empty prompt, an id outside the vocabulary, or drafts that no drafter
                makes.
        """
        for i, prompt in enumerate(prompts):
            if len(prompt) == 0 or not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
                raise ValueError(
                    f"prompts[{i}] must hold at least one id from 0 to {self.config.vocab_size - 1}"
                )
        sampler = Sampler(temperature, seed)
        if num_speculative_tokens:
            # Speculating is a way of running this engine, so it imports it.
            from dsv4_plugin.speculate import Speculator

            speculator = Speculator(self, num_speculative_tokens, confidence)
            return speculator.generate(prompts, max_new_tokens, sampler, chunk, ignore_eos)
        batch = Batch(self.model, self.layout, [len(p) + max_new_tokens for p in prompts], chunk)
        token = sampler(self.model.head(batch.prefill([torch.tensor(p) for p in prompts]).float()))
        out: list[list[int]] = [[] for _ in prompts]
        running = list(range(len(prompts)))
        for _ in range(max_new_tokens):
            for b, t in zip(running, token.tolist(), strict=True):
                out[b].append(t)
            keep = [
                i
                for i, b in enumerate(running)
                if len(out[b]) < max_new_tokens
                and (ignore_eos or out[b][-1] != self.config.eos_token_id)
            ]
            running, token = [running[i] for i in keep], token[keep]
            if not running:
                break
            token = sampler(self.model.head(batch.decode(running, token).float()))
        return out

    @torch.inference_mode()
    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, temperature: float = 0.0
    ) -> Iterator[int]:
        """The ids of `generate` for one prompt, one by one as they come."""
        sampler = Sampler(temperature, None)
        batch = Batch(self.model, self.layout, [len(prompt) + max_new_tokens], 2048)
        token = sampler(self.model.head(batch.prefill([torch.tensor(prompt)]).float()))
        for step in range(max_new_tokens):
            yield int(token)
            if int(token) == self.config.eos_token_id or step == max_new_tokens - 1:
                return
            token = sampler(self.model.head(batch.decode([0], token).float()))


class Sampler:
    def __init__(self, temperature: float, seed: int | None) -> None:
        if not temperature >= 0:
            raise ValueError(f"temperature is {temperature}; it must be 0 or more")
        self.temperature = temperature
        self.generator = torch.Generator()
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def __call__(self, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(-1)
        p = (logits.float().cpu() / self.temperature).softmax(-1)
        return p.multinomial(1, generator=self.generator)[:, 0]


class Batch:
    """Requests in flight, with block tables fixed from the start, where the model's weights are.

    Every request owns the pages of its final length, a ring, and as many window blocks as a step
    can touch, used in turn; draft layers have window rows of their own, and take at most
    `draft_rows` rows of a request at once. `poison` fills fresh caches with NaN, so that a stray
    read shows.
    """

    def __init__(
        self,
        model: Transformer,
        layout: CacheLayout,
        max_lengths: Sequence[int],
        chunk: int,
        poison: bool = False,
        draft_layers: int = 0,
        draft_rows: int = 1,
    ) -> None:
        self.model, self.chunk = model, chunk
        self.device = next(model.parameters()).device
        config, page_size = model.config, layout.page_size
        rows = max(chunk, len(max_lengths) * layout.ring_rows)
        self.builder = StepBuilder(config, layout, rows, self.device)
        rows = max(rows, len(max_lengths) * draft_rows)
        self.draft_builder = StepBuilder(config, layout.windows_only(), rows, self.device)
        n, longest = len(max_lengths), max(max_lengths)
        pages = -(-longest // page_size)
        turns = -(-(config.sliding_window - 1 + min(chunk, longest)) // layout.window_block) + 1
        ratios = [*model.ratios, *[SWA] * draft_layers]
        device = self.device
        buffers, strides = allocate(ratios, layout, n * turns, n * pages, n, poison, device)
        self.caches = buffers
        request = torch.arange(n, device=device)[:, None]
        blocks = torch.arange(-(-longest // layout.window_block), device=device)
        self.tables = BlockTables(
            window=request * turns + blocks % turns,
            page=request * pages + torch.arange(pages, device=device),
            ring=request[:, 0],
            window_stride=strides[0],
            page_stride=strides[1],
            ring_stride=strides[2],
        )
        self.lengths = torch.zeros(n, dtype=torch.int64)

    def step(self, requests: Tensor, counts: Tensor, draft: Draft | None = None) -> Step:
        """The next `counts` tokens of some requests, int64 [G] each on the CPU; draft: of layers
        that draft, one after the other or in blocks."""
        self.lengths[requests] += counts
        t, chosen = self.tables, requests.to(self.device)
        tables = BlockTables(
            t.window[chosen], t.page[chosen], t.ring[chosen],
            t.window_stride, t.page_stride, t.ring_stride,
        )  # fmt: skip
        start, lengths = torch.nn.functional.pad(counts.cumsum(0), (1, 0)), self.lengths[requests]
        most = int(start[-1]), int(counts.max()), int(lengths.max())
        on_device = start.int().to(self.device), lengths.int().to(self.device)
        if draft is None:
            return self.builder.build(tables, *on_device, *most)
        return self.draft_builder.build(tables, *on_device, *most, together=draft == "block")

    def run(self, work: Sequence[tuple[int, Tensor]]) -> Tensor:
        """One step: the next ids of some requests -> hidden states of all of them, flat."""
        requests = torch.tensor([b for b, _ in work])
        counts = torch.tensor([len(ids) for _, ids in work])
        step = self.step(requests, counts)
        ids = torch.cat([ids for _, ids in work]).to(self.device)
        hidden: Tensor = self.model(ids, step, self.caches)
        return hidden

    def decode(self, requests: Sequence[int], token: Tensor) -> Tensor:
        """One token each -> hidden states [G, D]."""
        step = self.step(torch.tensor(requests), torch.ones(len(requests), dtype=torch.int64))
        hidden: Tensor = self.model(token.to(self.device), step, self.caches)
        return hidden

    def prefill(self, prompts: Sequence[Tensor]) -> Tensor:
        """Whole prompts, `chunk` tokens a step -> hidden state after each prompt [B, D]."""
        last: list[Tensor] = []
        queue = list(enumerate(prompts))
        while queue:
            work, room = [], self.chunk
            while queue and room:
                b, ids = queue.pop(0)
                work.append((b, ids[:room]))
                if len(ids) > room:
                    queue.insert(0, (b, ids[room:]))
                room -= len(work[-1][1])
            hidden = self.run(work)
            ends = torch.tensor([len(ids) for _, ids in work]).cumsum(0) - 1
            finished = ends[:-1] if queue and queue[0][0] == work[-1][0] else ends
            last.append(hidden[finished])
        return torch.cat(last)


def allocate(
    ratios: Sequence[int],
    layout: CacheLayout,
    windows: int,
    pages: int,
    rings: int,
    poison: bool,
    device: torch.device | str = "cpu",
) -> tuple[list[LayerCache], tuple[int, int, int]]:
    """Storage for all layers, one buffer per kind of block, layers side by side in a block."""

    def buffer(blocks: int, words: int) -> Tensor:
        nan = torch.tensor(float("nan")).view(torch.int32).item() if poison else 0
        return torch.full((blocks * words,), int(nan), dtype=torch.int32, device=device)

    strides = block_words(layout, ratios)
    counts = (windows, pages, rings)
    buffers = [buffer(n, w) for n, w in zip(counts, strides, strict=True)]
    return bind_layers(layout, ratios, *buffers), strides
