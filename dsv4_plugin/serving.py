"""Who serves the model on this machine, and why; what both adapters ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from dsv4_plugin import env
from dsv4_plugin.checkpoint.files import INDEX, read_headers
from dsv4_plugin.checkpoint.names import int4_modules as found_int4
from dsv4_plugin.config import CONFIG, HF_QUANT, ModelConfig, read_hf
from dsv4_plugin.json_file import read_object

NATIVE_CAPABILITIES = {(9, 0), (10, 0), (10, 3), (12, 0), (12, 1)}
"""CUDA capabilities that the engines' own V4 kernels are built for."""


@dataclass(frozen=True)
class Serving:
    """plugin: the plugin's network serves; reason: half a sentence for the log."""

    plugin: bool
    reason: str


def choose(automatically: Callable[[], Serving]) -> Serving:
    """Apply DSV4_MODEL; `auto` is what the engine's adapter says. Raises ValueError on an unknown
    value."""
    asked = env.MODEL.read()
    if asked != "auto":
        return Serving(asked == "plugin", f"{env.MODEL.name}={asked}")
    return automatically()


def by_capability(engine: str, capability: tuple[int, int]) -> Serving:
    """On a CUDA device."""
    if capability not in NATIVE_CAPABILITIES:
        return Serving(True, f"{engine}'s own has no kernels for compute capability {capability}")
    return Serving(False, f"{engine}'s own kernels are made for this chip")


def config_json(
    model: str, revision: str | None, overrides: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json of a checkpoint folder or hub name, with what hf_quant_config.json adds and the
    user overrides. Needs transformers, which both engines bring."""
    from transformers.utils.hub import cached_file

    optional = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    path = cached_file(model, CONFIG, revision=revision)
    assert path is not None
    found = read_hf(path, cached_file(model, HF_QUANT, revision=revision, **optional))
    return found | dict(overrides or {})


@lru_cache(maxsize=4)
def int4_modules(model: str, revision: str | None = None) -> frozenset[str] | None:
    """`names.int4_modules` of a checkpoint folder or hub name, which is asked for its index only;
    None where it has none, as one without weights."""
    if Path(model).is_dir():
        weights = any(Path(model).glob("*.safetensors"))
        return found_int4(read_headers(model)) if weights else None
    from transformers.utils.hub import cached_file

    optional = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    path = cached_file(model, INDEX, revision=revision, **optional)
    return None if path is None else found_int4(read_object(path).get("weight_map") or {})


def with_int4(config: ModelConfig, model: str, revision: str | None = None) -> ModelConfig:
    """With what only the tensors of GPTQ's checkpoints say."""
    if config.experts != "gptq":
        return config
    return replace(config, int4_modules=int4_modules(model, revision))
