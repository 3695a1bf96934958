"""Checkpoints and their transformers twins, made once per test run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsv4_plugin.kernels import dispatch
from dsv4_plugin.tools.make import make_checkpoint
from dsv4_plugin.tools.mini import make_mini

os.environ["DSV4_MODEL"] = "plugin"
"""On machines where `auto` would leave the model to the engine too, as on CPUs with AMX."""
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
"""Triton 3.9 warns where it is left open."""
SMALL = {"vocab_size": 512}
"""tiny with few tokens, so that logits of long inputs fit in memory."""
A_LAYER_OF_EACH = {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128]}
"""tiny with one layer that sees its window only, one CSA and one HCA layer."""
WIDE = {"vocab_size": 512, "head_dim": 128, "n_routed_experts": 16}
"""bench with its indexer (64 heads, top-k 512) and fewer of the rest."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="tests marked thorough too")
    parser.addoption("--soak", type=float, default=600, help="seconds of load in tests of a soak")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--thorough"):
        return
    left = [item for item in items if item.get_closest_marker("thorough")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if not item.get_closest_marker("thorough")]


@pytest.fixture(autouse=True)
def chosen_kernels() -> Iterator[None]:
    """What one test sets DSV4_KERNELS to is not the next one's."""
    dispatch.choose_again()
    yield
    dispatch.choose_again()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small") / "checkpoint"
    make_checkpoint(directory, "tiny", seed=1, overrides=SMALL, tokenizer=False)
    return directory


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wide") / "checkpoint"
    make_checkpoint(directory, "bench", seed=3, overrides=WIDE, tokenizer=False)
    return directory


@pytest.fixture(scope="session")
def unchosen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """small, but the indexer may choose 2,048 entries."""
    directory = tmp_path_factory.mktemp("unchosen") / "checkpoint"
    overrides = SMALL | {"index_topk": 2048}
    make_checkpoint(directory, "tiny", seed=1, overrides=overrides, tokenizer=False)
    return directory


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real vocabulary and tokenizer: for engines and chat."""
    directory = tmp_path_factory.mktemp("tiny") / "checkpoint"
    make_checkpoint(directory, "tiny", seed=0)
    return directory


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dsv4-mini, the trained one."""
    directory = tmp_path_factory.mktemp("mini") / "checkpoint"
    make_mini(directory)
    return directory


@pytest.fixture(scope="session")
def reference() -> Iterator[Callable[[Path, Tensor], Tensor]]:
    """logits(checkpoint, ids [T]) -> [T, vocab] by transformers in float32, remembered.

    By its own class: vLLM, where imported, puts another config under the name deepseek_v4.
    """
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4ForCausalLM

    models, known = {}, {}

    def logits(directory: Path, ids: Tensor) -> Tensor:
        key = (directory, tuple(ids.tolist()))
        if key not in known:
            if directory not in models:
                model = DeepseekV4ForCausalLM.from_pretrained(directory, dtype=torch.float32)
                models[directory] = model.eval()
            with torch.no_grad():
                known[key] = models[directory](ids[None], use_cache=False).logits[0]
        return known[key]

    yield logits
    models.clear()


def v41_fields() -> dict[str, Any]:
    """A config.json of DeepSeek-V4.1, as much of it as an engine reads before it is refused."""
    text = {
        "model_type": "deepseek_v41_text",
        "vocab_size": 129280,
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "num_key_value_heads": 1,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 1280,
        "o_lora_rank": 1024,
        "o_groups": 8,
        "n_routed_experts": 384,
        "num_experts_per_tok": 6,
        "n_shared_experts": 1,
        "moe_intermediate_size": 2304,
        "max_position_embeddings": 1048576,
        "sliding_window": 128,
        "compress_ratios": [0] * 2 + [2] * 18 + [1] * 20 + [0] * 3,
        "rms_norm_eps": 1e-20,
        "num_nextn_predict_layers": 3,
        "engram_layer_ids": [1, 14],
    }
    return {
        "model_type": "deepseek_v41",
        "architectures": ["DeepseekV41ForCausalLM"],
        "image_token_id": 129264,
        "torch_dtype": "bfloat16",
        "text_config": text,
        "vision_config": {"num_hidden_layers": 32, "hidden_size": 1024},
    }


def random_ids(n: int, seed: int, vocab: int = 512) -> Tensor:
    return torch.randint(0, vocab, (n,), generator=torch.Generator().manual_seed(seed))
