"""Who serves the model on this machine, and why."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.platforms import current_platform

from dsv4_plugin import env
from vllm_ext._compat import has_amx


@dataclass(frozen=True)
class Serving:
    """plugin: the plugin's network serves; reason: half a sentence for the log."""

    plugin: bool
    reason: str


NATIVE_CAPABILITIES = {(9, 0), (10, 0), (10, 3), (12, 0), (12, 1)}
"""CUDA capabilities that vLLM's own V4 kernels are built for."""


def choose() -> Serving:
    """Apply DSV4_MODEL. Raises ValueError on an unknown value."""
    asked = env.MODEL.read()
    if asked != "auto":
        return Serving(asked == "plugin", f"{env.MODEL.name}={asked}")
    if current_platform.is_cpu():
        if has_amx():
            return Serving(False, "this CPU has AMX, which vLLM's own kernels are made for")
        return Serving(True, "vLLM's own needs a CPU with AMX")
    capability = current_platform.get_device_capability()
    if capability is None:
        return Serving(True, "this platform is unknown to vLLM's own")
    level = (capability.major, capability.minor)
    if current_platform.is_cuda() and level not in NATIVE_CAPABILITIES:
        return Serving(True, f"vLLM's own has no kernels for compute capability {level}")
    return Serving(False, "vLLM's own kernels are made for this chip")
