"""CUDA graphs on a CPU: what runs while one is captured is recorded, and run again on the same
tensors when it is replayed.

A capture launches nothing, and what it made holds NaN until the first replay; torch's operations
run once for their shapes. One that reads a value raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from lab.kit.targets import FakeGPU

READS = ("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.equal", "aten.is_nonzero")


def _addresses(value: Any) -> set[int]:
    """Of all tensors' storages; weights that mkldnn has packed have none."""
    tensors = [t for t in tree_leaves(value) if isinstance(t, Tensor) and not t.is_mkldnn]
    return {t.untyped_storage().data_ptr() for t in tensors}


class _Recorder(TorchDispatchMode):
    def __init__(self, record: list[Callable[[], None]]) -> None:
        super().__init__()
        self.record, self.made = record, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert not str(func).startswith(READS), f"{func} in a captured graph"
        result = func(*args, **kwargs)
        given = _addresses((args, kwargs))
        new = [
            (i, t) for i, t in enumerate(tree_leaves(result))
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given
        ]  # fmt: skip
        self.made += [t for _, t in new]
        if "empty" in str(func):
            return result

        def again() -> None:
            leaves = tree_leaves(func(*args, **kwargs))
            for i, tensor in new:
                tensor.copy_(leaves[i])

        self.record.append(again)
        return result


class RecordedGraph:
    """Stands in for torch.cuda.CUDAGraph, under an `EmulatedGPU`."""

    current: ClassVar[RecordedGraph | None] = None

    def __init__(self) -> None:
        self.record: list[Callable[[], None]] = []
        self.launches = 0

    def capture_begin(self, pool: object = None) -> None:
        assert RecordedGraph.current is None
        RecordedGraph.current = self
        self._mode = _Recorder(self.record)
        self._mode.__enter__()

    def capture_end(self) -> None:
        RecordedGraph.current = None
        self._mode.__exit__(None, None, None)
        for tensor in self._mode.made:
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
        del self._mode

    def launch(self, run: Callable[[], None]) -> None:
        self.launches += 1
        self.record.append(run)

    def replay(self) -> None:
        assert RecordedGraph.current is None
        for run in self.record:
            run()


@contextmanager
def recorded(gpu: FakeGPU, monkeypatch: Any) -> Iterator[None]:
    """Inside, torch.cuda.CUDAGraph records, launches of the emulated GPU among the rest."""
    emulate = type(gpu).launch

    def launch(self: FakeGPU, *args: Any) -> None:
        def run() -> None:
            with _disable_current_modes():
                emulate(self, *args)

        if RecordedGraph.current is not None:
            RecordedGraph.current.launch(run)
        else:
            run()

    with monkeypatch.context() as patch:
        patch.setattr(type(gpu), "launch", launch)
        patch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
        yield


@contextmanager
def recorded_interpreter(monkeypatch: Any) -> Iterator[None]:
    """Inside, torch.cuda.CUDAGraph records, launches of Triton's interpreter among the rest."""
    from triton.runtime.interpreter import GridExecutor

    interpret = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        def run() -> None:
            with _disable_current_modes():
                interpret(self, *args, **kwargs)

        if RecordedGraph.current is not None:
            RecordedGraph.current.launch(run)
        else:
            run()

    with monkeypatch.context() as patch:
        patch.setattr(GridExecutor, "__call__", launch)
        patch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
        yield
