"""The functions of SGLang that are hooked, and the check that all the plugin's parts are active."""

from __future__ import annotations

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from dsv4_plugin import env
from sglang_ext import hooks

CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
DRAFT_BACKENDS = "sglang.srt.speculative.draft_utils.DraftBackendFactory"
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
    (f"{DRAFT_BACKENDS}.create_decode_backend", hooks.draft_steps, HookType.AROUND),
    (f"{DRAFT_BACKENDS}.create_draft_extend_backend", hooks.draft_extension, HookType.AROUND),
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
