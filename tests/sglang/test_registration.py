"""What is put into SGLang: once, where SGLang's own interfaces are as expected, and refused where
it cannot serve."""

from __future__ import annotations

import argparse
import inspect
import json
import pkgutil
import re
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import sglang
from sglang.srt.arg_groups.model_override_base import _MODEL_OVERRIDE_FNS
from sglang.srt.arg_groups.resolution_hooks import _HOOKS
from sglang.srt.entrypoints.openai import chat_encoding_adapters
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.mem_cache.base_swa_memory_pool import BaseSWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.pool_configurator import compute_swa_request_cap
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs
from transformers import PretrainedConfig

import sglang_ext
from dsv4_plugin import env
from dsv4_plugin.config import ARCHITECTURE, CSA, SWA, V41, V41_REFUSED, ModelConfig
from dsv4_plugin.tools.make import make_checkpoint
from lab.paths import ROOT
from sglang_ext import active, hooks
from sglang_ext.choice import choose
from sglang_ext.config import (
    KV_DTYPES,
    SERVED_ARCHITECTURE,
    SUPPORTED,
    draft_defaults,
    refuse_unsupported,
    require_mtp,
    take_over,
)

from ..conftest import SMALL, v41_fields
from ..refusals import named
from .server import FLOAT32, Server

PARAMETERS = {
    "from_server_args": {"server_args"},
    "get_config": {"model", "trust_remote_code", "revision", "model_override_args"},
    "create_memory_pool_configurator": {"kvc"},
    "_build_token_to_kv_pool": {"self", "sizes", "req_to_token_pool"},
    "create_decode_backend": {"self"},
    "create_draft_extend_backend": {"self"},
    "configure_kv_cache_dtype": {"server_args_kv_cache_dtype", "model"},
    "_validate_request": {"self", "request"},
    "force_exit_handler": {"self"},
}
"""Parameters that the hooks rely on, by the hooked function."""


@pytest.fixture(scope="module", autouse=True)
def registered():
    sglang_ext.register()
    HookRegistry.apply_hooks()


@pytest.mark.parametrize("target", [target for target, _, _ in active.HOOKS])
def test_hooked_function_is_as_expected(target: str):
    name = target.rsplit(".", 1)[1]
    found = set(inspect.signature(pkgutil.resolve_name(target)).parameters)
    assert found >= PARAMETERS[name], f"{target} lost {sorted(PARAMETERS[name] - found)}"


def test_interfaces_are_as_expected():
    """Names the adapter implements, overrides or reads."""
    cap = set(inspect.signature(compute_swa_request_cap).parameters)
    assert cap >= {"page_size", "window", "attn_dp_size"}
    abstract = BaseSWAKVPool.__abstractmethods__
    assert abstract <= vars(active.hooks.__class__).keys() | set(dir(kv_pool()))
    assert hasattr(AttentionBackend, "init_forward_metadata")
    fields = set(inspect.signature(ForwardBatch).parameters)
    assert fields >= {"seq_lens", "extend_seq_lens", "req_pool_indices", "forward_mode"}
    known = set(inspect.signature(ServerArgs).parameters)
    assert set(SUPPORTED) <= known, f"ServerArgs lost {sorted(set(SUPPORTED) - known)}"
    output = chat_encoding_adapters.ChatEncodingOutputAdapter
    assert {name for name in vars(output) if not name.startswith("_")} <= set(dir(chat_adapter()))


def kv_pool() -> type:
    from sglang_ext.pool import KVPool

    return KVPool


def chat_adapter() -> type:
    from sglang_ext.chat import ChatAdapter

    return ChatAdapter


def test_registering_again_changes_nothing():
    def state():
        return (
            {target: len(found) for target, found in HookRegistry._hooks.items()},
            {name: len(found) for name, found in _MODEL_OVERRIDE_FNS.items()},
            {name: len(found) for name, found in _HOOKS.items()},
        )

    before = state()
    sglang_ext.register()
    assert state() == before


def test_self_check(monkeypatch: pytest.MonkeyPatch):
    active.check_active()
    with monkeypatch.context() as patch:
        patch.setitem(ATTENTION_BACKENDS, "dsv4_plugin", object)
        with pytest.raises(RuntimeError, match="attention backend dsv4_plugin"):
            active.check_active()
    with monkeypatch.context() as patch:
        patch.setattr(HookRegistry, "_patched", set())
        with pytest.raises(RuntimeError, match="from_server_args is not hooked"):
            active.check_active()
    with monkeypatch.context() as patch:
        patch.setitem(chat_encoding_adapters._BUILDERS["dsv4"], "builtin", print)
        with pytest.raises(RuntimeError, match="chat encoding dsv4"):
            active.check_active()


def test_a_forced_end_tells_every_request():
    """And only where the plugin's network serves."""

    def told_by(architecture: str) -> list[AbortReq]:
        told: list[AbortReq] = []
        manager = SimpleNamespace(
            model_config=SimpleNamespace(hf_config=SimpleNamespace(architectures=[architecture])),
            rid_to_state={"a": object(), "b": object()},
            _handle_abort_req=told.append,
        )
        hooks.end_streams(lambda manager: None, manager)
        return told

    assert callable(TokenizerManager._handle_abort_req)
    assert [(r.rid, r.finished_reason["status_code"]) for r in told_by(SERVED_ARCHITECTURE)] == [
        ("a", 503),
        ("b", 503),
    ]
    assert told_by(ARCHITECTURE) == []


def test_who_serves(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DSV4_MODEL", raising=False)
    assert choose("cpu").plugin
    assert not choose("npu").plugin
    monkeypatch.setenv("DSV4_MODEL", "native")
    assert not choose("cpu").plugin
    monkeypatch.setenv("DSV4_MODEL", "mine")
    with pytest.raises(ValueError, match="DSV4_MODEL is 'mine'"):
        choose("cpu")


def test_published_name_left_to_sglang_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Without the configuration hook SGLang would look the published name up."""
    args, config = SimpleNamespace(device="cpu"), SimpleNamespace(model_type="deepseek_v4")
    (provider,) = [
        f for f in _MODEL_OVERRIDE_FNS[ARCHITECTURE] if f.__module__ == "sglang_ext.registration"
    ]
    with pytest.raises(RuntimeError, match="configuration hook is not active"):
        provider(args, config)
    monkeypatch.setenv("DSV4_MODEL", "native")
    assert provider(args, config) == {}


def published() -> PretrainedConfig:
    config = PretrainedConfig(architectures=[ARCHITECTURE])
    config.model_type = "deepseek_v4"
    return config


def test_architecture_is_renamed_only_where_the_plugin_serves(tiny: Path, monkeypatch):
    monkeypatch.setenv("DSV4_MODEL", "native")
    config = published()
    hooks.take_over_config(config, str(tiny), False)
    assert config.architectures == [ARCHITECTURE]
    monkeypatch.setenv("DSV4_MODEL", "plugin")
    hooks.take_over_config(config, str(tiny), False, None, {"index_topk": 32})
    assert config.architectures == [SERVED_ARCHITECTURE]
    assert ModelConfig.from_hf(config.dsv4_json).index_topk == 32
    assert config.hybrid_layer_pattern == [1, 0, 0, 0, 0]


def test_other_versions_are_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DSV4_MODEL", "plugin")
    monkeypatch.setattr(sglang, "__version__", "0.5.24")
    with pytest.raises(RuntimeError, match=r"SGLang 0\.5\.24 is installed"):
        hooks.take_over_config(published(), str(tiny), False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable_hierarchical_cache", True),
        ("enable_unified_memory", True),
        ("disaggregation_mode", "prefill"),
        ("speculative_algorithm", "EAGLE3"),
        ("speculative_eagle_topk", 4),
        ("speculative_adaptive", True),
        ("tokenizer_worker_num", 2),
        ("attention_backend", "torch_native"),
        ("kv_cache_dtype", "fp8_e5m2"),
        ("dtype", "float16"),
        ("pp_size", 2),
        ("load_format", "dummy"),
    ],
)
def test_unsupported_arguments_are_named(name: str, value: object):
    args = SimpleNamespace(**{field: allowed[0] for field, allowed in SUPPORTED.items()})
    refuse_unsupported(args)
    setattr(args, name, value)
    with pytest.raises(
        NotImplementedError, match=f"--{name.replace('_', '-')} is {value!r}; .* supp"
    ):
        refuse_unsupported(args)


def test_who_has_dspark_is_named():
    args = SimpleNamespace(**{field: allowed[0] for field, allowed in SUPPORTED.items()})
    args.speculative_algorithm = "DSPARK"
    with pytest.raises(NotImplementedError, match=r"DSPARK, .* load\(DIR, mtp=True\).generate"):
        refuse_unsupported(args)


def test_drafts_are_the_checkpoint_s(tiny: Path, tmp_path: Path):
    """Where it has an MTP layer, and no other model is asked for."""
    args = SimpleNamespace(model_path=str(tiny), speculative_draft_model_path=None)
    config = ModelConfig.from_pretrained(tiny)
    with pytest.raises(ValueError, match=r"num_nextn_predict_layers is 0; .* --speculative-algori"):
        require_mtp(args, config)
    require_mtp(SimpleNamespace(**vars(args) | {"model_path": "hub/name"}), with_mtp(config))
    args.speculative_draft_model_path = "other"
    with pytest.raises(NotImplementedError, match="--speculative-draft-model-path is 'other'"):
        require_mtp(args, with_mtp(config))
    fields = SMALL | {"num_hidden_layers": 4, "compress_ratios": [0, 4, 128, 4]}
    make_checkpoint(tmp_path / "dspark", "tiny", 0, fields, tokenizer=False, fmt="0731")
    args = SimpleNamespace(model_path=str(tmp_path / "dspark"), speculative_draft_model_path=None)
    with pytest.raises(NotImplementedError, match="DSPARK"):
        require_mtp(args, ModelConfig.from_pretrained(args.model_path))


def with_mtp(config: ModelConfig) -> ModelConfig:
    return replace(config, num_nextn_predict_layers=1)


@pytest.mark.parametrize(
    ("steps", "verified", "drafts"), [(None, None, 3), (2, None, 2), (None, 2, 1), (5, 6, 5)]
)
def test_sizes_of_drafts(steps: int | None, verified: int | None, drafts: int):
    args = SimpleNamespace(
        model_path="m", revision="r",
        speculative_num_steps=steps, speculative_num_draft_tokens=verified,
    )  # fmt: skip
    assert draft_defaults(args) == {
        "speculative_draft_model_path": "m",
        "speculative_draft_model_revision": "r",
        "speculative_num_steps": drafts,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": drafts + 1,
    }


def test_refusals_name_options():
    """By the names that SGLang's command line has."""
    fields = inspect.signature(ServerArgs).parameters
    assert not named(fields, "sglang_ext", "dsv4_plugin")
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    options = {option for action in parser._actions for option in action.option_strings}
    assert {f"--{name.replace('_', '-')}" for name in SUPPORTED} <= options


@pytest.mark.parametrize(
    ("option", "environ", "sentence"),
    [
        pytest.param(
            "--enable-hierarchical-cache",
            {},
            "--enable-hierarchical-cache is True; dsv4-plugin supports a server without",
            marks=pytest.mark.thorough,
        ),
        ("--page-size=96", {}, "--page-size is 96; it must be a multiple of 128"),
        pytest.param(
            "--tp-size=3",
            {},
            "--tp-size is 3; it must divide num_attention_heads",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "--page-size=128",
            {"DSV4_MODEL": "mine"},
            "DSV4_MODEL is 'mine'; allowed are auto, plugin, native",
            marks=pytest.mark.thorough,
        ),
        pytest.param(
            "--page-size=128",
            {"DSV4_CHAT": "mine"},
            "DSV4_CHAT is 'mine'; allowed are plugin, native",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_server_refuses_at_start(serve, option: str, environ: dict[str, str], sentence: str):
    """Its last words, but for what extensions print of themselves when Python ends."""
    server: Server = serve(*FLOAT32, "--max-total-tokens=4096", option, environ=environ)
    server.launch()
    try:
        assert server.process.wait(120) != 0
    except subprocess.TimeoutExpired:
        server.stop()
        raise
    log = server.read_log()
    (*_, last) = re.findall(r"^\w+Error: .*", log, re.M)
    assert sentence in last
    assert log.count("Traceback (most recent call last)") == 1


def test_the_documented_cache_dtypes():
    document = (ROOT / "docs" / "sglang.md").read_text()
    row = re.search(r"^\| `--kv-cache-dtype` \| ([^|]+)", document, re.M)
    assert re.findall(r"`(\w+)`", row[1]) == list(KV_DTYPES)


def test_variables_are_checked_before_the_checkpoint(tiny: Path, monkeypatch):
    monkeypatch.setenv("DSV4_DEFAULT_EFFORT", "foo")
    with pytest.raises(ValueError, match="DSV4_DEFAULT_EFFORT is 'foo'; allowed are none, minimal"):
        hooks.take_over_config(published(), str(tiny), False)


def test_pool_takes_the_bytes_that_the_sizer_counts(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    from sglang_ext import pool
    from sglang_ext.config import cache_layout

    config = ModelConfig.from_pretrained(tiny)
    schedule = SimpleNamespace(max_running_requests=3, swa_full_tokens_ratio=0.5)
    monkeypatch.setattr(pool, "get_schedule", lambda: schedule)
    monkeypatch.setattr(pool, "compute_swa_request_cap", lambda **_: 1500)
    ratios = config.compress_ratios
    for kv_dtype, ratio, n in (("auto", False, 0), ("fp8_e4m3", True, 0), ("auto", False, 2)):
        monkeypatch.setattr(pool, "drafts", lambda n=n: n)
        layout = cache_layout(config, "bfloat16", kv_dtype, 256, num_speculative_tokens=n)
        model = SimpleNamespace(config=config, layout=layout, model=SimpleNamespace(ratios=ratios))
        args = SimpleNamespace(_swa_full_tokens_ratio_explicitly_set=ratio)
        sizer = pool.PoolSizer(SimpleNamespace(model=model, server_args=args, attn_dp_size=1))
        budget = 5_000_000
        sizes = sizer.calculate_pool_sizes(budget, 256)
        full, swa = sizes.full_max_total_num_tokens, sizes.swa_max_total_num_tokens
        built = pool.KVPool(config, layout, ratios, full, swa, 4, "cpu").get_kv_size_bytes()
        if n:
            windows = layout.windows_only()
            drafter = pool.KVPool(config, windows, [SWA], full, swa, 4, "cpu")
            built += drafter.get_kv_size_bytes()
        assert built == sizer.nbytes(full // 256) <= budget
        assert sizer.nbytes(full // 256 + 1) > budget
        assert swa == (full // 512 * 256 if ratio else min(full, max(1280, full // 2560 * 256)))


def test_too_small_a_pool_is_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    from sglang_ext import pool

    sizer = pool.PoolSizer.__new__(pool.PoolSizer)
    sizer.ratio, sizer.in_flight, sizer.page_size, sizer.sliding_window = None, 4096, 128, 128
    with pytest.raises(ValueError, match="cannot hold even one request"):
        sizer.calculate_pool_sizes_from_max_tokens(256, 128)


def test_models_without_window_only_layers_keep_both_tiers(tiny: Path):
    """Pro has none: each of its layers is compressed, and has a window too."""
    config = published()
    ratios = [CSA] * 5
    take_over(config, str(tiny), None, {"compress_ratios": ratios, "num_hash_layers": 3})
    assert config.is_hybrid_swa
    assert SWA not in ModelConfig.from_hf(config.dsv4_json).compress_ratios
    assert config.hybrid_layer_pattern == [0] * 5


def test_v41_is_refused_where_the_plugin_serves(tmp_path, monkeypatch):
    from sglang.srt.utils.hf_transformers import config

    (tmp_path / "config.json").write_text(json.dumps(v41_fields()))
    with pytest.raises(NotImplementedError, match=re.escape(V41_REFUSED)):
        config.get_config(str(tmp_path), trust_remote_code=False)
    monkeypatch.setenv(env.MODEL.name, "native")
    assert config.get_config(str(tmp_path), trust_remote_code=False).model_type == V41
