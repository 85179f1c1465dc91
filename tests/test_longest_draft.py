"""How long a draft may get by itself: what the fused attention kernel takes, unless prices were measured."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mlx_mtp.decode import draft_length
from mlx_mtp.decode.draft_length import DraftLengthPolicy
from mlx_mtp.decode.limits import MAX_AUTO_LENGTH
from mlx_mtp.decode.request import Request, Row, Stats
from mlx_mtp.decode.round_cost import Prices
from mlx_mtp.models.attention import longest_fused
from mlx_mtp.simulate.known_models import KNOWN_MODELS, known_pair


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_of_each_size(name: str, gpu: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(draft_length, "on_gpu", lambda: gpu)
    text = known_pair(name)[0].text
    assert longest_fused(text) == (4 if name == "E2B" else 8)
    assert draft_length.longest_auto(text) == (3 if gpu and name == "E2B" else MAX_AUTO_LENGTH)


def drafted(policy: DraftLengthPolicy, rows: int, seconds: Callable[[int], float], rounds: int = 150) -> set[int]:
    """Lengths of the rounds in which all drafts are kept, trials included."""
    running = [Row(Request([1], 10**6), Stats(), 10**6) for _ in range(rows)]
    seen = set()
    for _ in range(rounds):
        decision = policy.next(running, waiting=True)
        policy.observe(decision, decision.lengths, seconds(max(decision.lengths)))
        seen |= set(decision.lengths)
    return seen


@pytest.mark.parametrize("rows", [1, 4])
def test_nothing_longer_is_tried(rows: int):
    """Though here it would pay, as longer rounds cost the same."""
    assert max(drafted(DraftLengthPolicy(longest=3), rows, lambda _: 1.0)) == 3
    assert max(drafted(DraftLengthPolicy(), rows, lambda _: 1.0)) == MAX_AUTO_LENGTH
    # Nor while nothing is drafted, where a few more drafts may be tried because they are cheaper.
    dear = {0: 1.0, 1: 40.0, 2: 40.0, 3: 40.0, 4: 30.0, 5: 20.0, 6: 10.0, 7: 9.0}
    assert max(drafted(DraftLengthPolicy(longest=3), rows, dear.__getitem__)) <= 3


@pytest.mark.parametrize("rows", [1, 4])
def test_measured_prices_say_where_a_step_is(rows: int):
    step = {k: 1.0 if k < 4 else 30.0 for k in range(MAX_AUTO_LENGTH + 1)}
    prices = Prices({k + 1: seconds for k, seconds in step.items()}, 0.0, 0.0)
    assert max(drafted(DraftLengthPolicy(lambda _: prices), rows, step.__getitem__, 60)) == 3
