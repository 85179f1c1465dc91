"""Writes a small tokenizer built as Gemma's is: BPE with byte fallback, "▁" for a space, Gemma 4's special tokens."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers

SPECIAL = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<|channel>", "<channel|>", "<|turn>", "<turn|>", "<|think|>", "<|tool>",
    "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
)  # fmt: skip

BYTES = range(len(SPECIAL), len(SPECIAL) + 256)
"""Ids of the tokens that stand for single bytes."""


def write_tokenizer(folder: Path, special: tuple[str, ...] = SPECIAL) -> None:
    """Writes tokenizer.json and tokenizer_config.json, and no chat template."""
    pieces = [
        *special,
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *"abcdefghijklmnopqrstuvwxyzHTE\n",
        "he",
        "ll",
        "▁w",
    ]
    library = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("h", "e"), ("l", "l"), ("▁", "w")],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    library.normalizer = normalizers.Replace(" ", "▁")
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens(list(special))
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<bos>"}, "eos_token": "<eos>"}))
