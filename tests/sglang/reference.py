"""transformers as the judge of greedy generations, teacher-forced and tie-aware."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from tests.tolerances import LOGPROB, TIE

from .server import Output


class Reference:
    def __init__(self, directory: Path) -> None:
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self._scores = lru_cache(maxsize=None)(self._score)

    @torch.inference_mode()
    def _score(self, ids: tuple[int, ...], n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logprobs of the last n ids, and the largest logprob at each of their places."""
        logits = self.model(torch.tensor([ids]), use_cache=False, logits_to_keep=n + 1).logits
        logprobs = logits[0, :-1].double().log_softmax(-1)
        picked = torch.tensor(ids[-n:])[:, None]
        return logprobs.gather(1, picked)[:, 0], logprobs.amax(-1)

    def errors(self, output: Output) -> tuple[float, float]:
        """Largest distance of a pick below the maximum, and of a logprob from the reference's."""
        picked, best = self._scores((*output.prompt, *output.ids), len(output.ids))
        reported = torch.tensor(output.logprobs or picked.tolist(), dtype=torch.float64)
        return float((best - picked).max()), float((reported - picked).abs().max())

    def check(self, outputs: list[Output]) -> None:
        for output in outputs:
            gap, difference = self.errors(output)
            where = f"prompt of {len(output.prompt)} tokens, {output.cached} of them cached"
            assert gap <= TIE, f"{where}: a pick lies {gap:.1e} below the reference's"
            assert difference <= LOGPROB, f"{where}: a logprob differs by {difference:.1e}"
