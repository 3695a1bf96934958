"""vLLM's modes and parsers of the name `deepseek_v41`: prompts as the authors write them, calls in
V4.1's spelling, grammars that allow no other, images left to vLLM."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import xgrammar
from openai import OpenAI
from tokenizers import Tokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.parser import ParserManager
from vllm.renderers.deepseek_v4 import DeepseekV4Renderer
from vllm.renderers.params import ChatParams
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers import TokenizerRegistry
from vllm.tool_parsers import ToolParserManager
from xgrammar import testing

import vllm_ext
from dsv4_plugin.chat import Encoder
from dsv4_plugin.tools.make import make_checkpoint
from tests.chat import recipe
from tests.conftest import v41_fields
from tests.vllm_chat.server import FLAGS, MODEL, Server, scripted
from vllm_ext.active import MODE, MODE_V41

SYSTEM_ID = 128799
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {
                "type": "object",
                "properties": {"x": {"type": "string"}, "n": {"type": "integer"}},
                "required": ["x"],
            },
        },
    }
]
MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "q"},
    {"role": "system", "content": "later"},
]
CALL = (
    'so</think>\n\n<｜DSML｜ calls>\n<｜DSML｜ invoke name="f">\n'
    '<｜DSML｜ parameter name="x" string="true">v</｜DSML｜ parameter>\n'
    "</｜DSML｜ invoke>\n</｜DSML｜ calls>"
)
EOS = "<｜end▁of▁sentence｜>"
IMAGE = {"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """V4.1's config.json and its tokenizer."""
    folder = tmp_path_factory.mktemp("v41")
    (folder / "config.json").write_text(json.dumps(v41_fields()))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder):
    """V4's, but for token 128799, which is a placeholder there."""
    package = recipe.tokenizer_file().parent
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (package / name).read_text()
        if name == "tokenizer.json":
            tokens = json.loads(text)["added_tokens"]
            placeholder = next(t["content"] for t in tokens if t["id"] == SYSTEM_ID)
            text = text.replace(placeholder, "<｜System｜>")
        (folder / name).write_text(text)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    vllm_ext.register()
    return TokenizerRegistry.load_tokenizer(MODE_V41, str(checkpoint))


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(ToolParserManager, "tool_parsers", {})
    vllm_ext.register()


@pytest.fixture
def renderer(checkpoint, tokenizer):
    model = SimpleNamespace(
        model=str(checkpoint), revision=None, supports_multimodal_inputs=False,
        renderer_num_workers=1,
    )  # fmt: skip
    parallel = SimpleNamespace(_api_process_rank=0)
    config = SimpleNamespace(model_config=model, parallel_config=parallel)
    return RENDERER_REGISTRY.load_renderer_cls(MODE_V41)(config, tokenizer)


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("request_", "kwargs"),
    [
        ({}, {}),
        ({"tools": TOOLS}, {"tools": TOOLS}),
        ({"reasoning_effort": "low"}, {"reasoning_effort": "low"}),
        ({"reasoning_effort": "max"}, {"reasoning_effort": "max"}),
        ({"thinking": {"type": "disabled"}}, {"thinking": False}),
    ],
)
def test_prompts_are_the_authors(checkpoint, tokenizer, request_, kwargs):
    expected = recipe.text_of_v41({"messages": MESSAGES} | request_)
    ids = tokenizer.apply_chat_template(MESSAGES, **kwargs)
    assert text_of(tokenizer, ids) == expected
    assert SYSTEM_ID in ids
    encoded = Encoder.from_pretrained(checkpoint).encode(
        MESSAGES,
        kwargs.get("tools"),
        thinking=kwargs.get("thinking", True),
        effort=kwargs.get("reasoning_effort"),
    )
    assert ids == encoded.ids


def test_the_mode_says_which_form(tmp_path, checkpoint):
    """Whatever config.json says, if it is there at all."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(checkpoint / name)
    vllm_ext.register()
    tokenizer = TokenizerRegistry.load_tokenizer(MODE_V41, str(tmp_path))
    assert SYSTEM_ID in tokenizer.apply_chat_template(MESSAGES)


@pytest.mark.parametrize("effort", [1, 62, 100])
def test_numbers_of_effort(tokenizer, effort):
    ids = tokenizer.apply_chat_template(MESSAGES, reasoning_effort=effort)
    assert f"Reasoning Effort: {effort} (range 1-100" in text_of(tokenizer, ids)


@pytest.mark.parametrize("effort", [0, 101, 1.5, True, "most"])
def test_other_efforts_are_refused(tokenizer, effort):
    with pytest.raises(ValueError, match=r"effort: .* is not one of .*, or an integer from 1 to 1"):
        tokenizer.apply_chat_template(MESSAGES, reasoning_effort=effort)


def test_v4_knows_no_numbers(tiny):
    with pytest.raises(ValueError, match=r"effort: 50 is not one of none, .*, ultra$"):
        Encoder.from_pretrained(tiny).encode(MESSAGES, effort=50)


def test_renders(renderer, tokenizer):
    _, prompt = renderer.render_messages(MESSAGES, ChatParams(chat_template_kwargs={}))
    assert prompt["prompt_token_ids"] == tokenizer.apply_chat_template(MESSAGES)


def test_requests_with_images_go_vllm_s_own_way(renderer, monkeypatch):
    """With vLLM's own template, which V4.1's texts come out of too."""
    seen = []

    def own(self, messages, params):
        text = [{"role": "user", "content": "q"}]
        seen.append(self._apply_chat_template(messages=text, tokenize=False))
        return messages, {"prompt_token_ids": []}

    monkeypatch.setattr(DeepseekV4Renderer, "render_messages", own)
    content = [{"type": "text", "text": "q"}, IMAGE]
    renderer.render_messages(
        [{"role": "user", "content": content}], ChatParams(chat_template_kwargs={})
    )
    assert seen == [recipe.text_of_v41({"messages": [{"role": "user", "content": "q"}]})]


def parser_of(tokenizer):
    return ParserManager.get_parser(
        tool_parser_name=MODE_V41,
        reasoning_parser_name=MODE_V41,
        enable_auto_tools=True,
        tokenizer=tokenizer,
    )


def asked(**more):
    return ChatCompletionRequest.model_validate({"messages": MESSAGES, "tools": TOOLS} | more)


@pytest.mark.parametrize("question", [MESSAGES, [{"role": "user", "content": [IMAGE]}]])
def test_whole_answers(registered, tokenizer, question):
    request = asked(messages=question)
    parser = parser_of(tokenizer)(tokenizer, request.tools, chat_template_kwargs={})
    parser.adjust_request(request)
    reasoning, content, calls = parser.parse(CALL + EOS, request, enable_auto_tools=True)
    assert (reasoning, content or None) == ("so", None)
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("f", {"x": "v"})]


@pytest.mark.parametrize("cut", [1, 3, 8, 1000])
def test_streams(registered, tokenizer, cut):
    request = asked()
    parser = parser_of(tokenizer)(tokenizer, request.tools, chat_template_kwargs={})
    parser.adjust_request(request)
    prompt = tokenizer.apply_chat_template(MESSAGES, tools=TOOLS)
    text, reasoning, arguments = CALL + EOS, "", ""
    pieces = [text[i : i + cut] for i in range(0, len(text), cut)]
    for n, piece in enumerate(pieces):
        last = n == len(pieces) - 1
        delta = parser.parse_delta(piece, [7], request, prompt, finished=last)
        if delta is not None:
            reasoning += delta.reasoning or ""
            arguments += "".join(call.function.arguments for call in delta.tool_calls)
            assert not delta.content
    assert reasoning == "so"
    assert json.loads(arguments) == {"x": "v"}


def accepts(mode, tokenizer, text):
    request = asked(tool_choice="required")
    parser = ToolParserManager.get_tool_parser(mode)(tokenizer, request.tools)
    tag = parser.get_structural_tag(request)
    return testing._is_grammar_accept_string(xgrammar.Grammar.from_structural_tag(tag), text)


def test_grammars_have_this_spelling(registered, tokenizer):
    theirs = CALL.partition("</think>")[2]
    own = theirs.replace("｜DSML｜ ", "｜DSML｜").replace("calls>", "tool_calls>")
    assert accepts(MODE_V41, tokenizer, theirs)
    assert not accepts(MODE_V41, tokenizer, own)
    assert accepts(MODE, tokenizer, own)
    assert not accepts(MODE, tokenizer, theirs)
    assert not accepts(MODE_V41, tokenizer, theirs.replace('name="x"', 'name="y"'))


@pytest.mark.thorough
def test_a_server(tmp_path):
    """Prompts, a whole answer and a stream; the model is V4's, which is what runs here."""
    make_checkpoint(tmp_path / "tiny", "tiny", tokenizer=False)
    write_tokenizer(tmp_path / "tiny")
    encoder = Encoder(tmp_path / "tiny", "v4.1")
    backend = Tokenizer.from_file(str(tmp_path / "tiny" / "tokenizer.json"))
    words = scripted([*backend.encode(CALL, add_special_tokens=False).ids, 1])
    body = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 80, **words}
    flags = FLAGS.replace(MODE, MODE_V41)
    with Server(tmp_path / "tiny", tmp_path / "log", flags) as server:
        whole = server.post("/v1/chat/completions", body | {"return_token_ids": True})
        effort = {"chat_template_kwargs": {"reasoning_effort": 62}, "max_tokens": 1}
        numbered = server.post("/v1/chat/completions", body | effort | {"return_token_ids": True})
        with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(
                model=MODEL, messages=MESSAGES, tools=TOOLS, max_tokens=80, stream=True,
                extra_body=words,
            )  # fmt: skip
            deltas = [chunk.choices[0].delta for chunk in stream if chunk.choices]
    assert whole["prompt_token_ids"] == encoder.encode(MESSAGES, TOOLS).ids
    assert numbered["prompt_token_ids"] == encoder.encode(MESSAGES, TOOLS, effort=62).ids
    choice = whole["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning"] == "so"
    (call,) = choice["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == {"x": "v"}
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert json.loads("".join(call.function.arguments or "" for call in calls)) == {"x": "v"}
    assert "".join(delta.model_extra.get("reasoning") or "" for delta in deltas) == "so"
