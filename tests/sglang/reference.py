"""transformers as the judge of greedy generations, teacher-forced and tie-aware."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.tolerances import LOGPROB, TIE

from .server import Output


class Reference:
    """Scores in float32, and in float64 where a float32 score disagrees: a router or indexer tie
    within float32's rounding sends the two ways apart."""

    def __init__(self, directory: Path) -> None:
        torch.set_num_threads(1)
        self.directory = directory
        self._model = lru_cache(maxsize=None)(self._load)
        self._scores = lru_cache(maxsize=None)(self._score)

    def _load(self, dtype: torch.dtype) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            self.directory, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
        ).eval()

    @torch.inference_mode()
    def _score(self, ids: tuple[int, ...], n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Logprobs of the last n ids, and the largest logprob at each of their places."""
        model = self._model(dtype)
        logits = model(torch.tensor([ids]), use_cache=False, logits_to_keep=n + 1).logits
        logprobs = logits[0, :-1].double().log_softmax(-1)
        picked = torch.tensor(ids[-n:])[:, None]
        return logprobs.gather(1, picked)[:, 0], logprobs.amax(-1)

    def errors(self, output: Output, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
        """Largest distance of a pick below the maximum, and of a logprob from the reference's."""
        ids = (*output.prompt, *output.ids)
        picked, best = self._scores(ids, len(output.ids), dtype)
        reported = torch.tensor(output.logprobs or picked.tolist(), dtype=torch.float64)
        return float((best - picked).max()), float((reported - picked).abs().max())

    def check(self, outputs: list[Output]) -> None:
        for output in outputs:
            gap, difference = self.errors(output)
            if gap > TIE or difference > LOGPROB:
                gap, difference = self.errors(output, torch.float64)
            where = f"prompt of {len(output.prompt)} tokens, {output.cached} of them cached"
            assert gap <= TIE, f"{where}: a pick lies {gap:.1e} below the reference's"
            assert difference <= LOGPROB, f"{where}: a logprob differs by {difference:.1e}"

    def check_logprobs(self, output: Output) -> None:
        """As `check`, for ids that nobody picked."""
        difference = min(self.errors(output, d)[1] for d in (torch.float32, torch.float64))
        assert difference <= LOGPROB
