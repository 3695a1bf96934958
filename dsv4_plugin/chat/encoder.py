"""Messages -> prompt ids. Text is tokenized without added tokens: it cannot forge a turn."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, Self, TypedDict, Unpack

from dsv4_plugin import env
from dsv4_plugin.config import generation_of
from dsv4_plugin.json_file import read_object

from .effort import check_effort, check_generation, effort_text
from .render import FORMS, V4, Rendered, render
from .tokens import SYSTEM, Control, Part

CACHED_CHARACTERS = 4_000_000
"""Bound of the cache of tokenized text parts: about a million ids, 40 MB."""


class Encoding(Protocol):
    @property
    def ids(self) -> list[int]: ...


class Tokenizer(Protocol):
    """What is used of `tokenizers.Tokenizer`."""

    def to_str(self) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...
    def id_to_token(self, token_id: int) -> str | None: ...
    def get_vocab_size(self) -> int: ...
    def encode_batch_fast(
        self, input: list[str], *, add_special_tokens: bool
    ) -> Sequence[Encoding]: ...


@dataclass(frozen=True)
class Prompt:
    """`ids` to feed the model; `text` for display: tokenizing it again is not safe.

    `thinking`: the prompt ends inside a reasoning block, so that the model's output starts
    there. Pass it to `StreamParser`.
    """

    ids: list[int]
    text: str
    thinking: bool


class Options(TypedDict, total=False):
    """How a conversation is rendered.

    drop_reasoning=False keeps the reasoning of finished turns, which the format otherwise keeps
    only where the conversation has tools. (The others: see `render`.)
    """

    response_format: Mapping[str, Any] | None
    continue_final_message: bool
    add_generation_prompt: bool
    drop_reasoning: bool


class Encoder:
    """Encodes conversations for one checkpoint.

    `tokenizer` is a `tokenizers.Tokenizer`, a `transformers` fast tokenizer, or the path of a
    tokenizer.json or of the directory that holds it. `generation` chooses the texts for
    reasoning effort, and V4.1's form; `effort` is the effort of requests that name none
    (`env.EFFORT`).
    """

    def __init__(
        self, tokenizer: Any, generation: str = "april", effort: str | None = None
    ) -> None:
        self.generation = check_generation(generation)
        self.effort = check_effort(effort or env.EFFORT.read())
        self.tokenizer = load_tokenizer(tokenizer)
        self._texts = TextEncoder(self.tokenizer)
        self._controls: dict[Control, int] = {}

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> Self:
        """The encoder for a checkpoint directory: tokenizer.json and config.json."""
        config = read_object(Path(directory) / "config.json")
        return cls(directory, generation_of(config))

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        effort: str | int | None = None,
        **options: Unpack[Options],
    ) -> Prompt:
        """Encode OpenAI-style `messages`; `thinking=False` and `effort="none"` mean chat mode.

        Raises ValueError naming the message index and field for what the format cannot hold.
        """
        rendered = self.render(messages, tools, thinking, effort, **options)
        return Prompt(self.ids(rendered.parts), rendered.text, rendered.thinking)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool = True,
        effort: str | int | None = None,
        **options: Unpack[Options],
    ) -> Rendered:
        """As `encode`, up to the parts: control tokens and plain text."""
        effort = check_effort(self.effort if effort in (None, "") else effort, self.generation)
        text = effort_text(self.generation, effort)
        thinking = thinking and effort != "none"
        form = FORMS.get(self.generation, V4)
        return render(messages, tools, thinking=thinking, effort=text, form=form, **options)

    def ids(self, parts: Iterable[Part]) -> list[int]:
        """Token ids of `parts`: control tokens by id, text without added tokens."""
        parts = list(parts)
        encoded = iter(self._texts.encode([part for part in parts if type(part) is not Control]))
        ids: list[int] = []
        for part in parts:
            if type(part) is Control:
                ids.append(self._control(part))
            else:
                ids.extend(next(encoded))
        return ids

    def _control(self, token: Control) -> int:
        token_id = self._controls.get(token)
        if token_id is None:
            token_id = self.tokenizer.token_to_id(token)
            if token_id is None:
                name = "V4.1" if token == SYSTEM else "V4"
                raise ValueError(
                    f"tokenizer: has no token {str(token)!r}; is it DeepSeek-{name}'s?"
                )
            self._controls[token] = token_id
        return token_id


class TextEncoder:
    """Plain text -> ids, never an added token's id; results are cached per text part.

    `encode_special_tokens` of the tokenizers library spares only tokens flagged special, which
    `<｜User｜>`, `<think>` and most others are not: so a copy without added tokens is made.
    """

    def __init__(self, tokenizer: Tokenizer, cached_characters: int = CACHED_CHARACTERS) -> None:
        state = json.loads(tokenizer.to_str())
        state.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self._tokenizer: Tokenizer = type(tokenizer).from_str(  # type: ignore[attr-defined]
            json.dumps(state, ensure_ascii=False)
        )
        self._cache: OrderedDict[str, list[int]] = OrderedDict()
        self._room = cached_characters
        self._lock = Lock()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        found: dict[str, list[int]] = {}
        with self._lock:
            for text in texts:
                ids = self._cache.get(text)
                if ids is not None:
                    self._cache.move_to_end(text)
                    found[text] = ids
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        if missing:
            encodings = self._tokenizer.encode_batch_fast(missing, add_special_tokens=False)
            fresh = {text: e.ids for text, e in zip(missing, encodings, strict=True)}
            found |= fresh
            self._remember(fresh)
        return [found[text] for text in texts]

    def _remember(self, fresh: Mapping[str, list[int]]) -> None:
        with self._lock:
            for text, ids in fresh.items():
                if text not in self._cache:
                    self._cache[text] = ids
                    self._room -= len(text)
            while self._room < 0:
                oldest, _ = self._cache.popitem(last=False)
                self._room += len(oldest)


def load_tokenizer(source: Any) -> Tokenizer:
    """A `tokenizers.Tokenizer` from itself, a `transformers` fast tokenizer, or a path."""
    if isinstance(source, str | Path):
        from tokenizers import Tokenizer as FileTokenizer

        path = Path(source)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"tokenizer: no file {path}")
        try:
            return FileTokenizer.from_file(str(path))
        except Exception as error:  # tokenizers has no narrower one
            raise ValueError(f"{path} is no tokenizer that can be read: {error}") from error
    tokenizer = getattr(source, "backend_tokenizer", source)
    if not hasattr(tokenizer, "encode_batch_fast"):
        raise ValueError(
            "tokenizer: must be a tokenizers.Tokenizer, a transformers fast tokenizer or a path, "
            f"not {type(source).__name__}"
        )
    return tokenizer  # type: ignore[no-any-return]  # checked by the attribute above
