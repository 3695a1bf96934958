"""Compile Triton launches for GPUs that are absent.

    with FakeGPU("sm86") as gpu:
        op(*tensors)  # the real wrapper, with CPU or meta tensors
    for kernel, grid in gpu.compiled():
        ...

Every launch is specialised and compiled as on that GPU, shared memory checked against its limit
(OutOfResources); nothing is executed. Not in a process with TRITON_INTERPRET set.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm86": GPUTarget("cuda", 86, 32),
    "sm89": GPUTarget("cuda", 89, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm103": GPUTarget("cuda", 103, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "sm121": GPUTarget("cuda", 121, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
SHARED_LIMIT = {
    "sm80": 163 << 10, "sm86": 99 << 10, "sm89": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10,
    "sm103": 227 << 10, "sm120": 99 << 10, "sm121": 99 << 10, "gfx942": 64 << 10,
    "gfx950": 160 << 10,
}  # fmt: skip
"""Bytes of shared memory a block may ask for."""


class _Utils:
    def __init__(self, name: str) -> None:
        self.name = name

    def get_device_properties(self, device: object) -> dict[str, Any]:
        return {
            "max_shared_mem": SHARED_LIMIT[self.name], "max_num_regs": 65536,
            "multiprocessor_count": 108, "sm_clock_rate": 0, "mem_clock_rate": 0,
            "mem_bus_width": 0, "warpSize": TARGETS[self.name].warp_size, "arch": self.name,
        }  # fmt: skip

    def load_binary(self, name: str, *_: Any) -> tuple[object, str, int, int, int]:
        return object(), name, 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass


class _Launcher:
    """What Triton keeps with a compiled kernel: hands launches to the active driver."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        """rest: stream, function, packed metadata, launch metadata, two hooks, then arguments."""
        gpu = driver.active
        gpu.launches.append((self.source, self.metadata, (x, y, z)))
        gpu.launch(self.source, self.metadata, (x, y, z), rest[6:])


class FakeGPU:
    """Triton's active driver inside a `with`: compiles for `name` and records launches."""

    def __init__(self, name: str) -> None:
        self.name, self.target, self.utils = name, TARGETS[name], _Utils(name)
        self.launches: list[tuple[Any, Any, tuple[int, int, int]]] = []

    launcher_cls = _Launcher

    def launch(self, source: Any, metadata: Any, grid: tuple[int, int, int], args: Any) -> None:
        """What a launch does beyond being recorded."""

    # Triton's interface of a driver.
    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        """Compiled kernels are remembered by it: one name per target."""
        return f"fake:{self.name}"

    def set_current_device(self, device: object) -> None:
        pass

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def __enter__(self) -> Self:
        driver.set_active(self)
        return self

    def __exit__(self, *_: object) -> None:
        driver._active = None

    def kernel(self, source: Any, metadata: Any) -> Any:
        """The compiled kernel of a launch."""
        known = source.fn.device_caches[self.get_current_device()][0].values()
        return next(k for k in known if k.hash == metadata.hash)

    def compiled(self) -> list[tuple[Any, tuple[int, int, int]]]:
        """Each distinct kernel with its first grid, in order of launch."""
        first: dict[str, tuple[Any, tuple[int, int, int]]] = {}
        for source, metadata, grid in self.launches:
            if metadata.hash not in first:
                first[metadata.hash] = (self.kernel(source, metadata), grid)
        return list(first.values())


def triton_knows(name: str) -> bool:
    """Can this Triton compile for the target?"""
    try:
        triton.compiler.make_backend(TARGETS[name]).parse_options({})
    except (RuntimeError, ValueError, AssertionError):
        return False
    return True
