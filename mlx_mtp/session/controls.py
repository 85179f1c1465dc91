"""From a call's options to the rules that its rows follow (`control.row.Rules`)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..control.grammar import Grammars, Matcher
from ..control.penalties import Penalties
from ..control.row import Rules
from ..control.thoughts import ThoughtTokens
from ..control.tool_grammar import CallTokens, tool_grammar
from ..decode.adjustments import RowControl
from ..decode.limits import is_int
from ..errors import PromptError
from ..text.control_tokens import CHANNEL, CHANNEL_END
from ..text.tokenizer import Tokenizer
from ..text.tool_calls import CALL, CALL_END, QUOTE
from .generation_config import GenerationDefaults
from .options import GenerationOptions


class Controls:
    """Makes the rules of one model's calls, and keeps what grammars need of its vocabulary."""

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, defaults: GenerationDefaults, folder: Path
    ) -> None:
        """Takes the parts of a model; `folder` is for messages."""
        self._tokenizer, self._vocab, self._defaults, self._folder = tokenizer, vocab_size, defaults, folder
        self._grammars: Grammars | None = None
        self._lock = threading.Lock()  # reading a published vocabulary takes seconds: once is enough

    def control(self, options: GenerationOptions) -> Callable[[Sequence[int]], RowControl] | None:
        """What makes the control of a row from its prompt; None if the options ask for none.

        Raises:
            PromptError: An option doesn't fit the model, or a grammar can't be compiled.
            MTPError: A package is missing.
        """
        calls = _choice(options)
        bias = self._bias(options.logit_bias or {})
        if calls == "none" and options.tools:
            bias[self._call_tokens().begin] = -float("inf")
        matcher = self._matcher(options, calls)
        thoughts = self._thoughts()
        if options.thinking_budget is not None and thoughts is None:
            raise PromptError(f"thinking_budget needs a vocabulary with {CHANNEL}, and {self._folder} has none")
        may_call = calls == "auto" and bool(options.tools) and matcher is not None
        call = self._call_tokens().begin if may_call else None
        openers = {call} if call is not None else set()
        if thoughts and options.thinking:
            openers.add(thoughts.begin)
            if calls not in ("auto", "none"):
                openers.add(self._call_tokens().begin)
        rules = Rules(
            vocab_size=self._vocab,
            penalties=Penalties(
                # Whole numbers may be larger than numpy's.
                repetition=float(options.repetition_penalty),
                presence=float(options.presence_penalty),
                frequency=float(options.frequency_penalty),
                bias=bias,
            ),
            processors=tuple(options.logits_processors or ()),
            matcher=matcher,
            openers=frozenset(openers),
            call=call,
            thoughts=thoughts,
            thinking_budget=options.thinking_budget,
        )
        return rules.begin if rules else None

    def _matcher(self, options: GenerationOptions, calls: str) -> Matcher | None:
        given = options.response_format
        if calls not in ("auto", "none"):
            functions = [tool.get("function", tool) for tool in options.tools or ()]
            wanted = [it for it in functions if calls in ("required", it.get("name"))]
            if not wanted:
                raise PromptError(f"tool_choice {calls!r} needs a tool of that name in tools")
            if given and given.get("type") != "text":
                raise PromptError("response_format and a tool_choice that asks for a call exclude each other")
            grammar = tool_grammar(wanted, self._call_tokens())
            return self._known_grammars().matcher({"type": "grammar", "grammar": grammar})
        if given is None or given.get("type") == "text":
            return None
        return self._known_grammars().matcher(given)

    def _known_grammars(self) -> Grammars:
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise PromptError(f"grammars need a tokenizer, and {self._folder} has none")
        with self._lock:
            if self._grammars is None:
                stops = {*self._defaults.stop_tokens, *tokenizer.stop_tokens}
                self._grammars = Grammars(tokenizer.library, self._vocab, stops)
            return self._grammars

    def _bias(self, given: Mapping[Any, Any]) -> dict[int, float]:
        bias = {}
        for token, value in given.items():
            # No longer than the ids of the vocabulary: Python refuses to read numbers of thousands of digits.
            decimal = isinstance(token, str) and token.isdecimal() and len(token) <= len(str(self._vocab))
            known = int(token) if decimal else token
            if not is_int(known) or not 0 <= known < self._vocab:
                raise PromptError(f"logit_bias has {token!r}, which isn't a token id below {self._vocab}")
            bias[known] = float(value)
        return bias

    def _thoughts(self) -> ThoughtTokens | None:
        begin, end = (
            (self._tokenizer.token_id(name) for name in (CHANNEL, CHANNEL_END)) if self._tokenizer else (None, None)
        )
        if begin is None or end is None or self._tokenizer is None:
            return None
        call = self._tokenizer.token_id(CALL)
        return ThoughtTokens(begin=begin, end=end, call=call, special=frozenset(self._tokenizer.special))

    def _call_tokens(self) -> CallTokens:
        ids = [self._tokenizer.token_id(name) if self._tokenizer else None for name in (CALL, CALL_END, QUOTE)]
        begin, end, quote = ids
        if begin is None or end is None or quote is None:
            raise PromptError(f"tool_choice needs a vocabulary with {CALL}, and {self._folder} has none")
        return CallTokens(begin=begin, end=end, quote=quote)


def _choice(options: GenerationOptions) -> str:
    """auto, none, required, or the name of a tool."""
    choice = options.tool_choice
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        choice = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(choice, str):
            raise PromptError('a tool_choice that is a dict looks like {"type": "function", "function": {"name": ...}}')
    return choice or "auto"
