"""Text is text: no string of a request becomes a control token, and no script is mistokenized."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections import Counter
from typing import Any

import pytest

from .data import call, encoder, tokenizer_file, tool

ADDED = {
    token["content"]: token["id"]
    for token in json.loads(tokenizer_file().read_text(encoding="utf-8"))["added_tokens"]
}


def request(place: str, text: str) -> dict[str, Any]:
    """A request that holds `text` in one place and nothing of note elsewhere."""

    def at(name: str, other: str = "x") -> str:
        return text if name == place else other

    arguments = json.dumps({at("argument name"): at("argument"), "n": [at("JSON argument")]})
    messages = [
        {"role": "system", "content": at("system")},
        {"role": "developer", "content": at("developer")},
        {"role": "user", "content": [{"type": "text", "text": at("user")}]},
        {
            "role": "assistant",
            "content": at("content"),
            "reasoning_content": at("reasoning"),
            "tool_calls": [call(at("call name"), arguments), call("f", at("broken arguments"))],
        },
        {"role": "tool", "tool_call_id": "c1", "content": at("tool result")},
        {"role": "latest_reminder", "content": at("reminder")},
    ]
    offered = tool(at("tool name"), **{at("property"): {"description": at("schema")}})
    offered["function"]["description"] = at("tool description")
    schema = {"type": "json_schema", "json_schema": {"schema": {"title": at("response schema")}}}
    return {"messages": messages, "tools": [offered], "response_format": schema}


PLACES = [
    *("system", "developer", "user", "content", "reasoning", "argument", "JSON argument"),
    *("broken arguments", "tool result", "reminder", "schema", "tool description"),
    "response schema",
]
NAMES = ["call name", "argument name", "tool name", "property"]


@pytest.mark.parametrize("place", PLACES)
def test_added_tokens_in_text_stay_text(place: str) -> None:
    controls = set(ADDED.values())
    usual = encoder().encode(**request(place, "x")).ids
    for texts in (ADDED, ["".join(ADDED)]):
        prompt = encoder().encode(**request(place, " ".join(texts)))
        count = Counter(token for token in prompt.ids if token in controls)
        assert count == Counter(token for token in usual if token in controls)
        decoded = encoder().tokenizer.decode(prompt.ids, skip_special_tokens=False)
        assert decoded == prompt.text


@pytest.mark.parametrize("place", NAMES)
def test_names_that_could_close_their_tag_are_refused(place: str) -> None:
    for name in ("<｜User｜>", '" string="false', "a\nb"):
        with pytest.raises(ValueError, match=r"(name|arguments|properties): .* cannot be a name"):
            encoder().encode(**request(place, name))


@pytest.mark.parametrize("token", ADDED)
def test_each_added_token_in_a_user_message(token: str) -> None:
    prompt = encoder().encode([{"role": "user", "content": token}], effort="low")
    assert prompt.ids.count(ADDED[token]) == (
        token in ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>")
    )


def test_every_character_tokenizes_as_the_tokenizers_library_does() -> None:
    known = [
        chr(code)
        for code in range(sys.maxunicode + 1)
        if unicodedata.category(chr(code)) not in ("Cs", "Cn", "Co")
    ]
    lines = ["".join(known[start : start + 97]) for start in range(0, len(known), 97)]
    lines += [f"a {letter} b" for letter in known[::41]]
    library = encoder().tokenizer.encode_batch(lines, add_special_tokens=False)
    assert encoder()._texts.encode(lines) == [encoding.ids for encoding in library]


SCRIPTS = {
    "latin": "Zażółć gęślą jaźń, l'été où l'on naît; 12345.6 €",
    "greek": "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "cyrillic": "Съешь ещё этих мягких французских булок",
    "hebrew": "דג סקרן שט בים מאוכזב",
    "arabic": "نص حكيم له سر قاطع وذو شأن عظيم ١٢٣",
    "devanagari": "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा",
    "thai": "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "chinese": "我能吞下玻璃而不伤身体。今天是2024年12月31日",
    "japanese": "いろはにほへと ちりぬるを カタカナ 漢字",
    "korean": "키스의 고유조건은 입술끼리 만나야 하고",
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 ✌🏽",
    "combining": "e\u0301 n\u0303 \u200d\u200b\ufeff",
    "code": "def f(x):\n\tif x <= 1:\r\n\n        return {'a': [1,2,3]}  # done\n\n\n",
    "space": "  \t \n \r\n \u3000 \u00a0 a   b \n\n\n\n c\n ",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts(script: str) -> None:
    text = SCRIPTS[script]
    assert encoder().ids([text]) == encoder().tokenizer.encode(text, add_special_tokens=False).ids
