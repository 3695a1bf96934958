"""Server arguments: defaults for the plugin's model, and early refusal of what it cannot serve."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view
from sglang.srt.model_executor.cuda_graph_config import (
    Backend,
    CudaGraphConfig,
    Phase,
    with_phase,
)
from sglang.srt.server_args import ServerArgs

from dsv4_plugin import env
from dsv4_plugin.cache.layout import CacheLayout, resolve_kv_dtype
from dsv4_plugin.checkpoint.files import check_checkpoint, read_headers
from dsv4_plugin.checkpoint.names import with_drafter
from dsv4_plugin.config import CSA, HCA, ModelConfig
from dsv4_plugin.kernels.dispatch import require_driver, use_triton
from dsv4_plugin.serving import config_json, with_int4
from sglang_ext.backend import NAME

log = logging.getLogger("sglang.srt.dsv4")

SERVED_ARCHITECTURE = "DeepseekV4PluginForCausalLM"
"""hf_config.architectures where the plugin serves: SGLang treats the published name as its own
network, and finds the chat format by the substring `DeepseekV4`."""
DRAFT_ARCHITECTURE = f"{SERVED_ARCHITECTURE}NextN"
"""Of the MTP layer, in SGLang's second configuration of the same checkpoint."""
CHAT_SPEC = "dsv4"
"""SGLang's name of the V4 chat encoding."""
PAGE_SIZE = HCA
MAX_RUNNING_REQUESTS = 256
KV_DTYPES = {
    "auto": "auto",
    "bf16": "bfloat16",
    "bfloat16": "bfloat16",
    "fp8_e4m3": "fp8",
}
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "enable_hierarchical_cache": (False,),
    "enable_unified_memory": (False,),
    "disable_hybrid_swa_memory": (False,),
    "disaggregation_mode": ("null",),
    "speculative_algorithm": (None, "EAGLE", "NEXTN"),
    "speculative_eagle_topk": (None, 1),
    "speculative_adaptive": (False,),
    "speculative_use_rejection_sampling": (False,),
    "speculative_use_block_verification": (False,),
    "speculative_token_map": (None,),
    "speculative_draft_attention_backend": (None, NAME),
    "speculative_draft_window_size": (None,),
    "enable_multi_layer_eagle": (False,),
    "tokenizer_worker_num": (1,),
    "attention_backend": (None, NAME),
    "prefill_attention_backend": (None, NAME),
    "decode_attention_backend": (None, NAME),
    "load_format": ("auto", "safetensors"),
    "quantization": (None,),
    "dtype": ("auto", "float32", "bfloat16"),
    "kv_cache_dtype": tuple(KV_DTYPES),
    "pp_size": (1,),
    "dcp_size": (1,),
    "attn_dp_size": (1,),
    "attn_cp_size": (1,),
    "enable_dp_attention": (False,),
    "enable_lora": (None, False),
    "enable_hisparse": (False,),
    "enable_lmcache": (False,),
    "enable_flexkv": (False,),
    "enable_kv_cache_sharding": (False,),
    "enable_streaming_session": (False,),
    "enable_two_batch_overlap": (False,),
    "enable_torch_compile": (False,),
    "enable_pdmux": (False,),
    "dllm_algorithm": (None,),
}
"""Server arguments that decide whether the plugin can serve, and the values it can."""


DRAFTS = 3
"""Without an option that says it: SGLang's own number for models of this family."""
NO_DSPARK = (
    "--speculative-algorithm is given and this checkpoint's drafter, or the algorithm, is DSPARK, "
    "which SGLang has on GPUs only, for its own network (DSV4_MODEL=native); dsv4-plugin drafts "
    "with it in its local engine: load(DIR, mtp=True).generate(..., num_speculative_tokens=5)"
)


def server_defaults(server_args: ServerArgs, hf_config: Any) -> dict[str, Any]:
    """SGLang's override provider: refuse what cannot be served, then fill in defaults.

    Raises:
        ValueError, NotImplementedError: in one sentence that names the argument.
    """
    refuse_unsupported(server_args)
    if server_args.device == "cpu":
        require_driver()
    config = model_config(hf_config)
    config.require_tensor_parallel(server_args.tp_size, "--tp-size")
    if server_args.ep_size not in (1, server_args.tp_size):
        raise NotImplementedError(
            f"--ep-size is {server_args.ep_size}; dsv4-plugin supports 1 and --tp-size "
            f"({server_args.tp_size})"
        )
    config.require_expert_parallel(server_args.ep_size, "--ep-size")
    page_size = server_args.page_size or PAGE_SIZE
    dtype = config.torch_dtype if server_args.dtype == "auto" else server_args.dtype
    cache_layout(config, dtype, server_args.kv_cache_dtype, page_size)
    mtp = server_args.speculative_algorithm is not None
    if mtp:
        require_mtp(server_args, config)
    if Path(server_args.model_path).is_dir():
        check_checkpoint(config, server_args.model_path, mtp)
    return {
        "attention_backend": NAME,
        "page_size": page_size,
        "dtype": dtype,
    }


def require_mtp(args: ServerArgs, config: ModelConfig) -> None:
    """Raise ValueError or NotImplementedError unless drafts are those of the checkpoint's MTP
    layer."""
    path = args.speculative_draft_model_path
    if path not in (None, args.model_path):
        raise NotImplementedError(
            f"--speculative-draft-model-path is {path!r}; dsv4-plugin drafts with the MTP layer of "
            "--model-path, so leave the option out"
        )
    if Path(args.model_path).is_dir():
        config = with_drafter(config, read_headers(args.model_path))
    if config.dspark is not None:
        raise NotImplementedError(NO_DSPARK)
    config.with_draft_layers("--speculative-algorithm")


def fill_defaults(server_args: ServerArgs, previous: Callable[[ServerArgs], None]) -> None:
    """Resolution hook for defaults that SGLang takes from no provider: how many requests run (each
    has a ring and window blocks), which CUDA graphs there are, and with the plugin's chat, that
    models think unless asked not to, as in the other engine."""
    previous(server_args)
    config, args = model_config_of(server_args).hf_config, resolving_view(server_args)
    if env.CHAT.read() == "plugin" and config.model_type == "deepseek_v4":
        chat = {"thinking": True} | (args.default_chat_template_kwargs or {})
        declare_resolution(server_args, "dsv4-plugin", default_chat_template_kwargs=chat)
    if config.architectures == [SERVED_ARCHITECTURE]:
        mtp = args.speculative_algorithm is not None
        found = draft_defaults(args) if mtp else {}
        found["cuda_graph_config"] = _graphs(args.cuda_graph_config, args.device, mtp)
        found["max_running_requests"] = args.max_running_requests or MAX_RUNNING_REQUESTS
        declare_resolution(server_args, "dsv4-plugin", **found)


def _graphs(config: CudaGraphConfig, device: str, mtp: bool = False) -> CudaGraphConfig:
    """Whole graphs of decode steps on a GPU, of the sizes that SGLang's options say, unless they
    leave them out. Steps of prompts and of drafts are not captured; steps in torch cannot be."""
    triton = device == "cuda" and use_triton(torch.device(device))
    able = triton and not mtp
    wanted = [p for p in Phase.ALL if config[p].backend != Backend.DISABLED]
    decode = Backend.FULL if able and Phase.DECODE in wanted else Backend.DISABLED
    if wanted and device == "cuda":
        log.info(
            "CUDA graphs: %s; steps of prompts run without.",
            "whole ones of decode steps"
            if able
            else "none, because of drafts"
            if triton
            else "none, because kernels are torch's",
        )
    config = with_phase(config, Phase.DECODE, backend=decode)
    return with_phase(config, Phase.PREFILL, backend=Backend.DISABLED)


def allow_fp4_indexer(server_args: ServerArgs, previous: Callable[[ServerArgs], None]) -> None:
    """Resolution hook around the step that refuses --enable-deepseek-v4-fp4-indexer on chips that
    SGLang's own kernels for it are not made for."""
    config = model_config_of(server_args).hf_config
    name = "enable_deepseek_v4_fp4_indexer"
    asked = getattr(resolving_view(server_args), name)
    if not asked or config.architectures != [SERVED_ARCHITECTURE]:
        previous(server_args)
        return
    declare_resolution(server_args, "dsv4-plugin", **{name: False})
    previous(server_args)
    declare_resolution(server_args, "dsv4-plugin", **{name: True})


def draft_defaults(args: Any) -> dict[str, Any]:
    """What SGLang's EAGLE worker needs to draft with the checkpoint's own MTP layer."""
    verified = args.speculative_num_draft_tokens
    steps = args.speculative_num_steps or (verified - 1 if verified else DRAFTS)
    return {
        "speculative_draft_model_path": args.model_path,
        "speculative_draft_model_revision": args.revision,
        "speculative_num_steps": steps,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": steps + 1,
    }


def refuse_unsupported(server_args: ServerArgs) -> None:
    if server_args.speculative_algorithm == "DSPARK":
        raise NotImplementedError(NO_DSPARK)
    for name, allowed in SUPPORTED.items():
        value = getattr(server_args, name)
        if value not in allowed:
            named = ", ".join(str(v) for v in allowed if v) or "a server without it"
            raise NotImplementedError(
                f"--{name.replace('_', '-')} is {value!r}; dsv4-plugin supports {named} so far "
                "(DSV4_MODEL=native leaves the model to SGLang)"
            )


def cache_layout(
    config: ModelConfig,
    dtype: str,
    kv_cache_dtype: str,
    page_size: int,
    fp4_indexer: bool = False,
    num_speculative_tokens: int = 0,
) -> CacheLayout:
    """The layout that --dtype, --kv-cache-dtype, --page-size and --enable-deepseek-v4-fp4-indexer
    ask for. Window blocks are as long as pages: SGLang allocates both tiers in step."""
    if page_size % HCA:
        raise ValueError(f"--page-size is {page_size}; it must be a multiple of {HCA}")
    kv_dtype = resolve_kv_dtype(KV_DTYPES[kv_cache_dtype], dtype)
    return CacheLayout.of(
        config,
        kv_dtype,
        page_size,
        window_block=page_size,
        num_speculative_tokens=num_speculative_tokens,
        index_dtype="fp4" if fp4_indexer else "auto",
    )


def model_config(hf_config: Any) -> ModelConfig:
    """The core's, of a config that was taken over."""
    int4 = hf_config.dsv4_int4
    config = ModelConfig.from_hf(hf_config.dsv4_json)
    return replace(config, int4_modules=None if int4 is None else frozenset(int4))


def settle_model(config: Any, is_draft: bool) -> None:
    """After SGLang has read config.json (its ModelConfig): the core's layers take packed weights,
    not SGLang's, and what travels to the drafter are streams. The drafter's own has one layer."""
    config.quantization = None
    core = model_config(config.hf_config)
    config.spec_hidden_size = core.hc_mult * core.hidden_size
    if is_draft:
        config.hf_config.architectures = [DRAFT_ARCHITECTURE]


def take_over(hf_config: Any, model: str, revision: str | None, overrides: Mapping | None) -> None:
    """Make SGLang's config of a V4 checkpoint the plugin's: own architecture name, two KV tiers,
    and config.json itself for the core (SGLang reads it through its V3 class)."""
    hf_config.dsv4_json = config_json(model, revision, overrides)
    config = with_int4(ModelConfig.from_hf(hf_config.dsv4_json), model, revision)
    int4 = config.int4_modules
    hf_config.dsv4_int4 = None if int4 is None else sorted(int4)
    hf_config.architectures = [SERVED_ARCHITECTURE]
    hf_config.is_hybrid_swa = True
    hf_config.hybrid_layer_pattern = [int(r not in (CSA, HCA)) for r in config.compress_ratios]
    if hasattr(hf_config, "quantization_config"):
        del hf_config.quantization_config
