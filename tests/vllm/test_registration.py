"""Registering, choosing, and noticing that somebody else registered later."""

from __future__ import annotations

import logging

import pytest
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, DeepseekV4ForCausalLMConfig
from vllm.model_executor.models.registry import ModelRegistry
from vllm.platforms import current_platform
from vllm.tokenizers import TokenizerRegistry
from vllm.tool_parsers import ToolParserManager

import vllm_ext
from dsv4_plugin import env
from dsv4_plugin.config import ARCHITECTURE
from vllm_ext import _compat, active, choice, registration
from vllm_ext.config import NativeConfig


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    monkeypatch.setattr(TokenizerRegistry, "tokenizers", dict(TokenizerRegistry.tokenizers))
    monkeypatch.setattr(ToolParserManager, "lazy_parsers", dict(ToolParserManager.lazy_parsers))


def test_registering_twice_is_registering_once():
    vllm_ext.register()
    vllm_ext.register()
    active.check_active()


@pytest.mark.parametrize("what", ["model", "model of Vision-Exp", "tokenizer mode", "tool parser"])
def test_another_plugin_is_noticed(what):
    vllm_ext.register()
    other = ("other.module", "Other")
    if what == "model":
        ModelRegistry.register_model(ARCHITECTURE, ":".join(other))
    elif what == "model of Vision-Exp":
        ModelRegistry.register_model(active.VISION_ARCHITECTURE, ":".join(other))
    elif what == "tokenizer mode":
        TokenizerRegistry.tokenizers[active.MODE] = other
    else:
        ToolParserManager.register_lazy_module(active.MODE, *other)
    pattern = f"its {what}( deepseek_v4)? is not active: .* other.module"
    with pytest.raises(RuntimeError, match=pattern):
        active.check_active()


def test_an_unknown_choice_is_refused(monkeypatch):
    monkeypatch.setenv(env.MODEL.name, "mine")
    with pytest.raises(ValueError, match="DSV4_MODEL is 'mine'; allowed are auto, plugin, native"):
        vllm_ext.register()


def test_native_leaves_vllms_own(monkeypatch):
    def found():
        models = [ModelRegistry.models[name] for name in active.MODELS]
        return models, TokenizerRegistry.tokenizers[active.MODE]

    before = found()
    monkeypatch.setenv(env.MODEL.name, "native")
    monkeypatch.setenv(env.CHAT.name, "native")
    vllm_ext.register()
    assert before == found()


@pytest.mark.parametrize(("chat", "whose"), [("plugin", "dsv4-plugin's"), ("native", "vLLM's")])
def test_where_vllm_serves_the_log_says_whose_chat_layer_it_is(monkeypatch, caplog, chat, whose):
    monkeypatch.setenv(env.MODEL.name, "native")
    monkeypatch.setenv(env.CHAT.name, chat)
    monkeypatch.setattr(registration, "MODELS_CONFIG_MAP", dict(MODELS_CONFIG_MAP))
    vllm_ext.register()
    assert registration.MODELS_CONFIG_MAP[ARCHITECTURE] is NativeConfig
    nothing = staticmethod(lambda vllm_config: None)
    monkeypatch.setattr(DeepseekV4ForCausalLMConfig, "verify_and_update_config", nothing)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.INFO, "vllm.dsv4"):
        NativeConfig.verify_and_update_config(None)
    assert f"DSV4_MODEL=native; its prompts and parsers are {whose}" in caplog.text


def test_the_core_s_log_is_shown_by_vllm():
    vllm_ext.register()
    vllm_ext.register()
    core, engine = logging.getLogger("dsv4_plugin"), logging.getLogger("vllm")
    assert [h for h in core.handlers if h in engine.handlers] == engine.handlers
    assert core.isEnabledFor(logging.INFO) == engine.isEnabledFor(logging.INFO)


def test_auto_goes_by_the_machine(monkeypatch):
    monkeypatch.delenv(env.MODEL.name)
    assert choice.choose().plugin is not _compat.has_amx()
    monkeypatch.setattr(choice, "has_amx", lambda: True)
    assert not choice.choose().plugin
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    for level, plugin in (((8, 0), True), ((8, 9), True), ((9, 0), False), ((10, 0), False)):
        capability = type("Capability", (), {"major": level[0], "minor": level[1]})
        monkeypatch.setattr(
            type(current_platform),
            "get_device_capability",
            classmethod(lambda cls, c=capability: c),
        )
        assert choice.choose().plugin is plugin


def test_an_untested_version_is_refused(monkeypatch):
    monkeypatch.setattr(_compat.vllm, "__version__", "0.99.0")
    with pytest.raises(RuntimeError, match=r"vLLM 0.99.0 is installed; .* made for 0.32 and 0.33"):
        vllm_ext.register()
