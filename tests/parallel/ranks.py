"""Ranks as threads of one process: every split of the network without an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from dsv4_plugin.checkpoint.files import check_checkpoint, read_tensors
from dsv4_plugin.checkpoint.load import load_weights
from dsv4_plugin.config import ModelConfig
from dsv4_plugin.model.parallel import RankParallel
from dsv4_plugin.model.transformer import Transformer

T = TypeVar("T")


class Ranks:
    """`size` threads that run the same function; `all_reduce` sums over them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.mine = threading.local()
        self.parts: list[Tensor] = [torch.empty(0)] * size

    def all_reduce(self, x: Tensor) -> Tensor:
        self.parts[self.mine.rank] = x
        self.barrier.wait(60)
        total = sum(self.parts[1:], self.parts[0])
        self.barrier.wait(60)
        return total

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

        def one(rank: int) -> Transformer:
            parallel = RankParallel(
                config, torch.float32, rank, self.size, self.all_reduce, expert_parallel
            )
            model = Transformer(config, parallel)
            headers = check_checkpoint(config, directory)
            load_weights(model, read_tensors(headers, progress=False), rank)
            return model

        return self.run(one)
