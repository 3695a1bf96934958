"""Conversations -> rows of token ids with loss weights, in the compact vocabulary."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsv4_plugin.chat import Encoder
from dsv4_plugin.chat.tokens import ASSISTANT, EOS
from dsv4_plugin.tools import conversations
from dsv4_plugin.tools.cli.render import tokenizer_path
from dsv4_plugin.tools.conversations import SKILLS, Conversation, Writer

PROMPT_WEIGHT = 0.05
"""Loss weight of tokens the model reads but need not write: they teach copying."""


@dataclass(frozen=True)
class Row:
    """ids of a conversation; weights [len(ids)] of predicting each of them."""

    ids: list[int]
    weights: list[float]
    skill: str


class Renderer:
    """Renders with the chat layer's encoder and marks what the assistant wrote."""

    def __init__(self) -> None:
        self.encoder = Encoder(tokenizer_path(None))
        self.assistant, self.eos = (self.encoder.ids([token])[0] for token in (ASSISTANT, EOS))

    def row(self, c: Conversation) -> Row:
        """Teaches every answer, or in thinking mode without tools, where the format drops the
        reasoning of earlier ones, the last.
        """
        ids = self.encoder.encode(
            c.messages,
            c.tools,
            thinking=c.thinking,
            effort=c.effort,
            response_format=c.response_format,
            add_generation_prompt=False,
        ).ids
        starts = [i for i, t in enumerate(ids) if t == self.assistant]
        ends = [i for i, t in enumerate(ids) if t == self.eos]
        weights = [PROMPT_WEIGHT] * len(ids)
        spans = list(zip(starts, ends, strict=True))
        for start, end in spans[-1:] if c.thinking and not c.tools else spans:
            # The token after <Assistant> (<think> or </think>) belongs to the prompt.
            weights[start + 2 : end + 1] = [1.0] * (end - start - 1)
        return Row(ids, weights, c.skill)

    def prompt(self, c: Conversation) -> list[int]:
        """The prompt for the last answer."""
        return self.encoder.encode(
            c.messages[:-1],
            c.tools,
            thinking=c.thinking,
            effort=c.effort,
            response_format=c.response_format,
        ).ids

    def answer(self, c: Conversation) -> list[int]:
        """The ids of the last answer, eos included."""
        row = self.row(c).ids
        prompt = self.prompt(c)
        if row[: len(prompt)] == prompt:
            return row[len(prompt) :]
        # An earlier turn lost its reasoning as the last one opened.
        return row[len(row) - row[::-1].index(self.assistant) + 1 :]


class Vocabulary:
    """The ids that occur, in order of their full ids; row i of the compact tables is `ids[i]`."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        self.rows = {full: row for row, full in enumerate(self.ids)}

    @classmethod
    def collect(cls, renderer: Renderer, samples: int = 400) -> Vocabulary:
        """What the templates can write: many samples of every skill, and all numbers."""
        found = {0, 1, 2}
        for held in (False, True):
            writer = Writer(7, held)
            for skill in SKILLS:
                for _ in range(samples):
                    found.update(renderer.row(writer.conversation(skill)).ids)
        numbers = [f"{n}" for n in range(1000)] + [f"{n:02}" for n in range(100)]
        words = [f"{n:03}" for n in range(100)]
        for text in numbers + words + _WORDS:
            found.update(renderer.encoder.ids([text]))
            found.update(renderer.encoder.ids([f" {text}"]))
        return cls(sorted(found))

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        return cls(json.loads(path.read_text()))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.ids))

    def compact(self, ids: Iterable[int]) -> list[int]:
        return [self.rows[i] for i in ids]


_WORDS = [
    word
    for group in (
        conversations.NAMES,
        conversations.CITIES,
        conversations.COLORS,
        conversations.JOBS,
        conversations.ITEMS,
        conversations.STYLES,
        conversations.STATES,
        conversations.VERBS,
        conversations.THINGS,
        conversations.SKIES,
    )
    for word in group
]


def batch(rows: Sequence[Row], vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
    """ids [B, S] in compact rows and weights [B, S], padded at the right to a multiple of 4."""
    longest = max(len(row.ids) for row in rows)
    longest += -(longest) % 4
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    weights = torch.zeros(len(rows), longest)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(vocabulary.compact(row.ids))
        weights[i, : len(row.ids)] = torch.tensor(row.weights)
    return ids, weights
