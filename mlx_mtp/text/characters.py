"""Decodes streamed tokens into characters.

Not here: dividing the characters into answer, reasoning and tool calls (stream_decoder.py).
"""

from __future__ import annotations

from codecs import utf_8_decode

import tokenizers
from tokenizers.decoders import DecodeStream


class CharacterStream:
    """Decodes one token at a time, and tolerates invalid UTF-8.

    The library's `DecodeStream` holds back the bytes of a character until its last byte has arrived. If a character is
    never completed, it raises, or returns nothing as long as bytes follow. This class replaces such bytes with U+FFFD,
    as many as Python's `bytes.decode` gives, as soon as they are known to be invalid, and starts a new `DecodeStream`.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Starts an empty text."""
        ids = ((tokenizer.token_to_id(f"<0x{byte:02X}>"), byte) for byte in range(256))
        self._bytes = {token: byte for token, byte in ids if token is not None}
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._held: list[int] = []  # byte tokens of a character that isn't complete yet

    def push(self, token: int) -> str:
        """The characters that a token completes."""
        if self._tokenizer.id_to_token(token) is None:
            return ""  # models have more embeddings than the tokenizer has tokens
        if token not in self._bytes:
            broken = self.finish()
            text = self._step(token)
            # The library also holds back text that ends with U+FFFD.
            return broken + (self._restarted(self._tokenizer.decode([token])) if text is None else text)
        text = self._step(token)
        if text is not None:
            self._held = []
            return text
        self._held.append(token)
        text, read = utf_8_decode(bytes(self._bytes[held] for held in self._held), "replace")
        if not read:
            return ""
        rest, self._held = self._held[read:], []
        return self._restarted(text) + "".join(map(self.push, rest))

    def finish(self) -> str:
        """Ends an incomplete character: U+FFFD for its bytes; "" if there is none."""
        if not self._held:
            return ""
        broken, self._held = bytes(self._bytes[held] for held in self._held), []
        return self._restarted(broken.decode("utf-8", "replace"))

    def _step(self, token: int) -> str | None:
        """What the library's stream gives for a token; None if it holds it back, or can't go on."""
        try:
            return self._stream.step(self._tokenizer, token)
        except Exception:  # of this class: a text of more tokens doesn't begin with that of fewer, in a damaged decoder
            return None

    def _restarted(self, text: str) -> str:
        """Starts a new library stream, and returns the text."""
        self._stream = DecodeStream(skip_special_tokens=False)
        return text
