"""A logits processor that makes the model say given token ids (without overlap scheduling)."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from typing import Any

import torch

ARGUMENT = "script"
"""Key of `custom_params`: the ids to say, in this order; afterwards the model is free."""
BY_NAME = json.dumps({"callable": f"c{__name__}\nScript\n.".encode().hex()})
"""The processor as requests name it: a pickled reference to `Script` below."""


class Script:
    def __call__(self, logits: torch.Tensor, params: list[dict[str, Any]]) -> torch.Tensor:
        for row, given in zip(logits, params, strict=True):
            ids, said = given[ARGUMENT], len(given["__req__"].output_ids)
            if said < len(ids):
                row.fill_(-torch.inf)
                row[ids[said]] = 0.0
        return logits


assert pickle.loads(bytes.fromhex(json.loads(BY_NAME)["callable"])) is Script


def scripted(ids: Sequence[int]) -> dict[str, Any]:
    """Request fields that make the model say `ids`."""
    return {"custom_logit_processor": BY_NAME, "custom_params": {ARGUMENT: list(ids)}}
