"""Tool calls: what Gemma 4 really writes is read, what isn't complete is text, and what doesn't fit is said."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models

import mlx_mtp
from mlx_mtp.decode.request import Request, Row, Stats
from mlx_mtp.errors import PromptError
from mlx_mtp.session.answer import Answer
from mlx_mtp.session.inbox import News
from mlx_mtp.text.stop_strings import StopStrings
from mlx_mtp.text.stream_decoder import StreamDecoder
from mlx_mtp.text.tokenizer import Tokenizer
from mlx_mtp.text.tool_calls import QUOTE as Q
from mlx_mtp.text.tool_calls import QUOTE_MARK, CallIds, Tools, parse_calls
from tests.support.tiny_checkpoints import VOCAB, make_pair
from tests.support.tiny_tokenizer import BYTES, write_tokenizer

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


def spelt(text: str) -> list[int]:
    """A text as byte tokens, so that nothing in it is a special token."""
    return [BYTES.start + byte for byte in text.encode()]


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
    (f"call:save{{code:{Q}a=1{Q},to='a.docx', as = \"b:c\"}}", "save", {"code": "a=1", "to": "a.docx", "as": "b:c"}),
    (f"call:f{{'a'={Q}b{Q},c:[{{d='e'}}]}}", "f", {"a": "b", "c": [{"d": "e"}]}),
    ("call:my:call:x{}", "my:call:x", {}), ('call:f{a:"\\ud83d\\ude00"}', "f", {"a": "😀"}),
    (f"call:f{{a:{Q}<|turn>{Q}}}", "f", {"a": "<|turn>"}),
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
    "call:f{a:007}", "call:f{a:\u0663}", 'call:f{a:"\\ud83d"}', 'call:f{"\\ud83d":1}',
    f'call:f{{a:"x{QUOTE_MARK}y"}}', f"call:f{{a{QUOTE_MARK}b:1}}",
    f"call:f(a{QUOTE_MARK}b=1)", f"call:f{{a:{QUOTE_MARK}x}}",
])  # fmt: skip
def test_what_is_no_call(text: str):
    with pytest.raises(ValueError):
        parse_calls(text)


def test_whole_numbers_stay_whole():
    ((_, arguments),) = parse_calls("call:f{a:12345678901234567890,b:3,c:3.0}")
    assert json.dumps(arguments) == '{"a": 12345678901234567890, "b": 3, "c": 3.0}'


def test_values_within_values_have_a_bound_that_no_tool_reaches():
    assert parse_calls("call:f{a:" + "[" * 50 + "]" * 50 + "}")


@pytest.mark.parametrize("written, arguments", [
    ("call:f{a:[{b:1}]", {"a": [{"b": 1}]}), (f"call:f{{a:{Q}x{Q}", {"a": "x"}), ("call:f(a=1", {"a": 1}),
])  # fmt: skip
def test_the_last_bracket_may_be_missing_where_the_model_has_closed_the_call(
    tokenizer: Tokenizer, written: str, arguments: Json
):
    text, _, decoder = read(tokenizer, f"<|tool_call>{written}<tool_call|>")
    assert (text, functions(decoder)) == ("", [("f", arguments)])
    for end in ("", "<eos>", "<|tool_response>"):
        text, _, decoder = read(tokenizer, f"<|tool_call>{written}{end}")
        assert text == written and not decoder.calls, "this may have been cut off"


@pytest.mark.parametrize("written", [
    "call:f{", "call:f{a", "call:f{a:", "call:f{a:1,", "call:f{a:[1", "call:f{a:{b:1", f"call:f{{a:{Q}x", "call:f(",
])  # fmt: skip
def test_nothing_else_may_be_missing(tokenizer: Tokenizer, written: str):
    text, _, decoder = read(tokenizer, f"<|tool_call>{written}<tool_call|>")
    assert text == written and not decoder.calls and len(decoder.errors) == 1


def test_a_quote_token_that_is_spelt_out_ends_no_string(tokenizer: Tokenizer):
    """As in a page that the model quotes: it could add arguments that the model never meant."""
    page = f"x{Q},path:{Q}/etc"
    begin, end, quote = (tokenizer.encode(token) for token in ("<|tool_call>", "<tool_call|>", Q))
    tokens = [*begin, *spelt("call:save{text:"), *quote, *spelt(page), *quote, *spelt("}"), *end]
    decoder = StreamDecoder(tokenizer)
    assert decoder.push(tokens) == ("", "") and functions(decoder) == [("save", {"text": page})]


def test_special_tokens_within_a_call_are_not_passed_over(tokenizer: Tokenizer):
    text, _, decoder = read(tokenizer, "<|tool_call>call:f{a:1<bos>2}<tool_call|>")
    assert (text, decoder.calls) == ("call:f{a:1<bos>2}", [])


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


def test_a_thought_after_a_call_ends_the_call(tokenizer: Tokenizer):
    text, thought, decoder = read(tokenizer, "he<|tool_call>call:f{a:1}<|channel>thought\nhm\n<channel|>ll")
    assert (text, thought, functions(decoder)) == ("hell", "hm\n", [("f", {"a": 1})])


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


def test_errors_are_one_short_line(tokenizer: Tokenizer):
    name = "f\n" + "x" * 5000
    for written in (f"call:{name}{{}}", f"call:weather{{city:{{{name}:[{{}}]}}}}", f"call:weather{{a:{Q}{name}{Q}b}}"):
        (error,) = read(tokenizer, f"<|tool_call>{written}<tool_call|>", [WEATHER])[2].errors
        assert "\n" not in error and len(error) < 350
    (error,) = read(tokenizer, f"<|tool_call>call:f{{a:{Q}b{Q}{Q}c{Q}}}{Q}x<tool_call|>")[2].errors
    assert error.endswith("there is no comma before }")
    (error,) = read(tokenizer, f"<|tool_call>call:f{{{Q}a{Q}{Q}b{Q}:1}}<tool_call|>")[2].errors
    assert error.endswith(f"there is no argument at '{Q}b{Q}:1}}'")
    (error,) = read(tokenizer, "<|tool_call>call:f\ng{}<tool_call|>", [{"name": "f\ng", "parameters": {"$ref": "#"}}])[
        2
    ].errors
    assert error.endswith("the schema of f g can't be used: RecursionError")


INTEGER, NUMBER, TRUTH = {"type": "integer"}, {"type": ["number", "null"]}, {"type": "boolean"}


@pytest.mark.parametrize("schema, written, value", [
    (INTEGER, "'3'", 3), (INTEGER, "3.0", 3), (INTEGER, "'-3e1'", -30), (NUMBER, "'1.5'", 1.5), (NUMBER, "'3'", 3),
    (TRUTH, "'true'", True), (TRUTH, "'False'", False), ({"type": "string"}, "'3'", "3"),
    ({"type": ["string", "integer"]}, "'3'", "3"), ({"enum": ["3", 4]}, "'3'", "3"), ({}, "'3'", "3"),
    ({"type": "array", "items": INTEGER}, "['1',2.0]", [1, 2]),
    ({"type": "object", "properties": {"b": INTEGER}}, "{b:'1',c:'1'}", {"b": 1, "c": "1"}),
])  # fmt: skip
def test_values_in_the_wrong_form_are_put_right(tokenizer: Tokenizer, schema: Json, written: str, value: Any):
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}
    _, _, decoder = read(tokenizer, f"<|tool_call>call:f{{a:{written}}}<tool_call|>", [tool])
    ((_, arguments),) = functions(decoder)
    assert arguments == {"a": value} and repr(arguments["a"]) == repr(value)


@pytest.mark.parametrize("schema, written", [
    (INTEGER, "'3.5'"), (INTEGER, "3.5"), (INTEGER, "'three'"), (INTEGER, "' 3'"), (INTEGER, "'03'"), (INTEGER, "true"),
    (NUMBER, "'1e999'"), (INTEGER, "'" + "9" * 5000 + "'"), (TRUTH, "1"), (TRUTH, "'yes'"), ({"type": "string"}, "3"),
    ({"type": "array"}, "'[1]'"),
])  # fmt: skip
def test_values_are_not_put_right_where_there_is_doubt(tokenizer: Tokenizer, schema: Json, written: str):
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a": schema}}}
    _, _, decoder = read(tokenizer, f"<|tool_call>call:f{{a:{written}}}<tool_call|>", [tool])
    assert not decoder.calls and len(decoder.errors) == 1


def test_a_namespace_before_a_declared_name(tokenizer: Tokenizer):
    def names(written: str, *declared: str) -> list[str]:
        tools = [{"name": name} for name in declared]
        return [name for name, _ in functions(read(tokenizer, f"<|tool_call>call:{written}{{}}<tool_call|>", tools)[2])]

    assert names("google:mcp:pdf", "pdf", "f") == ["pdf"]
    assert names("google:mcp:pdf", "pdf", "google:mcp:pdf") == ["google:mcp:pdf"]
    assert names("google:mcp:pdf", "pdf", "mcp:pdf") == [], "either may be meant"
    assert names("makepdf", "pdf") == names("pdf:x", "pdf") == []


def test_calls_that_fit(tokenizer: Tokenizer):
    answer = f"<|tool_call>call:weather{{city:{Q}x{Q},days:2.0,unit:{Q}C{Q},more:1}}call:now{{any:1}}<tool_call|>"
    _, _, decoder = read(tokenizer, answer, [WEATHER, NOW])
    assert [name for name, _ in functions(decoder)] == ["weather", "now"] and not decoder.errors


@pytest.mark.parametrize("schema, fits", [
    ({"type": "STRING"}, True),  # no JSON schema: shown to the model as it is
    ({"$ref": "#/$defs/none"}, False),
    ({"$ref": "http://localhost:1/never-fetched"}, False),
    ({"$ref": "#"}, False),
    ({5: 1, "properties": {5: 1}, "type": float}, True),
    ({"$schema": 5}, True),
])  # fmt: skip
def test_schemas_that_are_of_no_use(tokenizer: Tokenizer, schema: Json, fits: bool):
    _, _, decoder = read(tokenizer, "<|tool_call>call:f{}<tool_call|>", [{"name": "f", "parameters": schema}])
    assert bool(decoder.calls) == fits and all("can't be used" in error for error in decoder.errors)


def test_schemas_may_be_of_an_older_draft(tokenizer: Tokenizer):
    """Where a list of items' schemas means something else."""
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "properties": {"a": {"items": [{"type": "null"}]}}}
    tools = [{"name": "f", "parameters": schema}]
    assert read(tokenizer, "<|tool_call>call:f{a:[null,1]}<tool_call|>", tools)[2].calls
    assert read(tokenizer, "<|tool_call>call:f{a:[1]}<tool_call|>", tools)[2].errors


def test_ids_of_calls(tokenizer: Tokenizer):
    """The same for the same text after the same prompt, and never twice in a conversation."""

    def ids(prompt: list[int]) -> list[str]:
        decoder = StreamDecoder(tokenizer, prompt)
        decoder.push(tokenizer.encode("<|tool_call>call:f{}<tool_call|>" * 2))
        return [call["id"] for call in decoder.calls]

    assert ids([1, 2]) == ids([1, 2])
    assert len({*ids([1, 2]), *ids([1, 2, 3])}) == 4
    assert all(it.startswith("call_") and len(it) == 21 for it in ids([5]))


def test_ids_of_many_calls_take_linear_time():
    """If all of the text were read again for every call in it, this would take many minutes."""
    assert len(set(CallIds([5] * 1000).of("call:f{}" * 200_000, 200_000))) == 200_000


def test_calls_come_with_the_answer_and_go_back_as_messages(tokenizer: Tokenizer):
    tokens = tokenizer.encode("he <|tool_call>call:f{a:1}<tool_call|><|tool_call>call:f{<tool_call|><|tool_response>")
    request = Request([5], max_tokens=50, stop_tokens=frozenset(tokens[-1:]))
    answer = Answer(request, StopStrings([]), tokenizer)
    answer.row = Row(request, Stats(), 50)
    chunks = []
    for token in tokens:
        answer.row.receive([token], 0, None)
        row = answer.row
        chunks.append(answer.push(News(row, row.pop_unread(), row.stats, row.done, row.cancelled, None)))
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


@pytest.mark.parametrize("arguments", [
    "[1]", "{", "5", 5, ["a"], "[" * 100_000, '{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}',
])  # fmt: skip
def test_arguments_that_are_none(tokenizer: Tokenizer, arguments: Any):
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    with pytest.raises(PromptError, match="message 1 calls f with arguments that are neither"):
        tokenizer.render([user("x"), message])
    message["tool_calls"][0]["function"]["name"] = "f\ng"
    with pytest.raises(PromptError, match="message 1 calls f g with"):
        tokenizer.render([user("x"), message])


def any_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(7 if depth < 4 else 5)
    if kind == 5:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 6:
        return any_object(rng, depth + 1)
    pieces = [*"ab {}[]():,='\"\\\n\té☃<|>", Q, "<|tool_call>", "<tool_call|>", "<|channel>", "<eos>"]
    text = "".join(rng.choice(pieces) for _ in range(rng.randrange(9)))
    return [None, rng.random() < 0.5, rng.randrange(-(10**9), 10**9), rng.uniform(-1e9, 1e9), text][kind]


def any_object(rng: random.Random, depth: int = 0) -> Json:
    names = ("".join(rng.choice("abcXYZ_09-") for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(4)))
    return {name: any_value(rng, depth) for name in names}


def test_a_call_that_is_written_is_the_call_that_is_read(tokenizer: Tokenizer):
    """Random names and arguments, written by the chat template and cut into tokens, which come in random pieces."""
    rng = random.Random(0)
    begin, end = tokenizer.token_id("<|tool_call>"), tokenizer.token_id("<tool_call|>")
    for _ in range(300):
        name = "f" + "".join(rng.choice("ab9 _:'/\\.()-") for _ in range(rng.randrange(6))) + "g"
        made = {"function": {"name": name, "arguments": any_object(rng)}}
        prompt = tokenizer.chat([user("x"), {"role": "assistant", "tool_calls": [made]}])
        tokens = prompt[prompt.index(begin) : prompt.index(end) + 1]
        decoder = StreamDecoder(tokenizer)
        for piece in cut(tokens, rng):
            assert decoder.push(piece) == ("", "")
        assert functions(decoder) == [(name, made["function"]["arguments"])] and not decoder.errors


def cut(tokens: list[int], rng: random.Random) -> list[list[int]]:
    """Pieces of 1 to 8 tokens."""
    pieces, at = [], 0
    while at < len(tokens):
        size = rng.randrange(1, 9)
        pieces.append(tokens[at : at + size])
        at += size
    return pieces


@pytest.mark.parametrize("name", ["", " ", " a", "a{b", "a}", "a=b", "a,b", "'a'", '"a"', "<|tool_call>", "a\u200b"])
def test_names_that_no_call_can_have_are_refused(name: str):
    with pytest.raises(PromptError, match="can't be a tool's name"):
        Tools([{"name": name}])


@pytest.mark.parametrize("name", ["f", "a-b.c_1", "a b", "call:x", "é", "a(b", "google:mcp:pdf", "it's"])
def test_names_that_can_be_declared_are_found_in_calls(name: str):
    Tools([{"type": "function", "function": {"name": name}}])
    assert parse_calls(f"call:{name}{{a:1}}") == [(name, {"a": 1})]


def test_how_tokens_are_cut_into_pieces_makes_no_difference(tokenizer: Tokenizer):
    written = [
        "he ", "é", "<|channel>thought\nso", "<channel|>", "<|tool_call>", f"call:f{{a:{Q}é{{}}{Q}}}", "call:weather{}",
        "call:now{", "<tool_call|>", "<eos>", "<turn|>", Q, "}", "<bos>",
    ]  # fmt: skip
    rng, tools = random.Random(1), Tools([{"name": "f"}, WEATHER])
    for _ in range(100):
        tokens = tokenizer.encode("".join(rng.choices(written, k=8)))
        results = []
        for pieces in ([tokens], [[token] for token in tokens], cut(tokens, rng)):
            decoder = StreamDecoder(tokenizer, tools=tools)
            texts, thoughts = zip(*map(decoder.push, pieces), strict=True)
            results.append(("".join(texts) + decoder.finish(), "".join(thoughts), decoder.calls, decoder.errors))
        assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("begin, again, end", [
    ("call:f{a:", "[1,", ""), ("call:f{a:[", "1,", ""), ("call:f{a:", "9", ""), ("call:f{", "a:1,", ""),
    (f"call:f{{a:{QUOTE_MARK}", "x ", ""), ("call:f{a:", " ", ""), ('call:f{a:"', "\\n", ""), ("call:", "f ", ""),
    ("call:f{a", "b ", ""), ("", "call:f{}", "{"), ("call:f{a:[", "'',\"\",", ""), ("", "call:f()", "{"),
    ("call:f", " ", ""), ("call:f(", "(", ""), ("call:f{a", "= ", ""), ("call:f{a=", " ", ""), ("", "call:f(x{}", "{"),
    ("call:", "call:", ""), (f"call:f{{a:{QUOTE_MARK}x{QUOTE_MARK}", f"{QUOTE_MARK}", ""), ("call:f(a:'", "\"'\\", ""),
    ("call:f", "(", "{a:'"), ("call:f(", "{x:'\\", ""),
])  # fmt: skip
def test_reading_takes_linear_time(begin: str, again: str, end: str):
    """Of texts so long that each would take many minutes if it didn't."""
    with pytest.raises(ValueError):
        parse_calls(begin + again * (300_000 // len(again)) + end)


def test_a_call_that_never_ends_takes_linear_time(tokenizer: Tokenizer):
    """Nothing as long as the call is made anew for a further token."""
    decoder = StreamDecoder(tokenizer)
    decoder.push(tokenizer.encode("<|tool_call>" + "h" * 200_000))
    peaks = []
    for _ in range(3):
        tracemalloc.start()
        decoder.push(tokenizer.encode("h"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert min(peaks) < 50_000  # a list makes room for many at a time, and so not for each of three
    assert len(decoder.finish()) == 200_003


@pytest.mark.parametrize("tools", [[5], [{}], [{"function": {}}], [{"function": 5}], "f"])
def test_tools_that_are_none(tools: Any):
    with mlx_mtp.load(drafter=False) as lm, pytest.raises(PromptError, match="tool"):
        lm.generate("Hi", max_tokens=1, tools=tools)


def test_declared_tools_reach_the_answer_whoever_asks(tmp_path: Path):
    """The first tokens of a model's answer are given names that make them a call."""
    folder, _ = make_pair("e2b", tmp_path)
    asked: Json = {"prompt": [5], "seed": 1, "temperature": 1.0, "max_tokens": 3, "ignore_eos": True}
    with mlx_mtp.load(folder, drafter=False) as lm:
        tokens = lm.generate(**asked).tokens
    assert len({5, *tokens}) == 4, "choose another seed"
    names = dict(zip(tokens, ("<|tool_call>", "call:now{'at':'5'}", "<tool_call|>"), strict=True))
    library = Library(models.WordLevel({names.get(i, f"t{i}"): i for i in range(VOCAB)}, unk_token="t0"))
    library.add_special_tokens([names[tokens[0]], names[tokens[2]]])
    library.save(str(folder / "tokenizer.json"))
    fits: Json = {"name": "now", "parameters": {"properties": {"at": {"type": "integer"}}}}

    def answers(lm: mlx_mtp.MTPModel, tools: list[Json]) -> list[Any]:
        own = asked | {"tools": tools}
        batch = {key: value for key, value in own.items() if key != "seed"}
        return [
            lm.generate(**own),
            *lm.generate(**own, n=2)[:1],
            *lm.generate_batch([batch], seed=1),
            *(result for _, result in lm.generate_each([batch], seed=1)),
            *(chunk for chunk in lm.stream(**own) if chunk.tool_calls or chunk.tool_errors),
        ]

    with mlx_mtp.load(folder, drafter=False) as lm:
        called, refused = answers(lm, [fits]), answers(lm, [WEATHER])
    assert len(called) == len(refused) == 5
    for result in called:
        (call,) = result.tool_calls
        assert call["function"] == {"name": "now", "arguments": {"at": 5}} and not result.tool_errors
        assert call["id"] == called[0].tool_calls[0]["id"], "the same seed, but not the same id"
    for result in refused:
        assert result.tool_calls == [] and len(result.tool_errors) == 1 and "call:now" in result.text
