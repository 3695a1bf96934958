"""The parser's laws over a seeded few thousand of the fuzzer's cases, over hypothesis text, and
over what dsv4-mini says."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_plugin.chat import StreamParser, TokenBytes, collect
from dsv4_plugin.engine import load
from dsv4_plugin.tools.conversations import SKILLS, held_out

from . import fuzz, laws, outputs
from .data import TOOLS, encoder
from .strategies import MARKUP


@pytest.mark.parametrize("seed", [0, 10**6, 2 * 10**6])
def test_generated_outputs(seed: int) -> None:
    fuzz.run(2000, seed)


@given(
    st.lists(st.one_of(st.sampled_from(MARKUP), st.text(max_size=8)), max_size=12).map("".join),
    st.booleans(),
    st.sampled_from([TOOLS, None]),
    st.sampled_from(["stop", "length", "abort"]),
)
@settings(max_examples=1000, deadline=None, derandomize=True)
def test_any_text(text: str, thinking: bool, tools: laws.Tools, finish: str) -> None:
    laws.check_any(text, thinking, tools, finish, Random(0))


def read_ids(ids: list[list[int]], table: TokenBytes, finish: str) -> object:
    parser = StreamParser(True, TOOLS, table, call_id=lambda: "c")
    events = [event for piece in ids for event in parser.feed_ids(piece)]
    return collect(events + parser.finish(finish))


@pytest.mark.parametrize("seed", range(40))
def test_ids_and_text_agree_at_every_cut(seed: int) -> None:
    """Ids one at a time and all at once give what their text gives, cut at every position."""
    tokenizer, table = encoder().tokenizer, TokenBytes(encoder().tokenizer)
    random = Random(seed)
    text = outputs.output_of(outputs.message(random), TOOLS)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole = laws.read([text])
    for end in range(len(ids) + 1):
        finish = "stop" if end == len(ids) else "length"
        one_by_one = read_ids([[token] for token in ids[:end]], table, finish)
        assert one_by_one == read_ids([ids[:end]], table, finish)
        if end < len(ids):
            decoded = tokenizer.decode(ids[:end], skip_special_tokens=False)
            if "\ufffd" not in decoded:
                laws.check_cut(text, len(decoded), True, whole)


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes(seed: int) -> None:
    """Random ids: broken UTF-8 decodes as `tokenizers` decodes it, and nothing raises."""
    tokenizer, table = encoder().tokenizer, TokenBytes(encoder().tokenizer)
    random = Random(seed)
    ids = [
        random.choice([random.randrange(3, 256), random.randrange(3, 128_000)]) for _ in range(300)
    ]
    whole = read_ids([ids], table, "stop")
    assert read_ids([[token] for token in ids], table, "stop") == whole
    decoded = tokenizer.decode(ids, skip_special_tokens=False)
    parser = StreamParser(True, None, table)
    by_ids = collect([*parser.feed_ids(ids), *parser.finish()])
    assert by_ids == laws.read([decoded], True, None)


def test_what_mini_says(mini: Path) -> None:
    """Greedy answers of the local engine, ids one at a time and all at once, text cut anywhere."""
    asked = [c for skill in SKILLS for c in held_out(skill, 2)]
    prompts = [
        encoder().encode(
            c.messages[:-1],
            c.tools,
            thinking=c.thinking,
            effort=c.effort,
            response_format=c.response_format,
        )
        for c in asked
    ]
    table = TokenBytes(encoder().tokenizer)
    answers = load(mini, "float32").generate([prompt.ids for prompt in prompts], 128)
    for c, prompt, ids in zip(asked, prompts, answers, strict=True):
        finish = "stop" if ids[-1] == 1 else "length"
        text = encoder().tokenizer.decode(ids, skip_special_tokens=False)
        whole = laws.check_any(text, prompt.thinking, c.tools, finish, Random(0))
        for pieces in ([ids], [[token] for token in ids]):
            numbers = count()
            parser = StreamParser(
                prompt.thinking, c.tools, table, call_id=lambda n=numbers: f"c{next(n)}"
            )
            events = [event for piece in pieces for event in parser.feed_ids(piece)]
            assert collect(events + parser.finish(finish)) == whole
