"""What registering puts into vLLM's registries, and leaves alone."""

from __future__ import annotations

import pytest
from vllm.reasoning import ReasoningParserManager
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers import TokenizerRegistry
from vllm.tool_parsers import ToolParserManager

import vllm_ext
from vllm_ext import active

OWN = ("engine.module", "Own")
REGISTRIES = {
    "tokenizer mode": (TokenizerRegistry, "tokenizers"),
    "renderer": (RENDERER_REGISTRY, "renderers"),
    "tool parser": (ToolParserManager, "lazy_parsers"),
    "reasoning parser": (ReasoningParserManager, "lazy_parsers"),
}


@pytest.fixture(params=list(active.CHAT))
def mode(request):
    return request.param


@pytest.fixture
def registered(monkeypatch, mode):
    """Register twice where the engine's own stand; what stands there afterwards."""

    def register(choice):
        monkeypatch.setenv("DSV4_CHAT", choice)
        for owner, name in REGISTRIES.values():
            monkeypatch.setattr(owner, name, dict.fromkeys(active.CHAT, OWN))
        vllm_ext.register()
        vllm_ext.register()
        return {what: getattr(owner, name)[mode] for what, (owner, name) in REGISTRIES.items()}

    return register


def test_the_plugins_chat_replaces_the_engines(registered, mode):
    assert registered("plugin") == active.CHAT[mode]
    active.check_active()


def test_native_leaves_the_engines_in_place(registered):
    assert registered("native") == dict.fromkeys(REGISTRIES, OWN)


@pytest.mark.parametrize("what", list(REGISTRIES))
def test_another_plugin_is_noticed(registered, mode, what):
    registered("plugin")
    owner, name = REGISTRIES[what]
    getattr(owner, name)[mode] = ("other.module", "Other")
    with pytest.raises(RuntimeError, match=f"its {what} {mode} is not active: .* other.module"):
        active.check_active()
