"""Whether the oracle agrees with what a call gave.

A text is checked in one pass of the oracle over all of it: if each token is the one that the oracle chooses after those
before it, the text is the oracle's own.

Where a target computes in 16 bits, no other implementation rounds as it does. There the package's own logits of the
whole text take the place of the oracle's, and are held against the oracle's by themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import mlx.core as mx
import numpy as np

import mlx_mtp

from .oracle import Array, Oracle, Seen
from .oracle_choice import Wish, chosen, possible
from .oracle_constraints import Constraints
from .oracle_pairs import TEXT_VOCAB, Pair
from .tiny_tokenizer import SPECIAL

ROUNDINGS = 8
"""How many times the rounding of the oracle's own float32 is still called rounding: ours sums in another order."""

LEAST_MARGIN = 1e-4
"""Lead of an expert that is decided by rounding, perhaps: a text isn't judged from there on."""

ROUNDINGS_16 = 32
"""The same of logits computed in 16 bits, where sums over quantised weights round more often than the oracle does."""

STEP_16 = {"bfloat16": 2.0**-7, "float16": 2.0**-10}
"""Distance of neighbouring numbers of 16 bits, as a share of them."""

Options = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """What one row was asked for.

    Attributes:
        prompt: Token ids.
        options: As `generate` takes them.
    """

    prompt: list[int]
    options: Options


@dataclass(frozen=True)
class Given:
    """What came back.

    Attributes:
        call: The call; its seed is the row's own.
        tokens: The text.
        text: The same as a string; None if that isn't known.
        ended: Whether the text came to its end: it wasn't cancelled, nor its reader gone.
        logprobs: Log-probabilities, if they were asked for.
        accepted: Drafts that were accepted on the way.
    """

    call: Call
    tokens: list[int]
    text: str | None
    ended: bool
    logprobs: Sequence[Any] | None
    accepted: int


@dataclass
class Verdict:
    """What the oracle says.

    Attributes:
        tokens: Number of tokens that were compared.
        near: How many of them differ where the oracle's own scores are within rounding of each other.
        unjudged: Tokens after a near tie between experts.
        differences: What is wrong, in words.
    """

    tokens: int = 0
    near: int = 0
    unjudged: int = 0
    differences: list[str] = field(default_factory=list)


class Judge:
    """Checks what calls of one model gave.

    Attributes:
        oracle: The target.
        stops: Tokens that end a text.
        suppressed: Tokens that are never chosen.
        writes: Whether the model has a tokenizer.
        constraints: If so, what judges response formats.
    """

    def __init__(self, pair: Pair, own_logits: Callable[[list[int]], Array] | None = None) -> None:
        """Reads the target by itself.

        Args:
            pair: The pair.
            own_logits: For a target that computes in 16 bits: the package's own logits of a text, all at once. Texts
                are held against these, as no other computation rounds the same way; and these against the oracle's,
                see `wrong_logits`.
        """
        self.oracle, self._dtype = Oracle(pair.target, pair.adapter, pair.dtype), pair.dtype
        self._own_logits = own_logits
        generation = json.loads((pair.target / "generation_config.json").read_text())
        eos = generation["eos_token_id"]
        self.stops = {eos} if isinstance(eos, int) else set(eos)
        self.suppressed = generation.get("suppress_tokens", [])
        self.writes = self.oracle.vocab == TEXT_VOCAB
        self._bytes: dict[int, bytes] = {}
        if self.writes:
            self.stops |= {SPECIAL.index("<eos>")}
            tokenizer = pair.target / "tokenizer.json"
            pieces = json.loads(tokenizer.read_text())["model"]["vocab"]
            self._bytes = {token: _bytes_of(piece) for piece, token in pieces.items()}
            self.constraints = Constraints(tokenizer, self._bytes, self.stops, self.oracle.vocab)

    def judge(self, given: Given) -> Verdict:
        """Checks one text: every token, its end, its string and its log-probabilities."""
        call, tokens, verdict = given.call, given.tokens, Verdict()
        if not tokens:
            return verdict if not given.ended else Verdict(differences=["no token at all"])
        whole, first = [*call.prompt, *tokens[:-1]], len(call.prompt) - 1
        cap, seen, errors = self._seen(whole)
        wish = self.wish(call.options)
        for i, token in enumerate(tokens):
            if seen.margins[first + i] < LEAST_MARGIN:
                verdict.unjudged = len(tokens) - i
                break
            logits, before = seen.logits[first + i], tokens[:i]
            verdict.tokens += 1
            if token != (expected := chosen(cap, logits, call.prompt, before, wish)):
                error = float(errors()[first + i])
                if token not in possible(cap, logits, call.prompt, before, wish, error):
                    verdict.differences.append(f"token {i} is {token}, not {expected}")
                    break
                verdict.near += 1
        judged = verdict.tokens
        verdict.differences += self._wrong_end(given)
        verdict.differences += self._wrong_logprobs(given, cap, seen.logits[first : first + judged], errors)
        return verdict

    def _seen(self, whole: list[int]) -> tuple[float | None, Seen, Callable[[], Array]]:
        """What a text is held against: a softcap, logits before it, and what makes their possible errors."""
        if self._own_logits is None:
            seen = self.oracle.see(whole)
            return self.oracle.cap, seen, cache(lambda: ROUNDINGS * self.oracle.rounding(whole))
        logits = self._own_logits(whole)  # rounded after the softcap, which is done in float32 when texts are written
        errors = 2 * STEP_16[self._dtype] * np.abs(logits).max(axis=-1)
        return None, Seen(logits, np.full(len(whole), np.inf)), lambda: errors

    def wish(self, options: Options) -> Wish:
        """The oracle's form of a call's options."""
        form = options.get("response_format")
        return Wish(
            temperature=options.get("temperature", 0.0),
            top_k=options.get("top_k", 0),
            top_p=options.get("top_p", 1.0),
            min_p=options.get("min_p", 0.0),
            seed=options["seed"],
            repetition=options.get("repetition_penalty", 1.0),
            presence=options.get("presence_penalty", 0.0),
            frequency=options.get("frequency_penalty", 0.0),
            bias=options.get("logit_bias", {}),
            suppressed=self.suppressed,
            process=_even_tokens_first if "logits_processors" in options else None,
            allowed=partial(self.constraints.allowed, form) if form else None,
        )

    def _wrong_end(self, given: Given) -> Iterator[str]:
        """What is wrong with where a text ends, and with its string."""
        options, tokens = given.call.options, given.tokens
        stops = set(options.get("stop_token_ids", ())) | (set() if options.get("ignore_eos") else self.stops)
        room = self.oracle.config["max_position_embeddings"] - len(given.call.prompt) + 1
        limit = min(options["max_tokens"], room)
        shown = b""
        for i, token in enumerate(tokens):
            shown += self._bytes.get(token, b"")
            cut = [shown.index(stop.encode()) for stop in options.get("stop", ()) if stop.encode() in shown]
            if token in stops or cut or i + 1 == limit:
                if i + 1 < len(tokens):
                    yield f"{len(tokens)} tokens, but it ends after {i + 1}"
                expected = (shown[: min(cut)] if cut else shown).decode()
                if self.writes and given.ended and given.text not in (None, expected):
                    yield f"the text is {given.text!r}, not {expected!r}"
                if (form := options.get("response_format")) and not cut:
                    yield from filter(None, [self.constraints.wrong(form, expected, token in self.stops)])
                return
        if given.ended:
            yield f"it ends after {len(tokens)} tokens of {limit} for no reason"

    def _wrong_logprobs(
        self, given: Given, cap: float | None, logits: Array, errors: Callable[[], Array]
    ) -> Iterator[str]:
        """What is wrong with log-probabilities; `logits` are those of the tokens that were judged."""
        if (wanted := given.call.options.get("logprobs")) is None:
            return
        if given.logprobs is None or len(given.logprobs) != len(given.tokens):
            yield "log-probabilities are missing"
            return
        if not len(logits):
            return
        capped = logits if cap is None else cap * np.tanh(logits / cap)
        scores = capped - np.log(np.exp(capped - capped.max(-1, keepdims=True)).sum(-1, keepdims=True))
        scores -= capped.max(-1, keepdims=True)
        bound = 2 * float(errors().max()) + 1e-5 * max(1.0, float(np.abs(scores).max()))
        for i, (found, own) in enumerate(zip(given.logprobs, scores, strict=False)):
            expected = [own[given.tokens[i]], *np.sort(own)[::-1][:wanted], *(own[token] for token, _ in found.top)]
            got = [found.logprob, *(score for _, score in found.top), *(score for _, score in found.top)]
            if len(got) != len(expected) or np.abs(np.array(got) - expected).max() > bound:
                yield f"log-probabilities of token {i} are {got}, not {expected}"
                return


def _bytes_of(piece: str) -> bytes:
    if piece in SPECIAL:
        return b""
    return bytes([int(piece[3:5], 16)]) if piece.startswith("<0x") else piece.replace("▁", " ").encode()


def _even_tokens_first(tokens: list[int], logits: Array) -> Array:
    """`random_controls.even_tokens_first` in numpy."""
    return logits + 0.5 * ((np.arange(len(logits)) + tokens[-1]) % 2)


def wrong_logits(lm: mlx_mtp.MTPModel, judge: Judge, tokens: list[int]) -> str:
    """What is wrong with the logits of a text; "" if nothing is."""
    seen, cap = judge.oracle.see(tokens), judge.oracle.cap
    expected = seen.logits if cap is None else cap * np.tanh(seen.logits / cap)
    judged = seen.margins >= LEAST_MARGIN
    errors = np.abs(np.array(lm.logits(tokens).astype(mx.float32)) - expected).max(axis=-1)
    bound = (ROUNDINGS if lm.description.dtype == "float32" else ROUNDINGS_16) * judge.oracle.rounding(tokens) + 1e-5
    return f"logits are wrong by {errors[judged].max()}" if (errors > bound)[judged].any() else ""
