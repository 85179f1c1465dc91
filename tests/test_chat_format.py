"""Gemma 4's chat format: prompts from conversations, tool calls from answers (chat_template.jinja, tool_calls.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mlx_mtp
from mlx_mtp.checkpoint.description import read_target
from mlx_mtp.errors import PromptError
from mlx_mtp.session.generation_config import read_generation
from mlx_mtp.text.tokenizer import Tokenizer
from tests.support.tiny_checkpoints import make_pair
from tests.support.tiny_tokenizer import write_tokenizer

Json = dict[str, Any]

EMPTY_THOUGHT = "<|channel>thought\n<channel|>"
ROUTE: Json = {
    "type": "function",
    "function": {
        "name": "route",
        "description": "Finds a way.",
        "parameters": {
            "type": "object",
            "properties": {
                "to": {"type": "string", "description": "Where to"},
                "by": {"type": "string", "enum": ["foot", "train"]},
                "stops": {"type": "array", "items": {"type": "string"}},
                "options": {"type": "object", "properties": {"tolls": {"type": "boolean", "nullable": True}}},
            },
            "required": ["to"],
        },
    },
}
DECLARED = (
    '<|tool>declaration:route{description:<|"|>Finds a way.<|"|>,parameters:{properties:{'
    'by:{enum:[<|"|>foot<|"|>,<|"|>train<|"|>],type:<|"|>STRING<|"|>},'
    'options:{properties:{tolls:{nullable:true,type:<|"|>BOOLEAN<|"|>}},type:<|"|>OBJECT<|"|>},'
    'stops:{items:{type:<|"|>STRING<|"|>},type:<|"|>ARRAY<|"|>},'
    'to:{description:<|"|>Where to<|"|>,type:<|"|>STRING<|"|>}},'
    'required:[<|"|>to<|"|>],type:<|"|>OBJECT<|"|>}}<tool|>'
)


def user(content: str) -> Json:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Json:
    return {"role": "assistant", "content": content, **more}


def call(name: str, **arguments: Any) -> Json:
    return {"type": "function", "id": f"{name}-1", "function": {"name": name, "arguments": arguments}}


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Tokenizers without templates, one beside a small model's config.json and one beside a large one's."""
    made = {}
    for size, kind in (("small", "e4b"), ("large", "12b")):
        folder, _ = make_pair(kind, tmp_path_factory.mktemp(size))
        write_tokenizer(folder)
        made[size] = Tokenizer.from_folder(folder)
    return made


@pytest.fixture(scope="module")
def small(sizes: dict[str, Tokenizer]) -> Tokenizer:
    return sizes["small"]


def test_a_question(sizes: dict[str, Tokenizer]):
    messages = [user("  How far is it? ")]
    prompt = "<bos><|turn>user\nHow far is it?<turn|>\n<|turn>model\n"
    assert sizes["small"].render(messages) == prompt
    assert sizes["large"].render(messages) == prompt + EMPTY_THOUGHT


def test_thinking_is_asked_for_in_the_system_turn(sizes: dict[str, Tokenizer]):
    for tokenizer in sizes.values():
        assert tokenizer.render([user("Why?")], thinking=True) == (
            "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nWhy?<turn|>\n<|turn>model\n"
        )


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_prompt(small: Tokenizer, role: str):
    messages = [{"role": role, "content": "Be brief.\n"}, user("Why?")]
    rest = "Be brief.<turn|>\n<|turn>user\nWhy?<turn|>\n<|turn>model\n"
    assert small.render(messages) == "<bos><|turn>system\n" + rest
    assert small.render(messages, thinking=True) == "<bos><|turn>system\n<|think|>\n" + rest


@pytest.mark.parametrize("earlier", [
    assistant("Four."),
    {"role": "model", "content": "Four."},
    assistant("<|channel>thought\n2 + 2\n<channel|>Four."),
    assistant("Four.", reasoning="2 + 2"),
    assistant("Four.", reasoning_content="2 + 2"),
    assistant([{"type": "text", "text": "Four."}]),  # type: ignore[arg-type]
])  # fmt: skip
def test_several_turns_without_earlier_thoughts(sizes: dict[str, Tokenizer], earlier: Json):
    messages = [user("2 + 2?"), earlier, user("Sure?")]
    prompt = "<|turn>user\n2 + 2?<turn|>\n<|turn>model\nFour.<turn|>\n<|turn>user\nSure?<turn|>\n<|turn>model\n"
    assert sizes["small"].render(messages) == "<bos>" + prompt
    assert sizes["large"].render(messages) == "<bos>" + prompt + EMPTY_THOUGHT
    for tokenizer in sizes.values():
        assert tokenizer.render(messages, thinking=True) == "<bos><|turn>system\n<|think|>\n<turn|>\n" + prompt


def test_tools_are_declared_in_the_system_turn(small: Tokenizer):
    turn = "<|turn>user\nTo Rome!<turn|>\n<|turn>model\n"
    assert small.render([user("To Rome!")], tools=[ROUTE]) == f"<bos><|turn>system\n{DECLARED}<turn|>\n{turn}"
    assert small.render([user("To Rome!")], tools=[ROUTE["function"]], thinking=True) == (
        f"<bos><|turn>system\n<|think|>\n{DECLARED}<turn|>\n{turn}"
    )
    bare = small.render([user("To Rome!")], tools=[{"name": "now"}])
    assert '<|tool>declaration:now{description:<|"|><|"|>}<tool|>' in bare


CALL = '<|tool_call>call:route{avoid:[true,null,1.5],options:{tolls:false},to:<|"|>Rome<|"|>}<tool_call|>'
CALLED = "<|turn>model\n" + CALL
ANSWERED = '<|tool_response>response:route{value:<|"|>south<|"|>}<tool_response|>'
ROME = call("route", to="Rome", avoid=[True, None, 1.5], options={"tolls": False})


def test_tool_calls_and_responses(sizes: dict[str, Tokenizer]):
    asked = [user("To Rome!"), {"role": "assistant", "tool_calls": [ROME]}]
    answered = [*asked, {"role": "tool", "content": "south"}]
    begin = "<bos><|turn>user\nTo Rome!<turn|>\n"
    for size, tokenizer in sizes.items():
        assert tokenizer.render(asked) == begin + CALLED + "<|tool_response>"
        assert tokenizer.render(answered) == begin + CALLED + ANSWERED
        after = tokenizer.render([*answered, assistant("Go south."), user("Thanks.")])
        assert after == (
            begin + CALLED + ANSWERED + "Go south.<turn|>\n<|turn>user\nThanks.<turn|>\n<|turn>model\n"
            + EMPTY_THOUGHT * (size == "large")
        )  # fmt: skip


def test_thoughts_before_a_call_stay_until_the_turn_is_over(small: Tokenizer):
    messages = [
        user("To Rome!"),
        {"role": "assistant", "tool_calls": [ROME], "reasoning": "It's far."},
        {"role": "tool", "content": "south"},
    ]
    called = CALLED.replace("model\n", "model\n<|channel>thought\nIt's far.\n<channel|>")
    prompt = small.render(messages, thinking=True)
    assert prompt.endswith(called + ANSWERED + "<|channel>thought\n"), "the model goes on thinking after a response"
    later = small.render([*messages, assistant("Go south."), user("Thanks.")], thinking=True)
    kept = small.render([*messages, assistant("Go south."), user("Thanks.")], thinking=True, preserve_thinking=True)
    assert called + ANSWERED + "Go south.<turn|>\n" in kept
    assert "It's far." not in later and CALLED + ANSWERED + "Go south.<turn|>\n" in later


def test_an_answer_that_is_there_is_gone_on_with(sizes: dict[str, Tokenizer]):
    messages = [user("Why?"), assistant("Because.", reasoning="Hm.")]
    thought = "<|channel>thought\nHm.\n<channel|>"
    for tokenizer in sizes.values():
        expected = f"<bos><|turn>user\nWhy?<turn|>\n<|turn>model\n{thought}Because."
        assert tokenizer.render(messages) == expected
        assert tokenizer.render(messages, add_generation_prompt=False) == expected + "<turn|>\n"
        assert tokenizer.render(messages[:1], add_generation_prompt=False) == "<bos><|turn>user\nWhy?<turn|>\n"


@pytest.mark.parametrize("first, second", [
    ({"tool_call_id": "now-1"}, {"tool_call_id": "route-1"}), ({"name": "now"}, {"name": "route"}),
])  # fmt: skip
def test_responses_say_which_call_they_answer(small: Tokenizer, first: Json, second: Json):
    messages = [
        user("When, and where?"),
        assistant("Let me see.", tool_calls=[call("route"), call("now")]),
        {"role": "tool", "content": "noon", **first},
        {"role": "tool", "content": "here", **second},
    ]
    assert small.render(messages).endswith(
        "<|turn>model\n<|tool_call>call:route{}<tool_call|><|tool_call>call:now{}<tool_call|>"
        '<|tool_response>response:now{value:<|"|>noon<|"|>}<tool_response|>'
        '<|tool_response>response:route{value:<|"|>here<|"|>}<tool_response|>Let me see.<turn|>\n'
    )


def test_turns_of_the_model_last_until_somebody_else_speaks(sizes: dict[str, Tokenizer]):
    """Text beside calls comes after the responses, and a turn that holds nothing after them is closed all the same."""
    for size, tokenizer in sizes.items():
        last = "<turn|>\n<|turn>user\nThanks.<turn|>\n<|turn>model\n" + EMPTY_THOUGHT * (size == "large")
        for said, rendered in (
            ([assistant("a"), assistant("b")], "ab"),
            ([{"role": "assistant", "tool_calls": [ROME]}, {"role": "tool", "content": "south"}], CALL + ANSWERED),
            (
                [assistant(" Well. ", tool_calls=[ROME]), {"role": "tool", "content": "south"}, assistant("South.")],
                CALL + ANSWERED + "Well.South.",
            ),
        ):
            prompt = tokenizer.render([user("To Rome!"), *said, user("Thanks.")])
            assert prompt == "<bos><|turn>user\nTo Rome!<turn|>\n<|turn>model\n" + rendered + last


def test_what_tools_say_is_not_trimmed(small: Tokenizer):
    for content in ("\n 5 ", [{"type": "text", "text": "\n 5"}, {"type": "text", "text": " "}]):
        messages = [user("x"), {"role": "assistant", "tool_calls": [ROME]}, {"role": "tool", "content": content}]
        assert small.render(messages).endswith('<|tool_response>response:route{value:<|"|>\n 5 <|"|>}<tool_response|>')


@pytest.mark.parametrize("schema, rendered", [
    ({"type": "integer", "enum": [1, 2]}, 'type:<|"|>INTEGER<|"|>'),
    ({"type": "object", "properties": {}}, 'properties:{},type:<|"|>OBJECT<|"|>'),
    ({"type": "object", "description": "Any."}, 'description:<|"|>Any.<|"|>,properties:{},type:<|"|>OBJECT<|"|>'),
    (
        {"type": "array", "items": {"type": "integer", "minimum": 1, "default": None, "description": "A day"}},
        'items:{description:<|"|>A day<|"|>,minimum:1,type:<|"|>INTEGER<|"|>},type:<|"|>ARRAY<|"|>',
    ),
    (
        {"type": "array", "items": {"type": "object", "required": ["a"], "properties": {"a": {"type": "string"}}}},
        'items:{properties:{a:{type:<|"|>STRING<|"|>}},required:[<|"|>a<|"|>],type:<|"|>OBJECT<|"|>},type:<|"|>ARRAY<|"|>',
    ),
    (
        {"type": "array", "items": {"type": ["string", "null"], "default": {"k": [True]}}},
        'items:{default:{<|"|>k<|"|>:[true]},type:[<|"|>STRING<|"|>,<|"|>NULL<|"|>]},type:<|"|>ARRAY<|"|>',
    ),
])  # fmt: skip
def test_schemas_of_parameters(small: Tokenizer, schema: Json, rendered: str):
    function = {"name": "f", "description": "F", "parameters": {"type": "object", "properties": {"p": schema}}}
    declared = 'declaration:f{description:<|"|>F<|"|>,parameters:{properties:{p:{%s}},type:<|"|>OBJECT<|"|>}}<tool|>'
    assert declared % rendered in small.render([user("x")], tools=[{"type": "function", "function": function}])


def test_what_a_tool_answers_may_be_declared(small: Tokenizer):
    function = {"name": "f", "description": "F", "response": {"type": "object", "description": "Ways"}}
    declared = 'f{description:<|"|>F<|"|>,response:{description:<|"|>Ways<|"|>,type:<|"|>OBJECT<|"|>}}<tool|>'
    assert declared in small.render([user("x")], tools=[function])


def test_a_system_prompt_in_parts(small: Tokenizer):
    parts = [{"type": "text", "text": "Be brief. "}, {"type": "text", "text": "Be kind."}]
    assert "system\nBe brief. Be kind. <turn|>" in small.render([{"role": "system", "content": parts}, user("x")])


def test_responses_may_be_objects(small: Tokenizer):
    responses = [{"name": "route", "response": {"km": 12, "by": "foot"}}]
    messages = [user("To Rome!"), {"role": "assistant", "tool_calls": [ROME], "tool_responses": responses}]
    assert small.render(messages).endswith(
        CALLED + '<|tool_response>response:route{by:<|"|>foot<|"|>,km:12}<tool_response|>'
    )


@pytest.mark.parametrize("messages, culprit", [
    ([user("x"), {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": "5"}}]}], "neither"),
    ([user("x"), {"role": "assistant", "tool_calls": [{"name": "now", "arguments": {}}]}], "tool call that isn't"),
    ([user("x"), {"role": "assistant", "tool_calls": ["now"]}], "tool call that isn't"),
    ([user("x"), {"role": "tool", "content": "5"}], "must follow the tool call"),
    ([user("x"), {"role": "assistant", "tool_calls": [ROME]}, {"role": "tool", "content": {"a": 1}}], "give a string"),
    ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What's this?"}]}], "more than text"),
])  # fmt: skip
def test_what_cannot_be_said_in_this_format(small: Tokenizer, messages: list[Json], culprit: str):
    with pytest.raises(PromptError, match=culprit) as raised:
        small.chat(messages)
    assert "\n" not in str(raised.value)


def test_a_folder_s_own_template_comes_first(small: Tokenizer, tmp_path: Path):
    write_tokenizer(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "from the config"}))
    assert Tokenizer.from_folder(tmp_path).render([user("x")]) == "from the config"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert Tokenizer.from_folder(tmp_path).render([user("x")]) == "from the file"


def test_templates_of_fine_tunes(tmp_path: Path):
    """With what transformers' renderer knows besides Jinja."""
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% endfor %}{{ tools | tojson(separators=(',', ':')) }}"
    )
    tools = [{"b": "<é>", "a": [1, 2]}]
    assert Tokenizer.from_folder(tmp_path).render([user("x"), user("y")], tools=tools) == 'x[{"b":"<é>","a":[1,2]}]'


def test_tools_reach_the_prompt_whoever_asks(small: Tokenizer):
    question = [user("To Rome!")]
    expected = len(small.chat(question, tools=[ROUTE]))
    assert expected > len(small.chat(question))
    with mlx_mtp.load(small.folder, drafter=False) as lm:
        result = lm.generate(question, max_tokens=1, tools=[ROUTE])
        assert isinstance(result, mlx_mtp.Generation) and result.stats.prompt_tokens == expected
        assert next(lm.stream(question, max_tokens=1, tools=[ROUTE])).stats.prompt_tokens == expected
        asked, not_asked = lm.generate_batch([{"prompt": question, "tools": [ROUTE]}, question], max_tokens=1)
        assert asked.stats.prompt_tokens == expected > not_asked.stats.prompt_tokens
        with pytest.raises(PromptError, match="tools must be a list of dicts"):
            lm.generate(question, tools=[5])  # type: ignore[list-item]


def test_stop_ids_come_from_the_generation_config(tmp_path: Path):
    folder, _ = make_pair("e2b", tmp_path)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [1, 106, 50]}))
    assert read_generation(read_target(folder)).stop_tokens == (1, 106, 50)
    path.write_text(json.dumps({"eos_token_id": 7}))
    assert read_generation(read_target(folder)).stop_tokens == (7,)
    path.unlink()
    assert read_generation(read_target(folder)).stop_tokens == (1, 106), "config.json's, if there are no others"
