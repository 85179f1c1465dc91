"""Tokenizers of folders that have sentencepiece's tokenizer.model and no tokenizer.json.

The model's pieces and scores become what tokenizer.json would hold, in memory, so that all else works as with such a
file: BPE with byte fallback, "▁" for a space and no prefix space, which is how Gemma's are made. Others are refused.

    text  --"▁" for spaces-->  user-defined pieces are cut out  --merges by score-->  pieces; else bytes

Sentencepiece is imported when such a folder is read, not before.
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
"""Names like those of Gemma 4's control tokens: <|turn>, <turn|>, <|"|>. Sentencepiece may have them as plain pieces
that the user has defined."""

_SAMPLE = "Two  spaces, a\ttab,\nnew\n\nlines; 1,234 naïve cafés — 日本語のテキスト, 👩‍👧, e\u0301. def f(x):"
"""What a converted model is tried on."""


def read_model(path: Path, added: Any = None) -> tokenizers.Tokenizer:
    """Reads a tokenizer.model.

    Args:
        path: The file.
        added: tokenizer_config.json's `added_tokens_decoder`: by id, the names of tokens that the model has or that
            come after its own, and whether they are special.

    Returns:
        A tokenizer with the same ids. Control tokens and unknown ones are special, as are those that `added` says are.

    Raises:
        CheckpointError: It can't be read, isn't built as Gemma's, or is missing pieces.
    """
    try:
        from sentencepiece import SentencePieceProcessor
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except Exception as error:  # protobuf raises its own kinds if it is older than sentencepiece's code for it
        raise CheckpointError(
            f"{path} needs sentencepiece and protobuf: pip install --upgrade sentencepiece protobuf ({error})"
        ) from error
    try:
        content = read_bytes(path)
        proto = ModelProto.FromString(content)
        original = SentencePieceProcessor(model_proto=content)
    except Exception as error:  # of several libraries, RuntimeError and protobuf's own DecodeError among them
        raise CheckpointError(f"{path} can't be read: {error}") from error
    _check_kind(proto, path)
    result = _converted(proto)
    _add_tokens(result, added, path)
    if result.encode(_SAMPLE, add_special_tokens=False).ids != original.encode(_SAMPLE):
        raise CheckpointError(f"{path} cuts text in a way of its own: {_WAY_OUT}")
    return result


_WAY_OUT = "save a tokenizer.json with transformers (AutoTokenizer.from_pretrained(...).save_pretrained(...))"


def _check_kind(proto: Any, path: Path) -> None:
    spec, rules = proto.trainer_spec, proto.normalizer_spec
    reasons = [
        (spec.model_type != spec.BPE, "is no BPE model"),
        (not spec.byte_fallback, "has no byte fallback"),
        (bool(rules.precompiled_charsmap), "changes characters before it cuts text"),
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
    # Of any two neighbours sentencepiece joins those whose whole has the highest score: all ways to make each normal
    # piece of two others, in the order of scores.
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
    """Adds what tokenizer_config.json names; a token that the model has becomes special if it says so."""
    if not isinstance(added, Mapping):
        return
    for number, token in sorted(added.items(), key=lambda item: int(item[0]) if str(item[0]).isdecimal() else -1):
        name = token.get("content") if isinstance(token, Mapping) else None
        if not isinstance(name, str) or not name or not str(number).isdecimal():
            raise CheckpointError(f"{path.parent / 'tokenizer_config.json'}: added token {number!r} has no name or id")
        if token.get("special") is True:
            result.add_special_tokens([name])
        elif result.token_to_id(name) is None:
            result.add_tokens([AddedToken(name, normalized=False)])
        if (found := result.token_to_id(name)) != int(number):
            raise CheckpointError(f"{path} gives {name!r} the id {found}, tokenizer_config.json {number}: {_WAY_OUT}")
