"""Converts sentencepiece's tokenizer.model, for folders that have no tokenizer.json.

The model's pieces and scores are converted in memory to the tokenizer that a tokenizer.json would describe. Only models
built as Gemma's are supported: BPE with byte fallback, "▁" for a space and no prefix space.

    text  --"▁" for spaces-->  user-defined pieces are cut out  --merges by score-->  pieces; else bytes

Sentencepiece is imported only when such a folder is read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from ..errors import CheckpointError
from ..files import read_bytes

FILE = "tokenizer.model"

_CONTROL = re.compile(r"<\|[^<>|]+\|?>|<[^<>|]+\|>")
"""Names in the form of Gemma 4's control tokens: <|turn>, <turn|>, <|"|>. A tokenizer.model may have them as
user-defined pieces, which aren't control tokens by themselves."""

_HALF = re.compile("[\ud800-\udfff]")
"""Half a surrogate pair: JSON may hold it, no token's name can."""

_SAMPLE = "Two  spaces, a\ttab,\nnew\n\nlines; 1,234 naïve cafés — 日本語のテキスト, 👩‍👧, e\u0301. def f(x):"
"""Text on which a converted model must give the same ids as the original."""


def read_model(path: Path, added: Any = None) -> tokenizers.Tokenizer:
    """Reads a tokenizer.model.

    Args:
        path: The file.
        added: `added_tokens_decoder` of tokenizer_config.json: by id, the names of tokens, which the model may have or
            not, and whether they are special.

    Returns:
        A tokenizer with the same ids. Control tokens, the unknown token and special tokens of `added` are special.

    Raises:
        CheckpointError: The file can't be read, isn't built as Gemma's, or its ids don't agree with `added`.
    """
    try:
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except Exception as error:  # a protobuf older than sentencepiece's code raises errors of its own
        raise CheckpointError(
            f"{path} needs sentencepiece and protobuf: pip install --upgrade sentencepiece protobuf ({error})"
        ) from error
    try:
        content = read_bytes(path)
        proto = ModelProto.FromString(content)
        original = SentencePieceProcessor(model_proto=content)
    except Exception as error:  # sentencepiece raises RuntimeError, protobuf its own DecodeError
        raise CheckpointError(f"{path} can't be read: {error}") from error
    _check_kind(proto, path)
    for i, piece in enumerate(proto.pieces):
        if not isinstance(piece.piece, str):  # protobuf gives the bytes of what isn't UTF-8
            raise CheckpointError(f"{path} is damaged: its piece {i} isn't text")
    result = _converted(proto)
    _add_tokens(result, added, path)
    if result.encode(_SAMPLE, add_special_tokens=False).ids != original.encode(_SAMPLE):
        raise CheckpointError(f"{path} can't be converted exactly: {_WAY_OUT}")
    return result


_WAY_OUT = "save a tokenizer.json with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))"


def _check_kind(proto: Any, path: Path) -> None:
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    reasons = [
        (spec.model_type != spec.BPE, "isn't a BPE model"),
        (not spec.byte_fallback, "has no byte fallback"),
        (bool(rules.precompiled_charsmap), "normalizes characters"),
        (rules.add_dummy_prefix, "puts a space before each text"),
        (rules.remove_extra_whitespaces, "removes spaces"),
        (not rules.escape_whitespaces, 'has spaces, not "▁", in its pieces'),
    ]
    found = [reason for holds, reason in reasons if holds]
    if found:
        raise CheckpointError(f"{path} isn't built as Gemma's, it {' and '.join(found)}: {_WAY_OUT}")


def _converted(proto: Any) -> tokenizers.Tokenizer:
    pieces = proto.pieces
    kind = type(pieces[0])
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    # Sentencepiece always joins the neighbours whose union has the highest score. As BPE merges: every way to split a
    # normal piece into two normal pieces, in the order of scores.
    normal = {piece.piece: piece.score for piece in pieces if piece.type == kind.NORMAL}
    merges = [
        (-score, ids[left], ids[right], left, right)
        for whole, score in normal.items()
        for i in range(1, len(whole))
        if (left := whole[:i]) in normal and (right := whole[i:]) in normal
    ]
    unknown = next((piece.piece for piece in pieces if piece.type == kind.UNKNOWN), None)
    result = tokenizers.Tokenizer(
        models.BPE(
            vocab=ids,
            merges=[(left, right) for *_, left, right in sorted(merges)],
            byte_fallback=True,
            unk_token=unknown,
            fuse_unk=True,
        )
    )
    result.normalizer = normalizers.Replace(" ", "▁")
    result.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    defined = [piece.piece for piece in pieces if piece.type == kind.USER_DEFINED]
    result.add_tokens([AddedToken(name, normalized=True) for name in defined if not _CONTROL.fullmatch(name)])
    special = [piece.piece for piece in pieces if piece.type in (kind.CONTROL, kind.UNKNOWN)]
    result.add_special_tokens([*special, *filter(_CONTROL.fullmatch, defined)])
    return result


def _add_tokens(result: tokenizers.Tokenizer, added: Any, path: Path) -> None:
    """Adds the tokens of tokenizer_config.json; marks those that it calls special."""
    if not isinstance(added, Mapping):
        return
    for number, token in sorted(added.items(), key=lambda item: _id(item[0])):
        name = token.get("content") if isinstance(token, Mapping) else None
        if not isinstance(name, str) or not name or _HALF.search(name) or _id(number) < 0:
            raise CheckpointError(
                f"{path.parent / 'tokenizer_config.json'}: added token {number!r:.80} has no name or id"
            )
        if token.get("special") is True:
            result.add_special_tokens([name])
        elif result.token_to_id(name) is None:
            result.add_tokens([AddedToken(name, normalized=False)])
        if (found := result.token_to_id(name)) != int(number):
            raise CheckpointError(f"{path} gives {name!r} the id {found}, tokenizer_config.json {number}: {_WAY_OUT}")


def _id(text: str) -> int:
    """The id that a key stands for, or -1 if it is none: Python refuses to read numbers of thousands of digits."""
    return int(text) if text.isdecimal() and len(text) < 10 else -1
