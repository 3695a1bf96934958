"""A small vLLM engine in float32, with a pool in which not all of its requests fit, and how its
generations are compared with transformers'."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.conftest import random_ids
from tests.tolerances import LOGPROB, TIE
from vllm_ext.cache import CacheBlocks

NEW = 64


@contextmanager
def engine(checkpoint: Path, pool: int, **options: Any) -> Iterator[Any]:
    """An `LLM` with `pool` blocks, its caches full of NaN, that prefills 96 tokens at once."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vllm import LLM

    llm = LLM(
        str(checkpoint),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=1024,
        max_num_batched_tokens=96,
        max_num_seqs=16,
        kv_cache_memory_bytes=200 << 20,
        num_gpu_blocks_override=pool,
        enforce_eager=True,
        disable_log_stats=False,
        **options,
    )
    llm.apply_model(poison)
    yield llm
    llm.llm_engine.engine_core.shutdown()


def poison(model) -> None:
    """Fill the caches with NaN: whatever is read before it was written shows."""
    storage = model.caches.window.storage.untyped_storage()
    torch.empty(0).set_(storage)[:] = float("nan")


def entries(llm: Any) -> list[Any]:
    """The plugin's cache entries, as vLLM finds them."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return [entry for entry in context.values() if isinstance(entry, CacheBlocks)]


def rebind(llm: Any, blocks: int | None = None) -> Callable[[], bool]:
    """Take all caches back and bind others, of `blocks` blocks or as many as before, as vLLM does
    around its measurement of graphs. Both sets are full of NaN.

    Returns whether the old set still is: in its place there would be anything by now.
    """
    llm.reset_prefix_cache()
    views = [entry.kv_cache for entry in entries(llm)]
    for entry in entries(llm):
        entry.kv_cache = torch.tensor([])
    old = views[0].untyped_storage()
    new = torch.UntypedStorage(len(old))
    words = [torch.empty(0, dtype=torch.int32).set_(storage) for storage in (old, new)]
    for memory in words:
        memory.fill_(-1)
    for entry, view in zip(entries(llm), views, strict=True):
        assert view.untyped_storage().data_ptr() == old.data_ptr()
        shape = (blocks or len(view), *view.shape[1:])
        again = torch.empty(0, dtype=view.dtype)
        entry.bind_kv_cache(again.set_(new, view.storage_offset(), shape, view.stride()))
    return lambda: bool((words[0] == -1).all())


def sixteen_prompts() -> list[list[int]]:
    """Of 3 to 700 tokens; some share a prefix of 300 or 520 tokens."""
    shared = random_ids(520, seed=20).tolist()
    alone = [random_ids(n, seed=n).tolist() for n in (3, 40, 127, 128, 129, 255, 256, 257, 700)]
    return alone + [
        shared[:n] + random_ids(7 + n % 13, seed=n).tolist()
        for n in (300, 301, 512, 513, 520, 256, 40)
    ]


def generate(llm: Any, prompts: list[list[int]], **more: Any) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=NEW, logprobs=0, ignore_eos=True, detokenize=False, **more
    )
    return llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)


def counters(llm) -> dict[str, float]:
    names = ("num_preemptions", "prefix_cache_hits", "prompt_tokens")
    found = {m.name.removeprefix("vllm:"): m for m in llm.get_metrics()}
    return {name: found[name].value for name in names}


def check(reference, small, prompt, output) -> None:
    """Every token is the reference's best (ties aside), every log-probability its own."""
    ids = list(output.outputs[0].token_ids)
    expected = reference(small, torch.tensor(prompt + ids)).log_softmax(-1)
    answer = expected[len(prompt) - 1 : -1]
    picked = answer.gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert (answer.max(-1).values - picked).max() < TIE
    found = torch.tensor(
        [step[t].logprob for step, t in zip(output.outputs[0].logprobs, ids, strict=True)]
    )
    assert (found - picked).abs().max() < LOGPROB
    if output.prompt_logprobs is not None:
        asked = torch.tensor(prompt[1:])
        found = torch.tensor(
            [
                step[int(t)].logprob
                for step, t in zip(output.prompt_logprobs[1:], asked, strict=True)
            ]
        )
        truth = expected[: len(prompt) - 1].gather(1, asked[:, None])[:, 0]
        assert (found - truth).abs().max() < LOGPROB
