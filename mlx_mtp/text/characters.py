"""From tokens to characters while tokens come.

Not here: what of the characters is answer, thought or call (stream_decoder.py).
"""

from __future__ import annotations

from codecs import utf_8_decode

import tokenizers
from tokenizers.decoders import DecodeStream


class CharacterStream:
    """The characters of tokens that come one at a time: the library's `DecodeStream`, which also stands broken bytes.

    `DecodeStream` holds back the bytes of a character until the last of them has come. Where a character is never
    completed it stops: it waits on for as long as bytes follow, or raises. Here such bytes become U+FFFD as soon as
    it is plain that they are broken, one for each as Python's `bytes.decode` has it, and the stream begins anew.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        """Begins a text."""
        ids = ((tokenizer.token_to_id(f"<0x{byte:02X}>"), byte) for byte in range(256))
        self._bytes = {token: byte for token, byte in ids if token is not None}
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=False)
        self._held: list[int] = []  # byte tokens that may yet become a character

    def push(self, token: int) -> str:
        """The characters that a token completes."""
        if self._tokenizer.id_to_token(token) is None:
            return ""  # models have more embeddings than the tokenizer has tokens
        if token not in self._bytes:
            broken = self.finish()
            text = self._stream.step(self._tokenizer, token)
            # It is held back if it is U+FFFD itself, or ends with it.
            return broken + (self._restarted(self._tokenizer.decode([token])) if text is None else text)
        text = self._stream.step(self._tokenizer, token)
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
        """What is left of an incomplete character when no byte follows: U+FFFD, or nothing."""
        if not self._held:
            return ""
        broken, self._held = bytes(self._bytes[held] for held in self._held), []
        return self._restarted(broken.decode("utf-8", "replace"))

    def _restarted(self, text: str) -> str:
        """The text, after which the library's stream begins anew."""
        self._stream = DecodeStream(skip_special_tokens=False)
        return text
