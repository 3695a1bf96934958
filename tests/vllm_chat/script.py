"""A logits processor that makes the model say given token ids."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

ARGUMENT = "script"
"""Key of `vllm_xargs`: the ids to say, in this order; afterwards the model is free."""


class Script(AdapterLogitsProcessor):
    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        ids = (params.extra_args or {}).get(ARGUMENT)
        return partial(_say, ids) if ids else None


def _say(ids: list[int], output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    if len(output_ids) < len(ids):
        logits.fill_(-torch.inf)
        logits[ids[len(output_ids)]] = 0.0
    return logits
