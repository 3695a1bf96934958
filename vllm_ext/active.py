"""What the plugin puts into vLLM's registries, and the check that it is still there."""

from __future__ import annotations

from vllm.model_executor.models.registry import ModelRegistry
from vllm.reasoning import ReasoningParserManager
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers import TokenizerRegistry
from vllm.tool_parsers import ToolParserManager

from dsv4_plugin import env
from dsv4_plugin.config import ARCHITECTURE

MODE, MODE_V41 = "deepseek_v4", "deepseek_v41"
DRAFTER_ARCHITECTURE = "DeepSeekV4MTPModel"
"""vLLM's name for the drafter of method `mtp`; it also reads a DSpark drafter's config by it."""
DRAFTERS = {
    DRAFTER_ARCHITECTURE: ("vllm_ext.mtp", "DeepseekV4MTP"),
    "DSparkDraftModel": ("vllm_ext.dspark", "DeepseekV4DSpark"),
}
VISION_ARCHITECTURE = "DeepseekV4ForConditionalGeneration"
"""vLLM's name for the model of a config.json with vision_n_layers."""
MODELS = (ARCHITECTURE, VISION_ARCHITECTURE)
MODEL = ("vllm_ext.model", "DeepseekV4ForCausalLM")
TOOL_PARSER = "vllm_ext.tool_parser"
_REASONING_PARSER = ("vllm_ext.reasoning_parser", "DeepseekV4ReasoningParser")
CHAT = {
    MODE: {
        "tokenizer mode": ("vllm_ext.tokenizer", "DeepseekV4Tokenizer"),
        "renderer": ("vllm_ext.chat_renderer", "ChatRenderer"),
        "tool parser": (TOOL_PARSER, "DeepseekV4ToolParser"),
        "reasoning parser": _REASONING_PARSER,
    },
    MODE_V41: {
        "tokenizer mode": ("vllm_ext.tokenizer", "DeepseekV41Tokenizer"),
        "renderer": ("vllm_ext.chat_renderer", "ChatRendererV41"),
        "tool parser": (TOOL_PARSER, "DeepseekV41ToolParser"),
        "reasoning parser": _REASONING_PARSER,
    },
}
"""By vLLM's name of the format: what stands in each of its registries."""


def registries() -> dict[str, dict[str, tuple[str, str]]]:
    """vLLM's, by what they hold."""
    return {
        "tokenizer mode": TokenizerRegistry.tokenizers,
        "renderer": RENDERER_REGISTRY.renderers,
        "tool parser": ToolParserManager.lazy_parsers,
        "reasoning parser": ReasoningParserManager.lazy_parsers,
    }


def _registered(name: str) -> tuple[str, str]:
    model = ModelRegistry.models[name]
    return getattr(model, "module_name", ""), getattr(model, "class_name", "")


def check_active() -> None:
    """Raise RuntimeError if another plugin has replaced what was registered here."""
    found = {
        "model": _registered(ARCHITECTURE),
        "model of Vision-Exp": _registered(VISION_ARCHITECTURE),
    }
    expected = dict.fromkeys(found, MODEL)
    if env.CHAT.read() == "plugin":
        for mode, parts in CHAT.items():
            for what, wanted in parts.items():
                found[f"{what} {mode}"] = registries()[what].get(mode, ("", ""))
                expected[f"{what} {mode}"] = wanted
    for what, wanted in expected.items():
        if found[what] != wanted:
            raise RuntimeError(
                f"dsv4-plugin is installed but its {what} is not active: vLLM would use "
                f"{'.'.join(found[what])}; uninstall one of the two plugins, or set "
                f"{env.MODEL.name}=native and {env.CHAT.name}=native"
            )
