"""The plugin's model and chat layer, put into vLLM's registries."""

from __future__ import annotations

import logging

from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.registry import ModelRegistry

from dsv4_plugin import env
from dsv4_plugin.config import V41_ARCHITECTURE
from vllm_ext._compat import accept_fp4_indexer_option, require_tested_version
from vllm_ext.active import CHAT, DRAFTER_ARCHITECTURE, DRAFTERS, MODEL, MODELS, registries
from vllm_ext.choice import choose
from vllm_ext.config import DrafterConfig, NativeConfig, PluginConfig, V41Config


def register_all() -> None:
    """Register the model (where the plugin serves it) and the chat layer."""
    require_tested_version()
    _show_the_core_s_log()

    if choose().plugin:
        accept_fp4_indexer_option()
        for name in MODELS:
            ModelRegistry.register_model(name, ":".join(MODEL))
        for name, drafter in DRAFTERS.items():
            ModelRegistry.register_model(name, ":".join(drafter))
        MODELS_CONFIG_MAP.update(dict.fromkeys(MODELS, PluginConfig))
        MODELS_CONFIG_MAP[DRAFTER_ARCHITECTURE] = DrafterConfig
        MODELS_CONFIG_MAP[V41_ARCHITECTURE] = V41Config
    else:
        MODELS_CONFIG_MAP.update(dict.fromkeys(MODELS, NativeConfig))
    if env.CHAT.read() == "plugin":
        for mode, parts in CHAT.items():
            for what, registry in registries().items():
                registry[mode] = parts[what]


def _show_the_core_s_log() -> None:
    """Chosen kernels, weights, warm-up: vLLM shows what its own loggers say, and no others."""
    core, engine = logging.getLogger("dsv4_plugin"), logging.getLogger("vllm")
    core.setLevel(engine.getEffectiveLevel())
    for handler in engine.handlers:
        if handler not in core.handlers:
            core.addHandler(handler)
