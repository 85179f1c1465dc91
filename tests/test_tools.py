"""Tool calls: what Gemma 4 really writes is read, what isn't complete is text, and what doesn't fit is said."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoints import make_pair
from tiny_tokenizer import write_tokenizer

import mlx_mtp
from mlx_mtp.answer import Answer
from mlx_mtp.decode.request import Request, Row, Stats
from mlx_mtp.errors import PromptError
from mlx_mtp.text import StopStrings, StreamDecoder, Tokenizer
from mlx_mtp.tools import QUOTE as Q
from mlx_mtp.tools import Tools, parse_calls

Json = dict[str, Any]

WEATHER: Json = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "unit": {"enum": ["C", "F"]},
                "at": {"type": "object", "properties": {"hour": {"type": "integer"}}},
            },
            "required": ["city"],
        },
    },
}
NOW: Json = {"name": "now"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder, _ = make_pair("e4b", tmp_path_factory.mktemp("tools"))
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


def user(content: str) -> Json:
    return {"role": "user", "content": content}


def read(tokenizer: Tokenizer, answer: str, tools: list[Json] | None = None) -> tuple[str, str, StreamDecoder]:
    """The text, the thought, and the decoder of an answer whose tokens come one by one."""
    decoder = StreamDecoder(tokenizer, tools=Tools(tools) if tools else None)
    pieces = [decoder.push([token]) for token in tokenizer.encode(answer)]
    return "".join(text for text, _ in pieces) + decoder.finish(), "".join(idea for _, idea in pieces), decoder


def functions(decoder: StreamDecoder) -> list[tuple[str, Json]]:
    return [(call["function"]["name"], call["function"]["arguments"]) for call in decoder.calls]


@pytest.mark.parametrize("written, name, arguments", [
    ('call:bash{"command":"ls -l \\"a\\"\\n"}', "bash", {"command": 'ls -l "a"\n'}),
    (f'call:bash{{"command":{Q}ls{Q}}}', "bash", {"command": "ls"}),
    ("call:f{'a': 'it\\'s \"so\"', b: '\\u00e9'}", "f", {"a": "it's \"so\"", "b": "é"}),
    ("call:f{a:None,b:True,c:False,d:null,e:true}", "f", {"a": None, "b": True, "c": False, "d": None, "e": True}),
    ("call:f{a:[1,2,],b:{c:1,},}", "f", {"a": [1, 2], "b": {"c": 1}}),
    (f"call:search(query={Q}cats (and dogs){Q})", "search", {"query": "cats (and dogs)"}),
    ("call:search(query: 'x', n=2, deep={a:[1]})", "search", {"query": "x", "n": 2, "deep": {"a": [1]}}),
    ("call:now()", "now", {}), ("call:recall:now(x={a:{}})", "recall:now", {"x": {"a": {}}}),
    (f"call:google:mcp:pdf{{name:{Q}o.pdf{Q}}}", "google:mcp:pdf", {"name": "o.pdf"}),
    ("call:f(x{a:1}", "f(x", {"a": 1}), ("call:a b/c\\d.e-f_g'h(i){x:1}", "a b/c\\d.e-f_g'h(i)", {"x": 1}),
    ('call:"bash"{x:1}', "bash", {"x": 1}),
    (" \n call:f { a : 1 , b : [ ] } \n", "f", {"a": 1, "b": []}),
    (f"call:f{{{Q}odd:key{Q}:1,(x)=y:2}}", "f", {"odd:key": 1, "(x)=y": 2}),
    ('call:f{a:"two\nlines and {}"}', "f", {"a": "two\nlines and {}"}),
])  # fmt: skip
def test_what_gemma_writes_is_read(tokenizer: Tokenizer, written: str, name: str, arguments: Json):
    text, thought, decoder = read(tokenizer, f"he<|tool_call>{written}<tool_call|><|tool_response>")
    assert (text, thought, functions(decoder), decoder.errors) == ("he", "", [(name, arguments)], [])


@pytest.mark.parametrize("text", [
    "", "call:", "call:f", "call:f{", "call:f{a}", "call:f{a:}", "call:f{a:1", "call:f{a:1 b:2}", 'call:f{a:<|"|>x}',
    "call:f{a:[1}", "call:f{} more", "f{}", "call:f{a:yes}", "call:f{a:-1e999}", "call:f" + "{a:" * 5000,
    "call:f{a:(b=1)}", 'call:f{"a:1}', "call:f{a:'x}", 'call:f{a:"\\q"}', "call:f(a=1", "call:f(a=1}", "call:f{a=1}",
    "call:f{a:" + "9" * 5000 + "}", "call:f{a:nulls}", "call:{a:1}", "call:f[1]",
    "call:f{a:" + "[" * 51 + "]" * 51 + "}",
])  # fmt: skip
def test_what_is_no_call(text: str):
    with pytest.raises(ValueError):
        parse_calls(text)


def test_values_within_values_have_a_bound_that_no_tool_reaches():
    assert parse_calls("call:f{a:" + "[" * 50 + "]" * 50 + "}")


def test_a_call_within_a_thought_ends_it(tokenizer: Tokenizer):
    text, thought, decoder = read(tokenizer, "<|channel>thought\nlet's go.<|tool_call>call:f{}<tool_call|>he")
    assert (text, thought, functions(decoder)) == ("he", "let's go.", [("f", {})])
    text, thought, decoder = read(tokenizer, "<|channel>thou<|tool_call>call:f{}<tool_call|>")
    assert (text, thought, functions(decoder)) == ("", "", [("f", {})])


@pytest.mark.parametrize("between", ["", " ", "\n", ", ", ";"])
def test_several_calls_in_a_block(tokenizer: Tokenizer, between: str):
    text, _, decoder = read(tokenizer, f"<|tool_call>call:f{{a:1}}{between}call:g(){between}call:f{{a:1}}<tool_call|>")
    assert (text, functions(decoder)) == ("", [("f", {"a": 1}), ("g", {}), ("f", {"a": 1})])
    assert len({call["id"] for call in decoder.calls}) == 3


@pytest.mark.parametrize("end", ["", "<eos>", "<turn|>", "<|tool_response>", "<|tool_call>call:g{}"])
def test_a_call_needs_no_closing_token(tokenizer: Tokenizer, end: str):
    text, _, decoder = read(tokenizer, "he<|tool_call>call:f{a:1}" + end)
    assert text == "he" and functions(decoder)[0] == ("f", {"a": 1}) and not decoder.errors
    assert len(decoder.calls) == (2 if "call:g" in end else 1)


@pytest.mark.parametrize("answer, text, why", [
    ("he <|tool_call>ll<tool_call|> he", "he ll he", "doesn't begin like call:name{"),
    ("he <|tool_call>call:f{", "he call:f{", "isn't complete"),
    ("<|tool_call>call:f{a:1<eos>", "call:f{a:1", "isn't complete"),
    ("<|tool_call>call:f{a:<|\"|>never<tool_call|>", 'call:f{a:<|"|>never', "a string has no end"),
    ("<|tool_call>ll<|tool_call>call:f{}<tool_call|>", "ll", "doesn't begin"),
    ("<|tool_call>ll<|channel>thought\nwell<channel|>he", "llhe", "doesn't begin"),
    ("<|tool_call>call:f{a:1}call:f{<tool_call|>", "call:f{a:1}call:f{", "isn't complete"),
])  # fmt: skip
def test_what_only_begins_as_a_call_is_text_and_said(tokenizer: Tokenizer, answer: str, text: str, why: str):
    found, _, decoder = read(tokenizer, answer)
    assert found == text
    (error,) = decoder.errors
    assert why in error and "\n" not in error


@pytest.mark.parametrize("call, why", [
    ("call:wether{city:'x'}", "there is no tool 'wether'"),
    ("call:weather{}", "'city' is a required property"),
    ("call:weather{city:5}", "arguments['city']: 5 is not of type 'string'"),
    ("call:weather{city:'x',days:1.5}", "arguments['days']"),
    ("call:weather{city:'x',unit:'K'}", "arguments['unit']"),
    ("call:weather{city:'x',at:{hour:'noon'}}", "arguments['at']['hour']"),
])  # fmt: skip
def test_calls_must_fit_the_declared_tools(tokenizer: Tokenizer, call: str, why: str):
    text, _, decoder = read(tokenizer, f"he <|tool_call>{call}<tool_call|>", [WEATHER, NOW])
    assert text == f"he {call}" and not decoder.calls
    (error,) = decoder.errors
    assert why in error and "\n" not in error
    assert read(tokenizer, f"<|tool_call>{call}<tool_call|>")[2].calls, "without declarations anything goes"


def test_calls_that_fit(tokenizer: Tokenizer):
    answer = f"<|tool_call>call:weather{{city:{Q}x{Q},days:2.0,unit:{Q}C{Q},more:1}}call:now{{any:1}}<tool_call|>"
    _, _, decoder = read(tokenizer, answer, [WEATHER, NOW])
    assert [name for name, _ in functions(decoder)] == ["weather", "now"] and not decoder.errors


@pytest.mark.parametrize("schema, fits", [
    ({"type": "STRING"}, True),  # no JSON schema: shown to the model as it is
    ({"$ref": "#/$defs/none"}, False),
    ({"$ref": "http://localhost:1/never-fetched"}, False),
    ({"$ref": "#"}, False),
])  # fmt: skip
def test_schemas_that_are_of_no_use(tokenizer: Tokenizer, schema: Json, fits: bool):
    _, _, decoder = read(tokenizer, "<|tool_call>call:f{}<tool_call|>", [{"name": "f", "parameters": schema}])
    assert bool(decoder.calls) == fits and all("can't be used" in error for error in decoder.errors)


def test_ids_of_calls(tokenizer: Tokenizer):
    """The same for the same text after the same prompt, and never twice in a conversation."""

    def ids(prompt: list[int]) -> list[str]:
        decoder = StreamDecoder(tokenizer, prompt)
        decoder.push(tokenizer.encode("<|tool_call>call:f{}<tool_call|>" * 2))
        return [call["id"] for call in decoder.calls]

    assert ids([1, 2]) == ids([1, 2])
    assert len({*ids([1, 2]), *ids([1, 2, 3])}) == 4
    assert all(it.startswith("call_") and len(it) == 21 for it in ids([5]))


def test_calls_come_with_the_answer_and_go_back_as_messages(tokenizer: Tokenizer):
    tokens = tokenizer.encode("he <|tool_call>call:f{a:1}<tool_call|><|tool_call>call:f{<tool_call|><|tool_response>")
    request = Request([5], max_tokens=50, stop_tokens=frozenset(tokens[-1:]))
    answer = Answer(request, StopStrings([]), tokenizer)
    answer.row = Row(request, Stats(), 50)
    chunks = []
    for token in tokens:
        answer.row.receive([token], 0, None)
        chunks.append(answer.push(answer.row.take()))
    result = answer.generation()
    assert (result.text, result.finish_reason, result.tokens) == ("he call:f{", "stop", tokens)
    assert result.tool_calls == [call for chunk in chunks for call in chunk.tool_calls]
    assert result.tool_errors == [error for chunk in chunks for error in chunk.tool_errors]
    (call,) = result.tool_calls
    assert (call["type"], call["function"]) == ("function", {"name": "f", "arguments": {"a": 1}})
    assert len(result.tool_errors) == 1
    as_json = json.loads(json.dumps(result.as_dict()))
    assert as_json["tool_calls"] == result.tool_calls and as_json["tool_errors"] == result.tool_errors
    messages = [
        user("x"),
        {
            "role": "assistant",
            "content": "he",
            "tool_calls": [call, {**call, "id": "other", "function": {"name": "g"}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "other"},
        {"role": "tool", "content": "1", "tool_call_id": call["id"]},
    ]
    again = tokenizer.render(messages)
    assert "<|tool_call>call:f{a:1}<tool_call|><|tool_call>call:g{}<tool_call|>" in again
    assert again.index("response:g{") < again.index("response:f{")


@pytest.mark.parametrize("arguments, written", [
    ('{"b": [1, null], "a": "x"}', f"{{a:{Q}x{Q},b:[1,null]}}"), ({"a": 1}, "{a:1}"), ("{}", "{}"), ("", "{}"),
    (None, "{}"),
])  # fmt: skip
def test_arguments_may_be_json_text_as_clients_send_it(tokenizer: Tokenizer, arguments: Any, written: str):
    message = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    before = json.dumps(message)
    assert f"<|tool_call>call:f{written}<tool_call|>" in tokenizer.render([user("x"), message])
    assert json.dumps(message) == before, "the caller's message has changed"


@pytest.mark.parametrize("arguments", ["[1]", "{", "5", 5, ["a"], "[" * 100_000])
def test_arguments_that_are_none(tokenizer: Tokenizer, arguments: Any):
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    with pytest.raises(PromptError, match="message 1 calls f with arguments that are neither"):
        tokenizer.render([user("x"), message])


def any_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(7 if depth < 4 else 5)
    if kind == 5:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return any_object(rng, depth + 1)
    text = "".join(rng.choice("ab {}[]():,='\"\\\n\té☃<|>") for _ in range(rng.randrange(9)))
    return [None, rng.random() < 0.5, rng.randrange(-(10**9), 10**9), rng.uniform(-1e9, 1e9), text][kind]


def any_object(rng: random.Random, depth: int = 0) -> Json:
    names = ("".join(rng.choice("abcXYZ_09-") for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(4)))
    return {name: any_value(rng, depth) for name in names}


def test_a_call_that_is_written_is_the_call_that_is_read(tokenizer: Tokenizer):
    """Random names and arguments, written by the chat template."""
    rng = random.Random(0)
    for _ in range(300):
        name = "f" + "".join(rng.choice("ab9 _:'/\\.()-") for _ in range(rng.randrange(6))) + "g"
        made = {"function": {"name": name, "arguments": any_object(rng)}}
        prompt = tokenizer.render([user("x"), {"role": "assistant", "tool_calls": [made]}])
        written = prompt.split("<|tool_call>")[1].split("<tool_call|>")[0]
        assert parse_calls(written) == [(name, made["function"]["arguments"])]


def test_how_tokens_are_cut_into_pieces_makes_no_difference(tokenizer: Tokenizer):
    answer = 'he <|channel>thought\nso<|tool_call>call:f{a:<|"|>é{}<|"|>}<tool_call|>l<|tool_call>call:<tool_call|>l'
    text, thought, whole = read(tokenizer, answer)
    tokens, rng = tokenizer.encode(answer), random.Random(1)
    for _ in range(20):
        decoder, at, texts, ideas = StreamDecoder(tokenizer), 0, "", ""
        while at < len(tokens):
            size = rng.randrange(1, 9)
            piece, idea = decoder.push(tokens[at : at + size])
            texts, ideas, at = texts + piece, ideas + idea, at + size
        assert (texts + decoder.finish(), ideas) == (text, thought)
        assert (decoder.calls, decoder.errors) == (whole.calls, whole.errors)


@pytest.mark.parametrize("text", [
    "call:f{a:" + "[1," * 40 + "9" * 400, "call:f{" + "a:1," * 2000, f"call:f{{a:{Q}" + "x " * 4000,
    "call:f{a:" + " " * 8000, 'call:f{a:"' + "\\n" * 4000, "call:" + "f " * 4000, "call:f{a" + "b " * 4000,
    "call:f{}" * 1000 + "{", "call:f{a:[" + "'',\"\"," * 1000, "call:f()" * 1000 + "{", "call:f" + " " * 8000,
    "call:f(" + "(" * 8000,
])  # fmt: skip
def test_reading_takes_linear_time(text: str):
    def seconds(size: int) -> float:
        long = text[:20] + text[20:] * size
        begun = time.process_time()
        for _ in range(3):
            with pytest.raises(ValueError):
                parse_calls(long)
        return time.process_time() - begun

    seconds(1)
    # Four times the text takes 16 times as long where it is quadratic; what takes no time at all isn't.
    assert seconds(16) < max(9 * seconds(4), 0.1)


def test_a_call_that_never_ends_takes_linear_time(tokenizer: Tokenizer):
    piece = tokenizer.encode("<|tool_call>" + "h" * 2000)

    def seconds(size: int) -> float:
        decoder = StreamDecoder(tokenizer)
        begun = time.process_time()
        for token in piece[:1] + piece[1:] * size:
            decoder.push([token])
        return time.process_time() - begun

    seconds(1)
    assert seconds(40) < max(9 * seconds(10), 0.1)


@pytest.mark.parametrize("tools", [[5], [{}], [{"function": {}}], [{"function": 5}], "f"])
def test_tools_that_are_none(tools: Any):
    with mlx_mtp.load(drafter=False) as lm, pytest.raises(PromptError, match="tool"):
        lm.generate("Hi", max_tokens=1, tools=tools)


def test_declared_tools_reach_the_answer_whoever_asks(tmp_path: Path):
    """A model that can only say one thing, a call of a tool that isn't declared."""
    with mlx_mtp.load(drafter=False) as lm:
        assert lm.generate("Hi", max_tokens=3, tools=[WEATHER]).tool_errors == []
        assert lm.generate_batch([{"prompt": "Hi", "tools": [NOW]}], max_tokens=3)[0].tool_calls == []
