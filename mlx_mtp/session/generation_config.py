"""Reads generation_config.json: a checkpoint's stop tokens and default sampling options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checkpoint.description import TargetDescription
from ..decode.limits import is_int
from ..decode.sampling import SamplingOptions
from ..errors import CheckpointError, PromptError
from ..files import read_json


@dataclass(frozen=True)
class GenerationDefaults:
    """Defaults of generation_config.json.

    Attributes:
        stop_tokens: Ids that end an answer (`eos_token_id`).
        suppress_tokens: Ids that are never chosen.
        temperature: 0, which is greedy, unless `do_sample` is set.
        top_k: 0 for off.
        top_p: 1 for off.
        min_p: 0 for off.
    """

    stop_tokens: tuple[int, ...]
    suppress_tokens: tuple[int, ...]
    temperature: float
    top_k: int
    top_p: float
    min_p: float


def read_generation(target: TargetDescription) -> GenerationDefaults:
    """Reads a target's generation_config.json; without one, all defaults are greedy and nothing is suppressed.

    Stop tokens are those of the first file that has any: generation_config.json, then config.json.

    Raises:
        CheckpointError: The file is malformed, or a value is out of the range that requests allow.
    """
    config = target.raw
    text, path = config.get("text_config", config), target.folder / "generation_config.json"
    given = read_json(path, required=False)
    stop = next((ids for file in (given, config, text) if (ids := file.get("eos_token_id")) is not None), None)
    sample = bool(given.get("do_sample", False))
    try:
        sampling = SamplingOptions(
            temperature=float(given.get("temperature", 1.0)) if sample else 0.0,
            top_k=int(given.get("top_k") or 0) if sample else 0,
            top_p=float(given.get("top_p") or 1.0) if sample else 1.0,
            min_p=float(given.get("min_p") or 0.0) if sample else 0.0,
        )
        return GenerationDefaults(
            stop_tokens=_token_ids(stop, target.text.vocab_size),
            suppress_tokens=_token_ids(given.get("suppress_tokens"), target.text.vocab_size),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
    except (TypeError, ValueError, OverflowError, PromptError) as error:
        raise CheckpointError(f"{path} can't be understood: {error}") from error


def _token_ids(value: Any, vocab_size: int) -> tuple[int, ...]:
    ids = [value] if is_int(value) else value or []
    if not isinstance(ids, list) or not all(is_int(token) and 0 <= token < vocab_size for token in ids):
        raise ValueError(f"{value!r} aren't token ids of a vocabulary of {vocab_size}")
    return tuple(ids)
