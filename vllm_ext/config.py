"""vLLM's configuration hook: refuse early what cannot be served, and settle the cache's sizes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import CUDAGraphMode
from vllm.model_executor.models.config import (
    DeepseekV4ForCausalLMConfig,
    VerifyAndUpdateConfig,
)
from vllm.platforms import current_platform

from dsv4_plugin import env
from dsv4_plugin.cache.layout import CacheLayout, resolve_kv_dtype
from dsv4_plugin.checkpoint.files import check_checkpoint, read_headers
from dsv4_plugin.checkpoint.names import with_drafter
from dsv4_plugin.config import V41_REFUSED, ModelConfig
from dsv4_plugin.kernels.dispatch import require_driver
from dsv4_plugin.serving import config_json, with_int4
from vllm_ext._compat import end_streams_at_shutdown
from vllm_ext.active import check_active
from vllm_ext.choice import choose

if TYPE_CHECKING:
    from vllm.config import VllmConfig

log = logging.getLogger("vllm.dsv4")

PAGE_SIZE = 256
CPU_PIPELINE_WORKER = "vllm_ext.worker.PipelineWorker"
SERVED_TYPE = "dsv4_plugin"
"""hf_config.model_type once the hook ran: vLLM's platform code treats the name `deepseek_v4` as its
own network (fixed block size, no chunked prefill or prefix caching without AMX)."""
_KV_DTYPES = {
    "auto": "auto",
    "bfloat16": "bfloat16",
    "fp8": "fp8",
    "fp8_e4m3": "fp8",
    "fp8_ds_mla": "fp8",
}


_INDEX_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp8": "fp8", "mxfp4": "fp4"}


class NativeConfig(DeepseekV4ForCausalLMConfig):
    """Where vLLM's own network serves: its own hook, and the line that says so."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        env.check()
        DeepseekV4ForCausalLMConfig.verify_and_update_config(vllm_config)
        log.info("DeepSeek-V4 is served by vLLM: %s; %s.", choose().reason, chat())


class PluginConfig(DeepseekV4ForCausalLMConfig):
    """Runs in the API server, before the platform's own adjustments."""

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:  # type: ignore[no-untyped-def]
        """Take the quantisation off vLLM's view: the plugin reads it, and packs the weights itself.

        Raises ValueError where --quantization asks for another way.
        """
        if model_config.quantization is not None:
            raise ValueError(
                f"--quantization is {model_config.quantization!r}; dsv4-plugin takes it from the "
                "checkpoint, so leave the option out"
            )
        model_config.model_arch_config.quantization_config = None
        if hasattr(model_config.hf_config, "quantization_config"):
            del model_config.hf_config.quantization_config

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Raises ValueError or NotImplementedError in one sentence that names the option."""
        check_active()
        env.check()
        end_streams_at_shutdown()
        if current_platform.is_cpu():
            require_driver()
        cache = vllm_config.cache_config
        if not cache.user_specified_block_size:
            cache.block_size = PAGE_SIZE
            cache.user_specified_block_size = True
        _refuse_unsupported(vllm_config)
        config = model_config_of(vllm_config)
        parallel = vllm_config.parallel_config
        config.require_tensor_parallel(parallel.tensor_parallel_size, "--tensor-parallel-size")
        if parallel.enable_expert_parallel:
            size = parallel.tensor_parallel_size * parallel.data_parallel_size
            config.require_expert_parallel(size, "--enable-expert-parallel")
        if current_platform.is_cpu() and parallel.pipeline_parallel_size > 1:
            parallel.worker_cls = CPU_PIPELINE_WORKER
        cache_layout(config, vllm_config)
        mtp = vllm_config.speculative_config is not None
        _settle_graphs(vllm_config)
        directory = vllm_config.model_config.model
        if Path(directory).is_dir() and vllm_config.load_config.load_format != "dummy":
            check_checkpoint(config, directory, mtp)
        model = vllm_config.model_config
        model.model_arch_config.is_deepseek_mla = False
        model.hf_config.model_type = SERVED_TYPE
        log.info("DeepSeek-V4 is served by dsv4-plugin: %s; %s.", choose().reason, chat())


class V41Config(VerifyAndUpdateConfig):
    """V4.1 where the plugin serves: vLLM's own needs the same chips as V4."""

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:  # type: ignore[no-untyped-def]
        raise NotImplementedError(V41_REFUSED)


NO_DSPARK = (
    "--speculative-config is given; this checkpoint drafts with DSpark, which vLLM has on GPUs "
    "only (in its V2 runner) and dsv4-plugin in its local engine: "
    "load(DIR, mtp=True).generate(..., num_speculative_tokens=5)"
)


class DrafterConfig(VerifyAndUpdateConfig):
    """Runs when vLLM reads the drafter's configuration, before it divides by the number of MTP
    layers."""

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:  # type: ignore[no-untyped-def]
        _core_config(model_config).with_draft_layers("--speculative-config")


def chat() -> str:
    """Who writes prompts and reads answers, half a sentence for the log."""
    if env.CHAT.read() == "native":
        return f"its prompts and parsers are vLLM's ({env.CHAT.name}=native)"
    return f"its prompts and parsers are dsv4-plugin's ({env.CHAT.name}=native leaves them to vLLM)"


def _settle_graphs(vllm_config: VllmConfig) -> None:
    """vLLM's options decide what is captured, but for steps in torch, which ask the device for
    values."""
    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    if env.KERNELS.read() in ("auto", "triton"):
        return
    open_yet = mode is None and not current_platform.is_cpu()  # vLLM 0.33 settles it later
    eager = vllm_config.model_config.enforce_eager
    if mode not in (None, CUDAGraphMode.NONE) or (open_yet and not eager):
        log.warning(
            "CUDA graphs: none (cudagraph_mode was %s), because steps in torch's kernels are not "
            "captured.",
            mode.name if mode else "vLLM's default",
        )
    compilation.cudagraph_mode = CUDAGraphMode.NONE


def drafts_of(vllm_config: VllmConfig) -> int:
    """Tokens drafted per step."""
    speculative = vllm_config.speculative_config
    return speculative.num_speculative_tokens if speculative else 0


def drafter_config(vllm_config: VllmConfig) -> ModelConfig:
    """Whose drafter is the one that the checkpoint's tensors are of, where they are at hand."""
    config, directory = model_config_of(vllm_config), vllm_config.model_config.model
    if not Path(directory).is_dir() or vllm_config.load_config.load_format == "dummy":
        return config
    return with_drafter(config, read_headers(directory))


def model_config_of(vllm_config: VllmConfig) -> ModelConfig:
    """The core's configuration, from config.json itself and --hf-overrides."""
    return _core_config(vllm_config.model_config)


def _core_config(model: Any) -> ModelConfig:
    overrides = model.hf_overrides if isinstance(model.hf_overrides, dict) else None
    config = ModelConfig.from_hf(config_json(model.model, model.revision, overrides))
    return with_int4(config, model.model, model.revision)


def cache_layout(config: ModelConfig, vllm_config: VllmConfig) -> CacheLayout:
    """The cache layout that --kv-cache-dtype, --dtype, --block-size and
    --attention_config.indexer_kv_dtype ask for."""
    asked = vllm_config.cache_config.cache_dtype
    if asked not in _KV_DTYPES:
        raise ValueError(f"--kv-cache-dtype is {asked!r}; allowed are {', '.join(_KV_DTYPES)}")
    kv_dtype = resolve_kv_dtype(_KV_DTYPES[asked], dtype_name(vllm_config))
    index = vllm_config.attention_config.indexer_kv_dtype
    if index not in _INDEX_DTYPES:
        allowed = ", ".join(_INDEX_DTYPES)
        raise ValueError(f"--attention-config.indexer_kv_dtype is {index!r}; allowed are {allowed}")
    block_size = vllm_config.cache_config.block_size
    config.require_page_size(block_size, "--block-size")
    return CacheLayout.of(
        config,
        kv_dtype,
        block_size,
        index_dtype=_INDEX_DTYPES[index],
        num_speculative_tokens=drafts_of(vllm_config),
    )


def dtype_name(vllm_config: VllmConfig) -> str:
    return str(vllm_config.model_config.dtype).removeprefix("torch.")


def _check_drafts(config: ModelConfig, vllm_config: VllmConfig) -> None:
    speculative = vllm_config.speculative_config
    method, n = speculative.method, speculative.num_speculative_tokens
    if method not in ("mtp", "dspark"):
        raise NotImplementedError(
            f"--speculative-config.method is {method!r}; dsv4-plugin drafts with 'mtp' and "
            "'dspark', whichever a checkpoint has"
        )
    dspark = config.dspark
    if dspark is not None and not vllm_config.use_v2_model_runner:
        raise NotImplementedError(NO_DSPARK)
    if (method == "dspark") != (dspark is not None):
        has = "dspark" if dspark else "mtp"
        raise ValueError(
            f"--speculative-config.method is {method!r}; this checkpoint's drafter is of the kind "
            f"{has!r}"
        )
    if dspark is not None and n > dspark.block_size:
        raise ValueError(
            f"--speculative-config.num_speculative_tokens is {n}; this checkpoint's drafter "
            f"proposes {dspark.block_size} tokens at once, so allowed are 1 to {dspark.block_size}"
        )
    if dspark is not None:
        # What it keeps of a token is known as soon as the token is computed: the last page of a
        # prefix that the cache has is good for it, too.
        speculative.disable_eagle_block_drop = True


def _refuse_unsupported(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    if vllm_config.model_config.dtype not in (torch.float32, torch.bfloat16):
        name = dtype_name(vllm_config)
        raise ValueError(f"--dtype is {name!r}; allowed are float32 and bfloat16")
    speculative = vllm_config.speculative_config
    if speculative is not None:
        _check_drafts(drafter_config(vllm_config), vllm_config)
    if speculative is not None and parallel.pipeline_parallel_size > 1:
        raise NotImplementedError(
            f"--pipeline-parallel-size is {parallel.pipeline_parallel_size} and "
            "--speculative-config is given; vLLM's model runner fails without a drafter on every "
            "stage"
        )
    unsupported = {
        "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
        "--enable-eplb": parallel.enable_eplb,
        "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
        "--decode-context-parallel-size": parallel.decode_context_parallel_size > 1,
        "--enable-lora": vllm_config.lora_config is not None,
    }
    for option, asked in unsupported.items():
        if asked:
            raise NotImplementedError(
                f"{option} is given; dsv4-plugin does not support it so far, so leave it out"
            )
