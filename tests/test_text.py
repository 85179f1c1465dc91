"""Text and token ids: round trips, streaming, stop strings, the chat format (mlx_mtp/text)."""

from __future__ import annotations

import json
import random
import statistics
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library

from mlx_mtp.errors import CheckpointError, PromptError
from mlx_mtp.text.stop_strings import StopStrings
from mlx_mtp.text.stream_decoder import StreamDecoder
from mlx_mtp.text.tokenizer import Tokenizer
from tests.support.tiny_tokenizer import BYTES, SPECIAL, write_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|turn>{{ m.role }}\n{{ m.content }}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n{% endif %}{% if enable_thinking %}THINK{% endif %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
)
TEXTS = (
    "Hello  world",
    " leading and trailing ",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧 family, 🇩🇪 flag, e\u0301",
    "tabs\tand\nnew\n\nlines",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with a chat template of its own."""
    where = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(where)
    (where / "chat_template.jinja").write_text(TEMPLATE)
    return where


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def stream(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*(decoder.push([token])[0] for token in tokens), decoder.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_come_back(tokenizer: Tokenizer, folder: Path, text: str):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert Library.from_file(str(folder / "tokenizer.json")).decode(tokens) == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_never_holds_half_a_character(tokenizer: Tokenizer, text: str):
    chunks = stream(tokenizer, tokenizer.encode(text))
    assert "".join(chunks) == text
    assert not any("\ufffd" in chunk for chunk in chunks)


@pytest.mark.parametrize("low, high", [(BYTES.start, BYTES.stop), (BYTES.start, 300), (0, 300)])
def test_a_stream_of_anything_is_what_decode_gives(tokenizer: Tokenizer, low: int, high: int):
    """Random bytes are broken characters mostly: each becomes one replacement mark, as in a whole text."""
    rng = random.Random(0)
    for _ in range(200):
        tokens = [rng.randrange(low, high) for _ in range(rng.randrange(30))]
        assert "".join(stream(tokenizer, tokens)) == tokenizer.decode(tokens)
        if low == BYTES.start and high == BYTES.stop:
            assert tokenizer.decode(tokens) == bytes(t - low for t in tokens).decode("utf-8", "replace")


def test_a_stream_in_pieces_never_holds_half_a_character(tokenizer: Tokenizer):
    rng = random.Random(2)
    for _ in range(200):
        text = "".join(chr(rng.choice((rng.randrange(32, 0xD800), rng.randrange(0xE000, 0x110000)))) for _ in range(9))
        text = text.replace("\ufffd", "").replace("▁", "")
        tokens = [BYTES.start + byte for byte in text.encode()]
        decoder, chunks = StreamDecoder(tokenizer), []
        while tokens:
            cut = rng.randrange(len(tokens) + 1)
            chunks.append(decoder.push(tokens[:cut])[0])
            tokens = tokens[cut:]
        assert not any("\ufffd" in chunk for chunk in chunks)
        assert "".join(chunks) == text and decoder.finish() == ""


def test_broken_bytes_spoil_nothing_but_themselves(tokenizer: Tokenizer):
    euro = tokenizer.encode("€")
    assert len(euro) == 3
    assert tokenizer.decode(euro[:2]) == "\ufffd"
    assert tokenizer.decode([*euro, euro[0], *tokenizer.encode("a")]) == "€\ufffda"
    assert "".join(stream(tokenizer, [*euro, *euro[:1]])) == "€\ufffd"


def test_special_tokens_and_unknown_ids_are_no_text(tokenizer: Tokenizer):
    turn_end = tokenizer.token_id("<turn|>")
    assert turn_end in tokenizer.special
    assert tokenizer.decode([*tokenizer.encode("he"), turn_end, 10**6]) == "he"


def test_thoughts_are_kept_apart(tokenizer: Tokenizer):
    tokens = tokenizer.encode("<|channel>thought\nwell €\n<channel|>hello")
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push([token]) for token in tokens]
    assert "".join(text for text, _ in pieces) == "hello"
    assert "".join(thought for _, thought in pieces) == "well €\n"
    assert tokenizer.decode(tokens) == "hello"


def test_a_thought_may_begin_in_the_token_that_ends_the_channels_name(tmp_path: Path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_folder(tmp_path)
    tokenizer.library.add_tokens(["\nhe"])
    tokens = [*tokenizer.encode("<|channel>thought"), tokenizer.token_id("\nhe"), *tokenizer.encode("llo")]
    assert StreamDecoder(tokenizer).push(tokens) == ("", "hello")


def test_of_two_special_names_that_begin_alike_the_longer_one_is_meant(tmp_path: Path):
    write_tokenizer(tmp_path, (*SPECIAL, "<|a", "<|a>", "<|a>>"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    for name in ("<|a", "<|a>", "<|a>>"):
        assert tokenizer.encode(name) == [tokenizer.token_id(name)]


def test_a_broken_character_of_a_thought_stays_in_the_thought(tokenizer: Tokenizer):
    half = tokenizer.encode("€")[:2]
    tokens = [*tokenizer.encode("<|channel>thought\n"), *half, *tokenizer.encode("<channel|>he")]
    assert StreamDecoder(tokenizer).push(tokens) == ("he", "\ufffd")


def test_an_answer_may_begin_within_a_thought(tokenizer: Tokenizer):
    open_prompt = tokenizer.encode("<bos><|turn>model\n<|channel>thought\n")
    closed_prompt = tokenizer.encode("<bos><|turn>model\n<|channel>thought\n<channel|>")
    tokens = tokenizer.encode("well\n<channel|>hello")
    assert StreamDecoder(tokenizer, open_prompt).push(tokens) == ("hello", "well\n")
    assert StreamDecoder(tokenizer, open_prompt + tokenizer.encode("l")).push(tokens) == ("hello", "well\n")
    assert StreamDecoder(tokenizer, closed_prompt).push(tokenizer.encode("hello")) == ("hello", "")
    assert StreamDecoder(tokenizer, tokenizer.encode("<|channel>x<|turn>")).push(tokenizer.encode("he")) == ("he", "")


@pytest.mark.parametrize("before", ["hello€ ", "€"])
def test_a_stream_costs_the_same_at_any_length(tokenizer: Tokenizer, before: str):
    """Nothing of what came before is read again; that took 1,000 times as long after 20,000 tokens."""
    tokens = tokenizer.encode(before * 50)
    decoder, seconds = StreamDecoder(tokenizer), []
    for _ in range(200):
        begin = time.perf_counter()
        decoder.push(tokens)
        seconds.append(time.perf_counter() - begin)
    assert statistics.median(seconds[-20:]) < 5 * statistics.median(seconds[:20])


def test_a_replacement_character_of_the_model_is_text(tokenizer: Tokenizer, tmp_path: Path):
    """Where a token has U+FFFD in it, that isn't the beginning of another character."""
    write_tokenizer(tmp_path)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    library.add_tokens(["a\ufffd"])
    library.save(str(tmp_path / "tokenizer.json"))
    own = Tokenizer.from_folder(tmp_path)
    token = own.token_id("a\ufffd")
    assert token is not None
    euro = own.encode("€")
    chunks = stream(own, [token, *euro, token, token, euro[0], token])
    assert chunks == ["a\ufffd", "", "", "€", "a\ufffd", "a\ufffd", "", "\ufffda\ufffd", ""]


def test_a_decoder_that_takes_back_what_it_gave_ends_no_stream(folder: Path, tmp_path: Path):
    """It is damaged, or hostile; the library's stream can't go on."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    taken_back = {"type": "Replace", "pattern": {"String": "ab"}, "content": "xyz"}
    raw["decoder"] = {"type": "Sequence", "decoders": [{"type": "Fuse"}, taken_back]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.from_folder(tmp_path)
    stream = tokenizer.characters()
    assert [stream.push(token) for name in "abc" if (token := tokenizer.token_id(name)) is not None] == ["a", "b", "c"]


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_stop_strings(chunk: int):
    text, stops = "one two three two", ["two t", "three"]
    stop = StopStrings(stops)
    out = "".join(stop.push(text[i : i + chunk]) for i in range(0, len(text), chunk))
    assert stop.hit and out + stop.finish() == "one "
    never = StopStrings(["x", "twofold"])
    out = "".join(never.push(text[i : i + chunk]) for i in range(0, len(text), chunk))
    assert not never.hit and out + never.finish() == text


def test_where_a_text_stops_does_not_depend_on_its_pieces():
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=12))
        strings = ["".join(rng.choices("ab", k=rng.randrange(1, 6))) for _ in range(3)]
        results = set()
        for size in (1, 2, 3, 5, 12):
            stop = StopStrings(strings)
            out = "".join(stop.push(text[i : i + size]) for i in range(0, len(text), size))
            results.add((out + stop.finish(), stop.hit))
        assert len(results) == 1, (text, strings, results)
        out, hit = results.pop()
        assert hit == any(s in text for s in strings) and text.startswith(out)
        assert not any(s in out for s in strings)


def test_the_beginning_of_a_stop_string_is_held_back():
    stop = StopStrings(["END"])
    assert stop.push("the E") == "the "
    assert stop.push("N") == ""
    assert stop.push("T") == "ENT"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(PromptError, match="empty"):
        StopStrings(["a", ""])


def test_the_template_gets_what_it_needs(tokenizer: Tokenizer):
    turns = [{"role": "assistant", "content": "ll"}, {"role": "user", "content": "he"}]
    expected = "<bos><|turn>assistant\nll<turn|>\n<|turn>user\nhe<turn|>\n<|turn>model\n"
    assert tokenizer.render(turns) == expected
    assert tokenizer.render(turns, thinking=True) == expected + "THINK"
    assert tokenizer.render(turns, tools=[{"name": "<é>"}]).endswith('[{"name": "<é>"}]'), "no escapes"
    tokens = tokenizer.chat(turns)
    assert tokens.count(tokenizer.token_id("<bos>")) == 1
    assert tokens == tokenizer.encode(expected)


@pytest.mark.parametrize("messages, culprit", [
    ([], "no messages"), ([{"role": "king", "content": "x"}], "king"), ([{"content": "x"}], "None"),
    ([{"role": "user"}], "content"), ([{"role": "user", "content": 5}], "content"),
    ([{"role": "tool", "content": "x"}], "no tools here"),
])  # fmt: skip
def test_malformed_messages(tokenizer: Tokenizer, messages: list[dict[str, object]], culprit: str):
    with pytest.raises(PromptError, match=culprit):
        tokenizer.chat(messages)


def test_text_that_is_no_utf8(tokenizer: Tokenizer):
    with pytest.raises(PromptError, match="UTF-8"):
        tokenizer.encode(b"caf\xe9".decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("template, culprit", [
    ("{{ raise_exception('a\nb') }}", "a b"), ("{{ 1 // 0 }}", "zero"), ("{{ messages[9].content.x }}", "element 9"),
])  # fmt: skip
def test_whatever_a_template_raises_is_one_line(folder: Path, tmp_path: Path, template: str, culprit: str):
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(PromptError, match=culprit) as raised:
        Tokenizer.from_folder(tmp_path).render([{"role": "user", "content": "x"}])
    assert "\n" not in str(raised.value)


def test_templates_may_write_json_as_they_like(folder: Path, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (tmp_path / "chat_template.jinja").write_text(
        "{{ tools | tojson(indent=2, sort_keys=true) }}{{ strftime_now('%Y') }}"
    )
    text = Tokenizer.from_folder(tmp_path).render([{"role": "user", "content": "x"}], tools=[{"b": "<&>", "a": 1}])
    assert text[:-4] == '[\n  {\n    "a": 1,\n    "b": "<&>"\n  }\n]' and text[-4:].isdigit()


def test_a_template_can_do_no_harm(folder: Path, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(PromptError, match="unsafe"):
        Tokenizer.from_folder(tmp_path).render([{"role": "user", "content": "x"}])


def test_folders_without_a_usable_tokenizer(folder: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="can't be read"):
        Tokenizer.from_folder(tmp_path)
    write_tokenizer(tmp_path, SPECIAL[:4])  # nothing to chat with
    with pytest.raises(CheckpointError, match="no chat template"):
        Tokenizer.from_folder(tmp_path).render([{"role": "user", "content": "x"}])
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match="broken"):
        Tokenizer.from_folder(tmp_path).render([{"role": "user", "content": "x"}])
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja can't be read"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 5}')
    with pytest.raises(CheckpointError, match="isn.t a string"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "default"}, 7]}'
    )  # and so the built-in one is used
    with pytest.raises(CheckpointError, match="no chat template"):
        Tokenizer.from_folder(tmp_path).render([{"role": "user", "content": "x"}])


def test_templates_in_the_tokenizer_config(folder: Path, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    for template in ("{{ messages[0].content }}!", [
        {"name": "other", "template": "?"}, {"name": "default", "template": "{{ messages[0].content }}!"},
    ]):  # fmt: skip
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        assert Tokenizer.from_folder(tmp_path).render([{"role": "user", "content": "x"}]) == "x!"


def test_templates_are_found_where_transformers_finds_them(folder: Path, tmp_path: Path):
    """Each place in turn hides those before it; further templates add to whichever there are."""
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    user, tools = [{"role": "user", "content": "x"}], [{"name": "f"}]

    def found() -> tuple[str, str]:
        tokenizer = Tokenizer.from_folder(tmp_path)
        return tokenizer.render(user), tokenizer.render(user, tools=tools)

    named = [{"name": "tool_use", "template": "config's tools"}, {"name": "default", "template": "config"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert found() == ("config", "config's tools")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert found() == ("json", "json")
    (tmp_path / "chat_template.jinja").write_text("file")
    assert found() == ("file", "file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("rag")
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("file's tools")
    assert found() == ("file", "file's tools")
    (tmp_path / "chat_template.jinja").unlink()
    assert found() == ("json", "file's tools")
    (tmp_path / "chat_template.json").write_text("[]")
    with pytest.raises(CheckpointError, match="isn't a JSON object"):
        found()


def test_special_tokens_that_name_nothing_are_none(folder: Path, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}{{ unk_token }}")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"bos_token": {}, "eos_token": {"content": "<eos>"}, "unk_token": 5}'
    )
    assert Tokenizer.from_folder(tmp_path).render([{"role": "user", "content": "x"}]) == "<eos>"
