"""What is put into SGLang's registries and hooks, and the check that it is still there."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from dsv4_plugin import env
from dsv4_plugin.config import ARCHITECTURE
from sglang_ext import hooks
from sglang_ext.choice import choose

log = logging.getLogger("sglang.srt.dsv4")

MODELS = "sglang_ext.models"
EXTERNAL = "SGLANG_EXTERNAL_MODEL_PACKAGE"
ADJUSTMENTS = "handle_model_specific_adjustments"
ENVIRONMENT = "handle_environment_variables"
CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
HOOKS = (
    (
        "sglang.srt.configs.model_config.ModelConfig.from_server_args",
        hooks.remember_device,
        HookType.AROUND,
    ),
    (
        "sglang.srt.utils.hf_transformers.config.get_config",
        hooks.take_over_config,
        HookType.AFTER,
    ),
    (
        "sglang.srt.model_executor.pool_configurator.create_memory_pool_configurator",
        hooks.pool_sizer,
        HookType.AROUND,
    ),
    (f"{CONFIGURATOR}._build_token_to_kv_pool", hooks.build_pool, HookType.AROUND),
    (
        "sglang.srt.mem_cache.kv_cache_dtype.configure_kv_cache_dtype",
        hooks.kv_cache_dtype,
        HookType.AROUND,
    ),
    (
        "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat._validate_request",
        hooks.settle_request,
        HookType.AROUND,
    ),
    (
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.force_exit_handler",
        hooks.end_streams,
        HookType.AROUND,
    ),
)
"""Target, hook, kind."""


def register_all() -> None:
    """Register hooks, model, backend and defaults; whether they act is decided per model."""
    registered = HookRegistry._hooks
    for target, hook, kind in HOOKS:
        if hook not in [found for _, found, _ in registered.get(target, ())]:
            HookRegistry.register(target, hook, kind)
    _register_model()
    _register_backend()
    _register_defaults()
    _register_chat()


def _register_model() -> None:
    """By SGLang's own door for external models, which also spares it importing all of its own."""
    if "sglang.srt.models.registry" not in sys.modules:
        os.environ.setdefault(EXTERNAL, MODELS)
        if os.environ[EXTERNAL] == MODELS:
            return
    from sglang.srt.models.registry import ModelRegistry

    from sglang_ext.models.deepseek_v4 import EntryClass

    ModelRegistry.models[EntryClass.__name__] = EntryClass


def _register_backend() -> None:
    from sglang.srt.arg_groups.choices import (
        ATTENTION_BACKEND_CHOICES,
        add_attention_backend_choices,
    )
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from sglang_ext.backend import NAME, Backend

    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
    ATTENTION_BACKENDS[NAME] = Backend


def _register_defaults() -> None:
    from sglang.srt.arg_groups.model_override_base import (
        _MODEL_OVERRIDE_FNS,
        register_model_override,
    )
    from sglang.srt.arg_groups.resolution_hooks import _HOOKS, register_resolution_hook

    from sglang_ext.config import (
        SERVED_ARCHITECTURE,
        allow_fp4_indexer,
        fill_defaults,
        server_defaults,
    )

    for step, hook in ((ADJUSTMENTS, fill_defaults), (ENVIRONMENT, allow_fp4_indexer)):
        if hook not in _HOOKS.get(step, ()):
            register_resolution_hook(step)(hook)
    for architecture, provider in (
        (SERVED_ARCHITECTURE, server_defaults),
        (ARCHITECTURE, left_to_sglang),
    ):
        if provider not in _MODEL_OVERRIDE_FNS.get(architecture, ()):
            register_model_override(architecture)(provider)


def _register_chat() -> None:
    from sglang.srt.entrypoints.openai.chat_encoding_adapters import _BUILDERS

    from sglang_ext.config import CHAT_SPEC

    if env.CHAT.read() == "plugin":
        _BUILDERS[CHAT_SPEC]["builtin"] = hooks.chat_adapter


def left_to_sglang(server_args: Any, hf_config: Any) -> dict[str, Any]:
    """Override provider of the published architecture name: SGLang's own network is about to serve.

    Raises:
        RuntimeError: although the plugin should have, so its configuration hook is not active.
    """
    if hf_config.model_type != "deepseek_v4":
        return {}
    serving = choose(server_args.device)
    if serving.plugin:
        raise RuntimeError(
            "dsv4-plugin is installed but its configuration hook is not active: SGLang would serve "
            "its own DeepSeek-V4; look for 'dsv4' errors above, or set DSV4_MODEL=native"
        )
    log.info("DeepSeek-V4 is served by SGLang: %s; chat %s.", serving.reason, env.CHAT.read())
    return {}


def check_active() -> None:
    """Raise RuntimeError where a hook was not applied or another plugin replaced something."""
    from sglang.srt.entrypoints.openai.chat_encoding_adapters import _BUILDERS
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from sglang_ext.backend import NAME, Backend
    from sglang_ext.config import CHAT_SPEC

    missing = [target for target, _, _ in HOOKS if target not in HookRegistry._patched]
    if ATTENTION_BACKENDS.get(NAME) is not Backend:
        missing.append(f"attention backend {NAME}")
    if env.CHAT.read() == "plugin" and _BUILDERS[CHAT_SPEC]["builtin"] is not hooks.chat_adapter:
        missing.append(f"chat encoding {CHAT_SPEC}")
    if missing:
        raise RuntimeError(f"dsv4-plugin is installed but not active: {missing[0]} is not hooked")


def report(model: Any, pool: Any) -> None:
    """One line in the log: what serves, and why."""
    log.info(
        "DeepSeek-V4 is served by dsv4-plugin (%s): model %s, attention backend dsv4_plugin, "
        "KV cache %s in pages of %d tokens, chat %s.",
        choose(pool.device).reason,
        type(model).__name__,
        pool.layout.rows_named(),
        pool.page_size,
        env.CHAT.read(),
    )
