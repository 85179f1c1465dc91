"""A small tokenizer.model of sentencepiece's, and damage to it: to its bytes, its fields, and its encoding."""

from __future__ import annotations

from random import Random
from typing import Any

from sentencepiece.sentencepiece_model_pb2 import ModelProto

from .fuzz import damaged_bytes
from .tiny_tokenizer import SPECIAL

_NUMBERS = (0, 1, -1, 3, 255, 2**31 - 1, -(2**31))

_SCORES = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e38, -1e38, 1e-45)

_NAMES = (
    "",
    "a",
    "ab",
    "▁",
    "\0",
    "<unk>",
    "<0x41>",
    "<0x>",
    "<0xFFF>",
    "<|turn>",
    "\ufffd",
    "x" * 5000,
    "▁" * 3000,
    "\U0010ffff",
)

_LENGTHS = (0, 1, 127, 2**14, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def tiny_model() -> bytes:
    """A BPE model with byte fallback, control tokens and a few merges, built as Gemma's is."""
    model: Any = ModelProto()
    kind = ModelProto.SentencePiece
    spec, rules = model.trainer_spec, model.normalizer_spec
    spec.model_type, spec.byte_fallback = spec.BPE, True
    spec.pad_id, spec.eos_id, spec.bos_id, spec.unk_id = 0, 1, 2, 3
    rules.name, rules.add_dummy_prefix, rules.remove_extra_whitespaces = "identity", False, False
    named = {"<unk>": kind.UNKNOWN, "<pad>": kind.CONTROL, "<eos>": kind.CONTROL, "<bos>": kind.CONTROL}
    for name in SPECIAL:
        model.pieces.add(piece=name, score=0.0, type=named.get(name, kind.USER_DEFINED))
    for byte in range(256):
        model.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=kind.BYTE)
    for i, name in enumerate(["he", "el", "ll", "lo", "hello", "▁a", "▁▁", *"abcdehlo▁.,\n"]):
        model.pieces.add(piece=name, score=-float(i), type=kind.NORMAL)
    return bytes(model.SerializeToString())


def damaged_model(rng: Random, content: bytes) -> bytes:
    """A model with changed fields, with lengths and types that its encoding can't have, or with changed bytes."""
    way = rng.randrange(10)
    if way < 2:
        return damaged_bytes(rng, content)
    if way < 4:
        return _damaged_encoding(rng, content)
    model: Any = ModelProto.FromString(content)
    for _ in range(rng.choice([1, 1, 2, 5])):
        _change(rng, model)
    return bytes(model.SerializeToString())


def _change(rng: Random, model: Any) -> None:
    pieces, way = model.pieces, rng.randrange(10)
    if way < 6 and pieces:
        piece = rng.choice(pieces)
        if way == 0:
            piece.score = rng.choice(_SCORES)
        elif way == 1:
            piece.type = rng.randrange(1, 7)
        elif way == 2:
            piece.piece = rng.choice([*_NAMES, rng.choice(pieces).piece, piece.piece * 2])
        elif way == 3:
            for _ in range(rng.choice([1, 1, 300])):
                pieces.add().CopyFrom(piece)
        elif way == 4:
            pieces.remove(piece)
        else:
            for other in pieces:
                other.type, other.score = piece.type, piece.score
    elif way == 6:
        del pieces[rng.randrange(len(pieces) + 1) :]
    else:
        part = rng.choice([model.trainer_spec, model.normalizer_spec, model.denormalizer_spec])
        _change_field(rng, part, rng.choice(part.DESCRIPTOR.fields))


def _change_field(rng: Random, part: Any, field: Any) -> None:
    """Sets a field to something odd of its type."""
    value: Any = {
        field.CPPTYPE_BOOL: lambda: rng.random() < 0.5,
        field.CPPTYPE_FLOAT: lambda: rng.choice(_SCORES),
        field.CPPTYPE_ENUM: lambda: rng.choice(field.enum_type.values).number,
        field.CPPTYPE_STRING: lambda: rng.choice(_NAMES),
    }.get(
        field.cpp_type, lambda: abs(rng.choice(_NUMBERS)) if "uint" in str(field.cpp_type) else rng.choice(_NUMBERS)
    )()
    if isinstance(value, str) and field.type == field.TYPE_BYTES:
        value = rng.randbytes(rng.choice([0, 1, 4, 300]))
    try:
        if isinstance(getattr(part, field.name), str | bytes | int | float):
            setattr(part, field.name, value)
        else:
            getattr(part, field.name).append(value)
    except ValueError:  # out of the field's range
        part.ClearField(field.name)


def _damaged_encoding(rng: Random, content: bytes) -> bytes:
    """Changes a length or a type in the encoding, or nests groups that never end."""
    way = rng.randrange(4)
    if way == 0:
        return content + bytes([rng.choice([0x0B, 0x13, 0x0C, 0x7B])]) * rng.choice([1, 99, 101, 100_000])
    at = rng.choice([i for i, byte in enumerate(content) if byte == 0x0A])  # field 1, of a length
    if way == 1:
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    return content[: at + 1] + _varint(rng.choice(_LENGTHS)) + content[at + 2 :]


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])
