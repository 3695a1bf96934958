"""The local engine: one process, on the CPU or a GPU. For tests, the command line, and readers."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsv4_plugin.batch import Batch, Sampler
from dsv4_plugin.cache.layout import CacheLayout, resolve_kv_dtype
from dsv4_plugin.checkpoint.files import check_checkpoint, read_tensors
from dsv4_plugin.checkpoint.load import load_weights
from dsv4_plugin.checkpoint.names import with_drafter, with_int4
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.kernels.dispatch import use_triton
from dsv4_plugin.model.dspark import DSpark
from dsv4_plugin.model.mtp import MTP
from dsv4_plugin.model.parallel import LocalParallel
from dsv4_plugin.model.transformer import Transformer
from dsv4_plugin.speculate import Drafter, Speculator

log = logging.getLogger("dsv4_plugin")

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
    config = with_int4(config, headers)
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
            self.model.head(batch.run([(0, ids[a : a + chunk])])) for a in range(0, len(ids), chunk)
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
        if max_new_tokens < 1:
            return [[] for _ in prompts]
        if num_speculative_tokens:
            speculator = Speculator(self, num_speculative_tokens, confidence)
            return speculator.generate(prompts, max_new_tokens, sampler, chunk, ignore_eos)
        batch = Batch(self.model, self.layout, [len(p) + max_new_tokens for p in prompts], chunk)
        token = sampler(self.model.head(batch.prefill([torch.tensor(p) for p in prompts])))
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
            token = sampler(self.model.head(batch.decode(running, token)))
        return out

    @torch.inference_mode()
    def stream(
        self, prompt: Sequence[int], max_new_tokens: int, temperature: float = 0.0
    ) -> Iterator[int]:
        """The ids of `generate` for one prompt, one by one as they come."""
        sampler = Sampler(temperature, None)
        batch = Batch(self.model, self.layout, [len(prompt) + max_new_tokens], 2048)
        token = sampler(self.model.head(batch.prefill([torch.tensor(prompt)])))
        for step in range(max_new_tokens):
            yield int(token)
            if int(token) == self.config.eos_token_id or step == max_new_tokens - 1:
                return
            token = sampler(self.model.head(batch.decode([0], token)))
