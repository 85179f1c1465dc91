"""The tokeniser of the embedded pair: BPE with byte fallback, in SentencePiece's manner, with Gemma 4's special tokens.

The special tokens have the ids of the published models, so that stop tokens and the like are the same there and here.
Any text comes back unchanged, except that the mark for a space (U+2581) comes back as a space, as with SentencePiece.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import chain
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from .config import VOCAB

SPACE = "\u2581"
SPECIAL = {
    0: "<pad>",
    1: "<eos>",
    2: "<bos>",
    3: "<unk>",
    4: "<mask>",
    46: "<|tool>",
    47: "<tool|>",
    48: "<|tool_call>",
    49: "<tool_call|>",
    50: "<|tool_response>",
    51: "<tool_response|>",
    52: '<|"|>',
    98: "<|think|>",
    100: "<|channel>",
    101: "<channel|>",
    105: "<|turn>",
    106: "<turn|>",
}
BOS, THINK, TURN, END_TURN = 2, 98, 105, 106
ROLES = ["user", "model", "system", "thought"]
"""Words of the chat format; each is one token."""

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# Words with the space before them, punctuation likewise, single digits, runs of newlines, indentation.
_PIECES = rf"{SPACE}?\p{{L}}+|{SPACE}?[^\p{{L}}\p{{N}}\s{SPACE}]+|\p{{N}}|\n+|{SPACE}+"

TOKENIZER_CONFIG: dict[str, Any] = {
    "add_bos_token": False,
    "backend": "tokenizers",
    "bos_token": "<bos>",
    "clean_up_tokenization_spaces": False,
    "eoc_token": "<channel|>",
    "eos_token": "<eos>",
    "eot_token": "<turn|>",
    "escape_token": '<|"|>',
    "mask_token": "<mask>",
    "model_max_length": 4096,
    "pad_token": "<pad>",
    "padding_side": "left",
    "soc_token": "<|channel>",
    "sot_token": "<|turn>",
    "think_token": "<|think|>",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
}


def train(texts: Iterable[str]) -> Tokenizer:
    """Trains the tokeniser; special tokens in the texts are to be left out."""
    reserved = [SPECIAL.get(i, f"<unused{i}>") for i in range(max(SPECIAL) + 1)]
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    raw.normalizer = normalizers.Replace(" ", SPACE)
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), "isolated")
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=reserved + _BYTES, show_progress=False)
    raw.train_from_iterator(chain(texts, ROLES * 2000), trainer)
    model = json.loads(raw.to_str())["model"]
    if len(model["vocab"]) != VOCAB:
        raise ValueError(f"the texts give a vocabulary of {len(model['vocab'])}, not {VOCAB}")
    # Made again, because the trainer would also find the byte tokens' names in a text.
    merges = [tuple(merge) for merge in model["merges"]]
    bpe = models.BPE(model["vocab"], merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer, tokenizer.pre_tokenizer = raw.normalizer, raw.pre_tokenizer
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIAL.values()])
    return tokenizer
