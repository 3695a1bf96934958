"""GPTQ's int4, decoded value by value as its makers describe it, by nothing that loads it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def decoded(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """qweight int32 [in / 8, out], qzeros int32 [groups, out / 8], scales [groups, out] ->
    float32 [out, in]. Zeros of the first form are stored less one."""
    words, zeros = (t.numpy().view(np.uint32) for t in (qweight, qzeros))
    n_in, n_out = 8 * words.shape[0], words.shape[1]
    first = zeros[0, 0] == 0x77777777
    i, o = np.arange(n_in)[:, None], np.arange(n_out)[None, :]
    code = (words[i // 8, o] >> (4 * (i % 8)).astype(np.uint32)) & 15
    group = i // (n_in // len(zeros))
    zero = ((zeros[group, o // 8] >> (4 * (o % 8)).astype(np.uint32)) & 15) + first
    values = (code.astype(np.float32) - zero.astype(np.float32)) * scales.float().numpy()[group, o]
    return torch.from_numpy(values.astype(np.float32).T.copy())
