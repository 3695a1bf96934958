"""Who serves the model on this machine, and why."""

from __future__ import annotations

from vllm.platforms import current_platform

from dsv4_plugin import serving
from dsv4_plugin.serving import Serving
from vllm_ext._compat import has_amx


def choose() -> Serving:
    """Apply DSV4_MODEL. Raises ValueError on an unknown value."""
    return serving.choose(_automatically)


def _automatically() -> Serving:
    if current_platform.is_cpu():
        if has_amx():
            return Serving(False, "this CPU has AMX, which vLLM's own kernels are made for")
        return Serving(True, "vLLM's own needs a CPU with AMX")
    capability = current_platform.get_device_capability()
    if capability is None:
        return Serving(True, "this platform is unknown to vLLM's own")
    if not current_platform.is_cuda():
        return Serving(False, "vLLM's own kernels are made for this chip")
    return serving.by_capability("vLLM", (capability.major, capability.minor))
