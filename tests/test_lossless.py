"""A small version of scripts/prove_lossless.py: the text is the same whatever is drafted, for every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.prove_lossless import compare, demo_pair
from tests.support.tiny_checkpoints import ARCHITECTURES, WINDOW, make_pair

PROMPT = list(range(5, 5 + 2 * WINDOW + 3))


@pytest.mark.parametrize(
    "kind, sampling", [*((kind, "greedy") for kind in ARCHITECTURES), ("e2b", "sampled"), ("26b", "sampled")]
)
def test_random_pairs(kind: str, sampling: str, tmp_path: Path):
    tokens = 4 * WINDOW if sampling == "greedy" else 2 * WINDOW  # greedy text is less varied
    runs = list(compare(*make_pair(kind, tmp_path), PROMPT, tokens, None, (sampling,), (3, 8, "auto")))
    assert all(run.differs_at is None and run.tokens == tokens for run in runs)
    assert min(run.distinct for run in runs) > 10
    # All but what lies beyond the end of the text.
    assert next(run.accepted for run in runs if (run.drafter, run.draft_length) == ("right", 4)) > 3.5
    assert next(run.accepted for run in runs if (run.drafter, run.draft_length) == ("wrong", 4)) == 0


@pytest.mark.parametrize("kind", ["e2b", "26b"])
def test_quantized_pairs(kind: str, tmp_path: Path):
    runs = list(compare(*make_pair(kind, tmp_path), PROMPT, 2 * WINDOW, 4, ("sampled",), (1, 4)))
    assert all(run.differs_at is None for run in runs)


@pytest.mark.parametrize("sampling", ["greedy", "sampled"])
def test_the_embedded_pair(sampling: str):
    *folders, prompt = demo_pair()
    runs = list(compare(*folders, prompt, 60, None, (sampling,), (2, 5)))
    assert all(run.differs_at is None for run in runs)
    assert any(run.accepted > 0 for run in runs if run.drafter == "own")
