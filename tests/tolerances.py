"""One table of tolerances, by number format and kind of comparison."""

import torch

from dsv4_plugin.engine import LocalModel

LOGITS_STD = 3e-5
"""float32 logits against an oracle: largest difference over the oracle's standard deviation."""
LOGPROB = 1e-4
"""float32 log-probabilities through an engine."""
TIE = 3e-5
"""A greedy pick this close (log-probability) to the oracle's best counts as the same choice."""
OP_FP32 = 2e-5
"""One float32 operation against its reference, relative to the reference's largest value."""
BF16 = 4e-2
"""A bfloat16 network against float32, mean difference over the standard deviation."""
FP8_KV = 8e-2
"""An fp8 KV cache against a float32 one, likewise."""
QUANTISED = 2e-2
"""A quantised layer against the recorded one, norm of the difference over the norm."""
ATTENTION_BF16 = 5e-3
"""bfloat16 attention against float32: norm of the difference over the norm."""
FP16 = 2e-3
"""A product of float16 values against float32, relative to the largest value."""
BF16_SUM = 1e-2
"""A product of bfloat16 values with float32 sums, rounded once, relative to the largest value."""
ROUNDED_AGAIN = 5e-2
"""Logits of a quantised network whose sums ran in another order, mean difference over the
standard deviation: single activations round to a neighbouring e4m3 value."""


def clear_choices(model: LocalModel, prompt: list[int], chosen: list[int]) -> int:
    """How many of the greedily chosen ids are clear to `model`: all those have to be its own."""
    logits = model.logits(torch.tensor(prompt + chosen))[len(prompt) - 1 : -1]
    best = logits.topk(2).values
    clear = best[:, 0] - best[:, 1] > 0.1 * logits.std()
    assert (logits.argmax(-1) == torch.tensor(chosen))[clear].all()
    return int(clear.sum())
