"""dsv4-mini's conversations: the same for a seed, split by slots, rendered as they are served."""

import json
from collections import Counter

import pytest

from dsv4_plugin.chat import StreamParser, collect
from dsv4_plugin.tools.conversations import SKILLS, Writer, held_out, is_held_out, remembered
from dsv4_plugin.tools.mini import COMPACT, VOCABULARY
from training.data import Renderer, Vocabulary


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer()


def test_a_seed_gives_the_same_conversations():
    first, again, other = (
        [Writer(seed).conversation(skill) for skill in SKILLS] for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("skill", SKILLS)
def test_no_training_conversation_holds_a_held_out_key(skill):
    writer = Writer(0)
    keys = {key for _ in range(500) for key in writer.conversation(skill).keys}
    tested = {key for c in held_out(skill, 200) for key in c.keys}
    assert len(tested) > 3
    assert all(map(is_held_out, tested))
    assert not any(map(is_held_out, keys))


@pytest.mark.parametrize("skill", SKILLS)
def test_answers_follow_their_prompts(renderer, skill):
    """A row is the prompt as it is served, then the answer, of which every token is taught."""
    for c in held_out(skill, 30):
        prompt, answer, row = renderer.prompt(c), renderer.answer(c), renderer.row(c)
        assert answer[-1] == renderer.eos
        assert row.weights[-len(answer) :] == [1.0] * len(answer)
        assert row.weights[-len(answer) - 1] < 1
        if c.tools or not c.thinking or len(c.messages) == 2:
            assert row.ids == prompt + answer


@pytest.mark.parametrize("skill", SKILLS)
def test_right_answers_parse_to_themselves(renderer, skill):
    for c in held_out(skill, 30):
        parser = StreamParser(c.thinking, c.tools, renderer.encoder.tokenizer)
        events = [*parser.feed_ids(renderer.answer(c)), *parser.finish("stop")]
        found, right = collect(events), c.messages[-1]
        assert found.reasoning == right.get("reasoning_content")
        assert (found.content or "").strip() == right["content"]
        names = [call["function"]["name"] for call in right.get("tool_calls", ())]
        assert [call.name for call in found.tool_calls] == names


def test_working_is_right():
    writer = Writer(1)
    signs = Counter()
    for _ in range(300):
        c = writer.conversation("sum")
        working, answer = c.messages[1]["reasoning_content"], c.messages[1]["content"]
        for step in working.removesuffix(".").split(": ")[1].split(", "):
            left, right = step.split("=")
            assert eval(left) == int(right)
        total = working.split(":")[0]
        assert answer == f"It is {eval(total)}."
        signs["+" in total] += 1
    assert min(signs.values()) > 100


def test_distances_are_kept(renderer):
    for distance in (200, 1000):
        for c in remembered(3, distance, lambda c: len(renderer.prompt(c))):
            assert abs(len(renderer.prompt(c)) - distance) <= 10


def test_effort_changes_the_reasoning():
    lengths = {"none": [], "high": [], "max": []}
    for c in held_out("effort", 60):
        lengths[c.effort].append(len(c.messages[-1].get("reasoning_content", "")))
    assert max(lengths["none"]) == 0 < max(lengths["high"]) < max(lengths["max"])


def test_the_shipped_vocabulary_holds_every_conversation(renderer):
    vocabulary = Vocabulary(json.loads((COMPACT / VOCABULARY).read_text()))
    for held in (False, True):
        writer = Writer(11, held)
        for skill in SKILLS:
            for _ in range(30):
                vocabulary.compact(renderer.row(writer.conversation(skill)).ids)
