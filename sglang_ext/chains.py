"""Chains of drafts on a CPU: what SGLang's EAGLE worker has kernels for, and on CPUs only in builds
of its own (`sgl_kernel`).

A chain is [the last token, drafts...]; its rows are N + 1 neighbouring rows of a step. Shapes: B
requests, N drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch
from sglang.srt.mem_cache.allocation import get_last_loc_torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_parallel
from torch import Tensor

_verified: ContextVar[tuple[Any, Tensor]] = ContextVar("verified")
"""SGLang's batch whose drafts are being verified, and the logits of all rows."""
EAGLE = "sglang.srt.speculative.eagle_utils"
ALLOCATION = "sglang.srt.mem_cache.allocation"
KERNELS = "sglang.kernels.ops.speculative"


def slots(req_to_token: Tensor, request: Tensor, start: Tensor, number: int) -> Tensor:
    """Of the next `number` tokens of each request [B * number]."""
    position = start[:, None] + torch.arange(number)
    return req_to_token[request.long()[:, None], position.long()].long().flatten()


def reserve_slots(
    req_pool_indices: Tensor, req_to_token: Tensor, start_offset: Tensor, end_offset: Tensor,
    out_cache_loc: Tensor, batch_size: int,
) -> None:  # fmt: skip
    """Enter new slots, those of a request behind those of another, at its tokens start..end-1."""
    requests, starts, ends = (x.tolist() for x in (req_pool_indices, start_offset, end_offset))
    new = out_cache_loc.int().split((end_offset - start_offset).tolist())
    for request, start, end, its in zip(requests, starts, ends, new, strict=True):
        req_to_token[request, start:end] = its


def draft_slots(
    req_pool_indices: Tensor, req_to_token: Tensor, seq_lens: Tensor, out_cache_loc: Tensor,
    topk: int, num_cols: int, **unused: None,
) -> None:  # fmt: skip
    out_cache_loc.copy_(slots(req_to_token, req_pool_indices, seq_lens, topk * num_cols))


def verified_slots(
    req_pool_indices: Tensor, req_to_token: Tensor, start_offset: Tensor, batch_size: int,
    draft_token_num: int, device: str,
) -> Tensor:  # fmt: skip
    return slots(req_to_token, req_pool_indices, start_offset, draft_token_num)


def build_chain(
    parent_list: Tensor, top_scores_index: Tensor, seq_lens: Tensor, tree_mask: Tensor,
    positions: Tensor, retrieve_index: Tensor, retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor, *sizes: int,
) -> None:  # fmt: skip
    """Each row's index, and the next one's in its request [B, N + 1], -1 behind the last. There are
    no siblings, and nobody reads the mask."""
    rows = torch.arange(retrieve_index.shape[1])
    retrieve_index.copy_(torch.arange(retrieve_index.numel()).view_as(retrieve_index))
    retrieve_next_token.copy_(torch.where(rows < len(rows) - 1, rows + 1, -1))
    positions.copy_((seq_lens[:, None] + rows).flatten())


def verify_chain(
    *, predicts: Tensor, accept_index: Tensor, accept_token_num: Tensor, candidates: Tensor,
    retrieve_index: Tensor, target_predict: Tensor, **tree: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """candidates [B, N + 1] are the chains, target_predict what the model finds likeliest behind
    each of their rows. Drafts are kept as long as they are what is picked there, as without drafts:
    that, or a sample."""
    batch, logits = _verified.get()
    if not batch.sampling_info.is_all_greedy:
        target_predict = samples(batch.sampling_info, batch.seq_lens, logits).view_as(candidates)
        target_predict = get_parallel().tp_group.broadcast(target_predict)
    kept = (candidates[:, 1:] == target_predict[:, :-1]).int().cumprod(1).sum(1)
    accept_token_num.copy_(kept)
    inside = torch.arange(candidates.shape[1]) <= kept[:, None]
    accept_index.copy_(torch.where(inside, retrieve_index, -1))
    predicts.copy_(target_predict.flatten())
    return predicts, accept_index, accept_token_num


def samples(info: Any, seq_lens: Tensor, logits: Tensor) -> Tensor:
    """One behind each row of chains, by SGLang's sampler in torch: logits [B * (N + 1), V]."""
    n = len(logits) // len(seq_lens)

    def of_rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.repeat_interleave(n, 0)

    found: Tensor = top_k_top_p_min_p_sampling_from_probs_torch(
        torch.softmax(logits.float() / of_rows(info.temperatures), -1),
        of_rows(info.top_ks), of_rows(info.top_ps), of_rows(info.min_ps),
        info.need_min_p_sampling, of_rows(info.sampling_seed),
        (seq_lens[:, None] + torch.arange(n)).flatten(),
    )  # fmt: skip
    return found


def verify(
    original: Callable, verify_input: Any, batch: Any, logits_output: Any, *args: Any, **rest: Any
) -> Any:
    """AROUND eagle_sample: it adjusts logits in place, and `verify_chain` picks."""
    token = _verified.set((batch, logits_output.next_token_logits))
    try:
        return original(verify_input, batch, logits_output, *args, **rest)
    finally:
        _verified.reset(token)


def picks_itself(**conditions: bool) -> bool:
    """In place of _verify_uses_greedy: `verify_chain` samples, too."""
    return True


def last_tokens(
    accept_tokens: Tensor, accept_lens: Tensor, bonus_tokens: Tensor, accept_stride: int,
    batch_size: int,
) -> None:  # fmt: skip
    """Of each request's accepted tokens [B, accept_stride], of which the first accept_lens are."""
    last = accept_lens.long()[:, None] - 1
    bonus_tokens.copy_(accept_tokens.view(batch_size, accept_stride).gather(1, last)[:, 0])


REPLACED = {
    f"{ALLOCATION}.get_last_loc": get_last_loc_torch,
    f"{ALLOCATION}.assign_req_to_token_pool_func": reserve_slots,
    f"{KERNELS}.cache_locs.assign_draft_cache_locs_contiguous_func": draft_slots,
    f"{KERNELS}.cache_locs.assign_extend_cache_locs_uniform_func": verified_slots,
    f"{KERNELS}.spec_tree.build_tree_kernel_efficient_func": build_chain,
    f"{KERNELS}.spec_tree.verify_tree_greedy_func": verify_chain,
    f"{KERNELS}.eagle.fill_bonus_tokens_func": last_tokens,
    f"{EAGLE}._verify_uses_greedy": picks_itself,
}


def install() -> None:
    """In a process whose model drafts on a CPU."""
    hooks = {target: (function, HookType.REPLACE) for target, function in REPLACED.items()}
    hooks[f"{EAGLE}.eagle_sample"] = verify, HookType.AROUND
    for target, (function, kind) in hooks.items():
        if target not in HookRegistry._hooks:
            HookRegistry.register(target, function, kind)
    HookRegistry.apply_hooks()
    missing = hooks.keys() - HookRegistry._patched
    if missing:
        raise RuntimeError(f"dsv4-plugin cannot draft on this CPU: {min(missing)} is not hooked")
