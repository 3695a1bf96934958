"""Ranks as threads of one process: every split of the network without an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from dsv4_plugin.checkpoint.files import check_checkpoint, read_headers, read_tensors
from dsv4_plugin.checkpoint.load import load_weights
from dsv4_plugin.checkpoint.names import with_int4
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.model.parallel import LocalParallel, MakeExperts, RankParallel
from dsv4_plugin.model.transformer import Transformer

T = TypeVar("T")


class Ranks:
    """`size` threads that run the same function; `all_reduce` sums over them, `all_gather`
    puts their rows one below the other."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.mine = threading.local()
        self.parts: list[Tensor] = [torch.empty(0)] * size

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._together(x, lambda parts: sum(parts[1:], parts[0]))

    def all_gather(self, x: Tensor) -> Tensor:
        return self._together(x, torch.cat)

    def _together(self, x: Tensor, combine: Callable[[list[Tensor]], Tensor]) -> Tensor:
        self.parts[self.mine.rank] = x
        self.barrier.wait(60)
        found = combine(self.parts)
        self.barrier.wait(60)
        return found

    def run(self, function: Callable[[int], T]) -> list[T]:
        """function(rank) of every rank; a failing rank breaks the others' barrier."""

        def one(rank: int) -> T:
            self.mine.rank = rank
            try:
                with torch.inference_mode():
                    return function(rank)
            except BaseException:
                self.barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))

    def load(self, directory: Path, expert_parallel: bool = False) -> list[Transformer]:
        config = ModelConfig.from_pretrained(directory)
        config = with_int4(config, read_headers(directory))

        def one(rank: int) -> Transformer:
            parallel = RankParallel(
                config, torch.float32, rank, self.size, self.all_reduce, expert_parallel
            )
            model = Transformer(config, parallel)
            headers = check_checkpoint(config, directory)
            load_weights(model, read_tensors(headers, progress=False))
            return model

        return self.run(one)


class DataParallel(LocalParallel):
    """A network of one process but for its experts, which vLLM's adapter spreads over data-parallel
    ranks."""

    expert_parallel = True

    def experts(self, prefix: str, make: MakeExperts | None = None) -> nn.Module:
        from vllm_ext.parallel import VllmParallel

        return VllmParallel.experts(self, prefix, make)


class DataGroup:
    """A rank's view of vLLM's data-parallel group, whose ranks are threads."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.ranks, self.rank_in_group, self.world_size = ranks, rank, ranks.size

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        assert dim == 0
        return self.ranks.all_gather(x)

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.ranks.all_reduce(x)
