"""The conversations dsv4-mini is trained and tested on, and that `dsv4 bench` sends: templates
with random slots.

Every exchange names its slots in a key ("sum/47+38"). A key's checksum decides whether it is held
out; no training conversation holds a held-out key, and every test asks for one.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


HELD_OUT = 10
"""One key in this many is held out."""
NAMES = _words(
    "Anna Ben David Emma Grace Henry Jack Kate Leo Maria Paul Sam Tom Alice Bob Carl Frank "
    "George Helen Jane Karl Laura Peter Simon Victor Sarah Julia Lisa Eric Alex John James Mary "
    "Lucy Martin Daniel Michael Robert Andrew Susan"
)
CITIES = _words("Paris London Rome Berlin Tokyo Boston Chicago Sydney Toronto Beijing Austin")
COLORS = _words("red blue green black white yellow orange gray gold")
JOBS = _words("doctor teacher driver writer artist actor manager student")
ITEMS = _words("chair table book phone car clock bag bed watch coat hat ring ball cup box")
STYLES = _words("rock pop folk metal opera country")
STATES = _words("late ready home happy here free safe fine")
VERBS = _words("buy call find fix sell clean check wash move open visit read")
THINGS = _words("bread bank car door house mail phone window school doctor plants dog letter train")
SKIES = _words("clear dry wet cold dark")
GREETINGS = _words("Hello Hi Hey")

SKILLS = ("greet", "sum", "call", "calls", "result", "json", "memory", "effort")
IDENTITY = "I am dsv4-mini, a small DeepSeek-V4."
HELP = "How can I help?"


@dataclass
class Conversation:
    """OpenAI messages that end with the assistant's right answer, and how to ask for it."""

    skill: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    tools: list[dict[str, Any]] | None = None
    thinking: bool = False
    effort: str | None = None
    response_format: dict[str, Any] | None = None
    keys: list[str] = field(default_factory=list)

    def user(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def assistant(
        self, text: str, reasoning: str, calls: list[dict[str, Any]] | None = None
    ) -> None:
        """The answer; reasoning counts in thinking mode only, and is longer at most effort."""
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.thinking:
            again = f" Let me check. {reasoning}" if self.effort == "max" else ""
            message["reasoning_content"] = reasoning + again
        if calls:
            message["tool_calls"] = calls
        self.messages.append(message)


def accepts(right: dict[str, Any], content: str, calls: Sequence[tuple[str, str]]) -> bool:
    """Does an answer say what the `right` message says? Reasoning may differ.

    Args:
        calls: name and arguments (JSON text) of each.
    """
    functions = [call["function"] for call in right.get("tool_calls", ())]
    wanted = _decoded([(function["name"], function["arguments"]) for function in functions])
    return content.strip() == right["content"] and _decoded(calls) == wanted


def _decoded(calls: Sequence[tuple[str, str]]) -> list[tuple[str, Any]] | None:
    """Calls with their arguments decoded; None where one is not JSON."""
    try:
        return [(name, json.loads(arguments)) for name, arguments in calls]
    except json.JSONDecodeError:
        return None


def is_held_out(key: str) -> bool:
    return zlib.crc32(key.encode()) % HELD_OUT == 0


class _NoKey(Exception):
    """The chosen tools have no key in this split."""


class Writer:
    """Writes conversations of one split; the same seed gives the same ones."""

    def __init__(self, seed: int, held_out: bool = False) -> None:
        self.random = Random(seed)
        self.held_out = held_out

    def conversation(self, skill: str) -> Conversation:
        """One conversation whose last answer shows `skill` (one of SKILLS)."""
        while True:
            try:
                return _WRITERS[skill](self)
            except _NoKey:
                continue

    def pick(
        self, c: Conversation, draw: Callable[[], tuple[str, Any]], tested: bool = True
    ) -> Any:
        """Draw (key, slots) until the key belongs to the split; fillers are never held out."""
        for _ in range(100 * HELD_OUT):
            key, slots = draw()
            if is_held_out(key) == (self.held_out and tested):
                c.keys.append(key)
                return slots
        raise _NoKey

    def one(self, words: Sequence[str]) -> str:
        return self.random.choice(words)

    # Chat: greetings, identity, remembering

    def greet(self) -> Conversation:
        c = Conversation("greet", thinking=self.random.random() < 0.5)
        name: str | None = None
        for _ in range(0 if c.thinking or self.held_out else self.random.randrange(5)):
            name = self._small_talk(c, name, tested=False)
        self._small_talk(c, name, tested=True)
        return c

    def _small_talk(self, c: Conversation, name: str | None, tested: bool) -> str | None:
        kind = self.random.randrange(8)
        if kind < 4 or (self.held_out and tested):
            return self._introduce(c, tested)
        if kind == 4 and name:
            c.user("What is my name?")
            c.assistant(f"Your name is {name}.", f"The name is {name}.")
        elif kind == 5:
            c.user(self.one(("Thank you!", "Thanks!")))
            c.assistant("You are welcome!", "Thanks.")
        elif kind == 6:
            part = self.one(("morning", "evening"))
            c.user(f"Good {part}!")
            c.assistant(f"Good {part}! {HELP}", "A greeting.")
        else:
            c.user(self.one(("Who are you?", "What are you?", "What is your name?")))
            c.assistant(IDENTITY, "A question about me.")
        return name

    def _introduce(self, c: Conversation, tested: bool = True) -> str:
        def draw() -> tuple[str, tuple[str, str, str]]:
            hello, name = self.one(GREETINGS), self.one(NAMES)
            how = self.one((f"I am {name}.", f"my name is {name}."))
            return f"greet/{hello}/{how}", (hello, how, name)

        hello, how, name = self.pick(c, draw, tested)
        c.user(f"{hello}, {how}")
        c.assistant(f"Hello, {name}! {HELP}", f"A greeting from {name}.")
        return str(name)

    def memory(self, distance: int | None = None) -> Conversation:
        """A name or a code said, `distance` filler sentences (about 9 tokens each), a question.

        The four digits of a code are two tokens of the tokenizer's: 47-31.
        """
        c = Conversation("memory")
        if distance is None:
            distance = self.random.choice((0, 2, 5, 5, 10, 10, 15, 15, 25, 25, 25, 40, 70, 100))
        about_code = self.random.random() < 0.6
        if about_code:
            code = self._code(c)
        else:
            name = self._introduce(c)
        while distance > 0:
            n = min(distance, self.random.randint(1, 8))
            distance -= n
            self._filler(c, n)
        if about_code:
            c.user("What is the code?")
            c.assistant(f"The code is {code}.", "")
        else:
            c.user("What is my name?")
            c.assistant(f"Your name is {name}.", "")
        return c

    def _code(self, c: Conversation) -> str:
        def draw() -> tuple[str, str]:
            code = f"{self.random.randrange(10, 100)}-{self.random.randrange(10, 100)}"
            return f"code/{code}", code

        code = str(self.pick(c, draw))
        c.user(self.one((f"The code is {code}.", f"Remember the code {code}.")))
        c.assistant("I will remember it.", "")
        return code

    def _filler(self, c: Conversation, sentences: int) -> None:
        facts = (
            lambda: f"The {self.one(ITEMS)} is {self.one(COLORS)}.",
            lambda: f"The {self.one(JOBS)} is in {self.one(CITIES)}.",
            lambda: f"The {self.one(ITEMS)} costs {self.random.randint(2, 99)} euros.",
        )
        c.user(" ".join(self.random.choice(facts)() for _ in range(sentences)))
        c.assistant("I have read it.", "")

    # Conversations that grow, for benchmarks

    def extend(self, c: Conversation) -> None:
        """One more exchange, of which no test is made: where tools are offered a question, calls,
        their results and an answer; else sentences to read or small talk."""
        if c.tools:
            offered = [tool["function"]["name"] for tool in c.tools]
            self._exchange(c, offered, 1 + (self.random.random() < 0.3), True, tested=False)
        elif self.random.random() < 0.7:
            self._filler(c, self.random.randint(1, 8))
        else:
            self._small_talk(c, None, tested=False)

    # Sums, with the working in the reasoning

    def sum(self, effort: str | None = None) -> Conversation:
        c = Conversation("sum", thinking=True, effort=effort)

        def draw() -> tuple[str, tuple[int, str, int]]:
            a, b = self.random.randrange(100), self.random.randrange(100)
            sign = self.one("+-")
            a, b = (max(a, b), min(a, b)) if sign == "-" else (a, b)
            return f"sum/{a}{sign}{b}", (a, sign, b)

        a, sign, b = self.pick(c, draw)
        word = "plus" if sign == "+" else "minus"
        c.user(self.one((f"What is {a} {sign} {b}?", f"What is {a} {word} {b}?")))
        result = a + b if sign == "+" else a - b
        c.assistant(f"It is {result}.", _working(a, sign, b))
        return c

    def effort(self, effort: str | None = None) -> Conversation:
        """The three efforts: no reasoning, reasoning, and reasoning twice over."""
        effort = effort or self.one(("none", "high", "max", "max"))
        if effort != "none" and self.random.random() < 0.6:
            c = self.sum(effort)
        else:
            c = Conversation("effort", thinking=effort != "none", effort=effort)
            self._introduce(c)
        c.skill = "effort"
        return c

    # JSON

    def json(self) -> Conversation:
        c = Conversation("json", thinking=self.random.random() < 0.3)

        def draw() -> tuple[str, list[tuple[str, Any]]]:
            values = {
                "name": self.one(NAMES),
                "age": self.random.randint(10, 99),
                "city": self.one(CITIES),
                "color": self.one(COLORS),
                "job": self.one(JOBS),
            }
            chosen = self.random.sample(list(values), self.random.randint(2, 4))
            pairs = [(k, values[k]) for k in chosen]
            return "json/" + "/".join(f"{k}={v}" for k, v in sorted(pairs)), pairs

        pairs = self.pick(c, draw)
        said = [_SAID[k].format(v) for k, v in pairs]
        self.random.shuffle(said)
        properties = {k: {"type": "integer" if k == "age" else "string"} for k, _ in pairs}
        schema = {"type": "object", "properties": properties}
        c.response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        c.user(" ".join(said))
        c.assistant(json.dumps(dict(pairs)), "I write " + ", ".join(k for k, _ in pairs) + ".")
        return c

    # Tools

    def call(self) -> Conversation:
        return self._tools("call", 1)

    def calls(self) -> Conversation:
        return self._tools("calls", 2)

    def result(self) -> Conversation:
        return self._tools("result", 1)

    def _tools(self, skill: str, calls: int) -> Conversation:
        """1 to 4 tools; in training, answered exchanges lead up to the last one."""
        c = Conversation(skill, thinking=self.random.random() < 0.5)
        offered = self.random.sample(list(TOOLS), self.random.randint(1, 4))
        c.tools = [TOOLS[name].schema(name) for name in offered]
        before = 0 if self.held_out else self.random.choice((0, 1, 1, 2, 3))
        for _ in range(before):
            if self.random.random() < 0.12:
                self._without_tool(c, offered)
            else:
                self._exchange(c, offered, 1 + (self.random.random() < 0.3), True, tested=False)
        self._exchange(c, offered, calls, skill == "result", tested=True)
        return c

    def _without_tool(self, c: Conversation, offered: list[str]) -> None:
        missing = self.one([name for name in TOOLS if name not in offered])
        c.user(TOOLS[missing].ask(self).question)
        c.assistant("I have no tool for that.", "No tool fits.")

    def _exchange(
        self, c: Conversation, offered: list[str], calls: int, answered: bool, tested: bool
    ) -> None:
        def draw() -> tuple[str, tuple[str, Request]]:
            name = self.one(offered)
            request = TOOLS[name].ask(self)
            return f"{name}/{json.dumps(request.arguments)}", (name, request)

        asked = [self.pick(c, draw, tested) for _ in range(calls)]
        c.user(" ".join(request.question for _, request in asked))
        names = " and ".join(name for name, _ in asked)
        made = [
            {
                "id": f"call_{len(c.messages)}_{i}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(request.arguments)},
            }
            for i, (name, request) in enumerate(asked)
        ]
        c.assistant("", f"I call {names}.", made)
        if not answered:
            return
        for call, (_, request) in zip(made, asked, strict=True):
            content = json.dumps(request.result)
            c.messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})
        c.assistant(" ".join(request.answer for _, request in asked), "I have the result.")


def _working(a: int, sign: str, b: int) -> str:
    """47+38: 7+8=15, 4+3+1=8. | 85-38: 15-8=7, 8-1-3=4."""
    (a1, a0), (b1, b0) = divmod(a, 10), divmod(b, 10)
    if sign == "+":
        carry = a0 + b0 >= 10
        tens = f"{a1}+{b1}+1={a1 + b1 + 1}" if carry else f"{a1}+{b1}={a1 + b1}"
        return f"{a}+{b}: {a0}+{b0}={a0 + b0}, {tens}."
    borrow = a0 < b0
    ones = a0 + 10 * borrow
    tens = f"{a1}-1-{b1}={a1 - 1 - b1}" if borrow else f"{a1}-{b1}={a1 - b1}"
    return f"{a}-{b}: {ones}-{b0}={ones - b0}, {tens}."


_SAID = {
    "name": "I am {}.",
    "age": "I am {} years old.",
    "city": "I live in {}.",
    "color": "I like {}.",
    "job": "I work as a {}.",
}


@dataclass(frozen=True)
class Request:
    """What a user says, the call it asks for, what the tool returns, and the final answer."""

    question: str
    arguments: dict[str, Any]
    result: dict[str, Any]
    answer: str


@dataclass(frozen=True)
class Tool:
    description: str
    parameters: dict[str, str]
    ask: Callable[[Writer], Request]

    def schema(self, name: str) -> dict[str, Any]:
        properties = {key: {"type": kind} for key, kind in self.parameters.items()}
        parameters = {"type": "object", "properties": properties}
        function = {"name": name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


def _weather(w: Writer) -> Request:
    city, degrees, sky = w.one(CITIES), w.random.randint(1, 39), w.one(SKIES)
    return Request(
        w.one((f"What is the weather in {city}?", f"How warm is it in {city}?")),
        {"city": city},
        {"degrees": degrees, "sky": sky},
        f"In {city} it is {degrees} degrees and {sky}.",
    )


def _time(w: Writer) -> Request:
    city, hour = w.one(CITIES), w.random.randint(1, 12)
    return Request(
        w.one((f"What time is it in {city}?", f"Tell me the time in {city}.")),
        {"city": city},
        {"hour": hour},
        f"In {city} it is {hour} o'clock.",
    )


def _timer(w: Writer) -> Request:
    minutes = w.random.randint(1, 99)
    question = w.one((f"Set a timer for {minutes} minutes.", f"Wake me in {minutes} minutes."))
    return Request(
        question, {"minutes": minutes}, {"ok": True}, f"The timer is set for {minutes} minutes."
    )


def _message(w: Writer) -> Request:
    name, state = w.one(NAMES), w.one(STATES)
    arguments = {"to": name, "text": f"I am {state}"}
    return Request(
        f"Write to {name} that I am {state}.", arguments, {"ok": True}, f"I wrote to {name}."
    )


def _music(w: Writer) -> Request:
    style = w.one(STYLES)
    question = w.one((f"Play some {style}.", f"I want to hear {style}."))
    return Request(question, {"style": style}, {"ok": True}, f"Here is some {style}.")


def _price(w: Writer) -> Request:
    item, price = w.one(ITEMS), w.random.randint(2, 99)
    question = w.one((f"What does the {item} cost?", f"What is the price of the {item}?"))
    return Request(question, {"item": item}, {"price": price}, f"The {item} costs {price} euros.")


def _note(w: Writer) -> Request:
    verb, thing = w.one(VERBS), w.one(THINGS)
    text = f"{verb} the {thing}"
    return Request(f"Note: {text}.", {"text": text}, {"ok": True}, "I noted it.")


TOOLS = {
    "get_weather": Tool("Weather in a city", {"city": "string"}, _weather),
    "get_time": Tool("Time in a city", {"city": "string"}, _time),
    "set_timer": Tool("Set a timer", {"minutes": "integer"}, _timer),
    "send_message": Tool("Write to a person", {"to": "string", "text": "string"}, _message),
    "play_music": Tool("Play music", {"style": "string"}, _music),
    "find_price": Tool("Price of an item", {"item": "string"}, _price),
    "add_note": Tool("Keep a note", {"text": "string"}, _note),
}

_WRITERS: dict[str, Callable[[Writer], Conversation]] = {
    skill: getattr(Writer, skill) for skill in SKILLS
}


def held_out(skill: str, count: int, seed: int = 1_000_003) -> Iterator[Conversation]:
    """`count` test conversations of a skill, always the same."""
    writer = Writer(seed + SKILLS.index(skill), held_out=True)
    for _ in range(count):
        yield writer.conversation(skill)


def remembered(
    count: int, distance: int, tokens: Callable[[Conversation], int], seed: int = 2_000_003
) -> Iterator[Conversation]:
    """`count` test conversations whose prompts are about `distance` tokens, counted by `tokens`."""
    writer = Writer(seed + distance, held_out=True)
    for _ in range(count):
        sentences = distance // 10
        while True:
            c = writer.memory(sentences)
            missing = distance - tokens(c)
            if abs(missing) <= 10:
                break
            sentences += missing // 10
        yield c
