"""What is put into SGLang's registries and hooks."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry

from dsv4_plugin import env
from dsv4_plugin.config import ARCHITECTURE
from sglang_ext import hooks
from sglang_ext.active import HOOKS
from sglang_ext.choice import choose

log = logging.getLogger("sglang.srt.dsv4")

MODELS = "sglang_ext.models"
EXTERNAL = "SGLANG_EXTERNAL_MODEL_PACKAGE"
ADJUSTMENTS = "handle_model_specific_adjustments"
ENVIRONMENT = "handle_environment_variables"


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

    ModelRegistry.models |= {model.__name__: model for model in EntryClass}


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

    try:
        asked = env.CHAT.read()
    except ValueError:
        return  # SGLang would only log it, with a traceback; `take_over_config` refuses to serve
    if asked == "plugin":
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
