"""The functions of SGLang that the adapter changes, in the form SGLang's hook registry takes.

Each acts on the plugin's model only and passes everything else through.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from http import HTTPStatus
from typing import Any

import torch

from dsv4_plugin import env
from dsv4_plugin.config import ARCHITECTURE, V41, V41_REFUSED
from sglang_ext._compat import require_tested_version
from sglang_ext.choice import choose

_device: ContextVar[str | None] = ContextVar("device", default=None)
"""--device of the server whose configuration is being read; None elsewhere."""


def serving_device() -> str:
    return _device.get() or ("cuda" if torch.cuda.is_available() else "cpu")


def remember_device(original: Callable, server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND ModelConfig.from_server_args, which reads config.json without knowing the device."""
    token = _device.set(server_args.device)
    try:
        config = original(server_args, *args, **kwargs)
    finally:
        _device.reset(token)
    from sglang_ext.config import SERVED_ARCHITECTURE, settle_model

    if config.hf_config.architectures == [SERVED_ARCHITECTURE]:
        settle_model(config, kwargs.get("is_draft_model", False))
    return config


def take_over_config(
    result: Any,
    model: str,
    trust_remote_code: bool,
    revision: str | None = None,
    model_override_args: dict | None = None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """AFTER get_config.

    Raises:
        RuntimeError: an SGLang version that was not tested.
        NotImplementedError: V4.1, where the plugin serves: SGLang's own needs the same chips as V4.
    """
    if result.model_type == V41 and choose(serving_device()).plugin:
        raise NotImplementedError(V41_REFUSED)
    published = (result.architectures or [""])[0] == ARCHITECTURE
    if published:
        env.check()
    if published and result.model_type == "deepseek_v4" and choose(serving_device()).plugin:
        require_tested_version()
        from sglang_ext.config import take_over

        take_over(result, model, revision, model_override_args)


def pool_sizer(original: Callable, kvc: Any) -> Any:
    """AROUND create_memory_pool_configurator: true bytes per token and request."""
    if not serves(kvc.model):
        return original(kvc)
    from sglang_ext.pool import PoolSizer

    return PoolSizer(kvc)


def build_pool(
    original: Callable, self: Any, *, sizes: Any, req_to_token_pool: Any, **rest: Any
) -> Any:
    """AROUND KVCacheConfigurator._build_token_to_kv_pool."""
    if not serves(self.model):
        return original(self, sizes=sizes, req_to_token_pool=req_to_token_pool, **rest)
    from sglang_ext.pool import KVPool

    pool = KVPool(
        self.model.config,
        self.model.layout,
        self.model.model.ratios,
        sizes.full_max_total_num_tokens,
        sizes.swa_max_total_num_tokens,
        req_to_token_pool.req_to_token.shape[0],
        self.device,
    )
    if not self.is_draft_worker:
        pool.report(type(self.model).__name__)
    return pool


def draft_steps(original: Callable, self: Any) -> Any:
    """AROUND DraftBackendFactory.create_decode_backend."""
    if not serves(self.draft_model_runner.model):
        return original(self)
    from sglang_ext.backend import DraftSteps

    behind = self.speculative_num_steps - 1
    return DraftSteps(self.draft_model_runner, behind) if behind else None


def draft_extension(original: Callable, self: Any) -> Any:
    """AROUND DraftBackendFactory.create_draft_extend_backend: the runner's own backend serves."""
    return None if serves(self.draft_model_runner.model) else original(self)


def kv_cache_dtype(original: Callable, **kwargs: Any) -> Any:
    """AROUND configure_kv_cache_dtype: rows are int32 words of the plugin's own formats, so that
    SGLang's limits of torch's fp8 types on CPUs do not apply."""
    if not serves(kwargs["model"]):
        return original(**kwargs)
    return kwargs["server_args_kv_cache_dtype"], torch.int32


def chat_adapter(context: Any) -> Any:
    """SGLang's builder of the chat encoding `dsv4`."""
    from sglang_ext.chat import build_adapter

    return build_adapter(context)


def settle_request(original: Callable, self: Any, request: Any) -> str | None:
    """AROUND OpenAIServingChat._validate_request, whose answer is what SGLang refuses with."""
    from sglang_ext.chat import ChatAdapter
    from sglang_ext.request import check_schemas, settle

    if not isinstance(self._encoding_adapter, ChatAdapter):
        return original(self, request)
    try:
        settle(request)
        error = original(self, request)
        if error is None:
            check_schemas(request)
    except ValueError as refusal:
        return str(refusal)
    return error


def end_streams(original: Callable, self: Any) -> None:
    """AROUND TokenizerManager.force_exit_handler: tell requests that the server ends.

    SGLang kills its schedulers next and then waits for open connections, which nobody would end.
    """
    from sglang.srt.managers.io_struct import AbortReq

    from sglang_ext.config import SERVED_ARCHITECTURE

    original(self)
    if self.model_config.hf_config.architectures != [SERVED_ARCHITECTURE]:
        return
    reason = {
        "type": "abort",
        "message": "The server is shutting down",
        "status_code": HTTPStatus.SERVICE_UNAVAILABLE,
    }
    for rid in list(self.rid_to_state):
        self._handle_abort_req(AbortReq(rid=rid, finished_reason=reason))


def serves(model: Any) -> bool:
    from sglang_ext.config import DRAFT_ARCHITECTURE, SERVED_ARCHITECTURE

    return type(model).__name__ in (SERVED_ARCHITECTURE, DRAFT_ARCHITECTURE)
