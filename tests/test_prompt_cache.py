"""KV of earlier prompts: a hit gives the same text as a miss, and memory is bounded (decode/prompt_cache.py)."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import mlx.core as mx
import pytest

import mlx_mtp
from mlx_mtp.checkpoint.pair import DEMO
from mlx_mtp.checkpoint.sizes import row_bytes
from mlx_mtp.decode.limits import MAX_DRAFT_LENGTH
from mlx_mtp.decode.prompt_cache import MIN_REUSE
from mlx_mtp.decode.request import Request, Row
from mlx_mtp.decode.sampling import SamplingOptions
from mlx_mtp.decode.scheduler import Scheduler
from mlx_mtp.errors import CheckpointError, MemoryBudgetError
from mlx_mtp.kv import kv_bytes
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target
from tests.support.random_requests import is_plain_text
from tests.support.scripted_drafter import ScriptedDrafter
from tests.support.tiny_checkpoints import VOCAB, load_pair, make_pair

Pair = tuple[Target, Drafter]
SAMPLED = SamplingOptions(temperature=1.0, top_k=40, seed=4)


@pytest.fixture(scope="module", params=["e2b", "12b"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    target_folder, drafter_folder = make_pair(request.param, tmp_path_factory.mktemp(request.param))
    return load_pair(target_folder, drafter_folder, "float32")


def words(count: int, seed: int) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(VOCAB) for _ in range(count)]


def run(scheduler: Scheduler, *prompts: list[int], tokens: int = 20, drafts: int = 3) -> list[Row]:
    rows = [scheduler.submit(Request(prompt, tokens, SAMPLED, drafts)) for prompt in prompts]
    while not all(row.done for row in rows):
        scheduler.step()
    return rows


def save(scheduler: Scheduler, prompt: list[int], file: Path) -> None:
    for _ in scheduler.save_prompt(prompt, file):
        pass


def test_hits_at_random_give_the_text_of_a_miss(pair: Pair):
    """Prompts that repeat, continue, and part from earlier ones, some of them side by side."""
    rng, scheduler = Random(5), Scheduler(*pair, max_rows=3)
    known, hits = [words(30, 0)], 0
    for turn in range(10):
        prompts = []
        for _ in range(rng.randint(1, 3)):
            text = rng.choice(known)
            prompts.append(text[: rng.randint(1, len(text))] + words(rng.choice([0, 1, 5, 60]), turn))
        for row in run(scheduler, *prompts, tokens=rng.randint(1, 40)):
            assert is_plain_text(pair[0], row)
            hits += 0 < row.stats.cached_tokens < len(row.request.prompt)
            known.append([*row.request.prompt, *row.tokens])
    assert hits > 3


def test_what_several_prompts_begin_with_is_found_from_the_third_on(pair: Pair):
    """The window has moved past the common beginning long before the prompts end."""
    scheduler, common = Scheduler(*pair), words(150, 1)
    cached = [run(scheduler, common + words(200, 10 + i))[0].stats.cached_tokens for i in range(4)]
    assert cached == [0, 0, 150, 150]


def test_few_tokens_are_reused_only_if_they_are_the_whole_prompt(pair: Pair):
    scheduler, short = Scheduler(*pair), words(MIN_REUSE - 2, 3)
    prompts = [short, short, [*short[:-2], *words(9, 4)], short]
    rows = [run(scheduler, prompt, tokens=4)[0] for prompt in prompts]
    assert [row.stats.cached_tokens for row in rows] == [0, len(short) - 1, 0, len(short) - 1]
    assert all(is_plain_text(pair[0], row) for row in rows)


def test_side_by_side_as_well(pair: Pair):
    scheduler, common = Scheduler(*pair), words(100, 2)
    run(scheduler, common)
    rows = run(scheduler, *(common + words(3, i) for i in range(4)))
    assert all(is_plain_text(pair[0], row) for row in rows)
    assert rows[0].stats.cached_tokens >= 99


def test_memory_is_bounded_and_the_oldest_goes_first(pair: Pair):
    scheduler = Scheduler(*pair)
    run(scheduler, words(100, 0), tokens=4)
    run(scheduler, words(3, 99), tokens=4)  # rows leave the batch when the next one comes
    one = scheduler.cache.nbytes
    scheduler = Scheduler(*pair, cache_bytes=int(3.5 * one))
    for i in range(6):
        run(scheduler, words(100, i), tokens=4)
        assert scheduler.cache.nbytes <= scheduler.cache.limit
    assert run(scheduler, words(100, 5), tokens=4)[0].stats.cached_tokens == 99
    assert run(scheduler, words(100, 0), tokens=4)[0].stats.cached_tokens == 0
    nothing = Scheduler(*pair, cache_bytes=0)
    assert [run(nothing, words(100, 0), tokens=4)[0].stats.cached_tokens for _ in range(2)] == [0, 0]
    assert nothing.cache.nbytes == 0


def test_what_running_rows_hold_counts_as_kept(pair: Pair):
    """Their checkpoints take half of what may be kept at most, and what was kept before makes room for them."""
    probe = Scheduler(*pair)
    run(probe, words(100, 0))
    probe.step()
    (entry,) = probe.cache._entries
    assert entry.nbytes == entry.kv.nbytes + sum(it.nbytes for it in entry.ring_states) > entry.kv.nbytes
    for share in (0.7, 1.5, 2.2):
        scheduler = Scheduler(*pair, cache_bytes=int(share * entry.nbytes), max_rows=6)
        limit, most, kept = scheduler.cache.limit, 0, 0
        rows = [scheduler.submit(Request(words(100, i), 4 + 12 * (i % 3), SAMPLED, 0)) for i in range(10)]
        while not all(row.done for row in rows):
            scheduler.step()
            held = sum({id(it): it.nbytes for row in rows if not row.done for it in row.ring_states}.values())
            most, kept = max(most, held), max(kept, scheduler.cache.nbytes)
            assert 2 * held <= limit and scheduler.cache.nbytes + held <= limit
        scheduler.step()  # the last rows leave the batch
        assert most and (max(kept, scheduler.cache.nbytes) or share < 1)


def test_beginnings_of_beginnings(pair: Pair):
    """Buffers of a long text serve a beginning of it, and are then shorter than what their rings have seen.

    The drafts are all wrong, and as many as there can be: rings are written as far past a text as they ever are.
    """
    target, window = pair[0], pair[0].config.sliding_window
    rng, hits = Random(7), 0
    for seed in range(4):
        scheduler: Scheduler = Scheduler(target, ScriptedDrafter([0]))  # type: ignore[arg-type]
        text = words(rng.randint(3 * window, 6 * window), seed)
        end = len(text)
        while end > MIN_REUSE:
            prompt = [*text[:end], *words(rng.choice((0, 3)), 99)]
            (row,) = run(scheduler, prompt, tokens=rng.randint(1, 12), drafts=MAX_DRAFT_LENGTH)
            assert is_plain_text(target, row), (seed, end, row.stats.cached_tokens)
            hits += row.stats.cached_tokens > 0
            end -= rng.randint(1, window)
    assert hits > 10


def test_a_short_beginning_of_a_long_text_is_no_copy_of_it(pair: Pair):
    scheduler, common = Scheduler(*pair), words(60, 1)
    for i in range(2):
        run(scheduler, common + words(1000, 10 + i))
    scheduler.step()  # the last row leaves the batch
    before, one = mx.get_active_memory(), kv_bytes(pair[0].config, 1000, 4)
    mx.reset_peak_memory()
    (row,) = run(scheduler, [*common, 7])
    assert mx.get_peak_memory() - before < one / 2
    assert row.stats.cached_tokens == 60 and is_plain_text(pair[0], row)


def test_a_prefill_that_is_given_up_keeps_what_it_has_taken(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mlx_mtp.decode.scheduler.CHUNK", 64)
    scheduler, prompt = Scheduler(*pair), words(100, 0)
    run(scheduler, prompt)
    row = scheduler.submit(Request([*prompt, *words(300, 1)], 5))
    scheduler.step()
    row.cancel()
    assert not row.tokens
    assert run(scheduler, [*prompt, 7])[0].stats.cached_tokens >= 99


def test_a_prompt_of_a_model_of_the_same_shape(pair: Pair, tmp_path: Path):
    """Trained further, it has the same names, shapes and types, and other KV."""
    file, target = tmp_path / "prompt.safetensors", pair[0]
    save(Scheduler(*pair), words(20, 1), file)
    norm = target.norm.weight
    target.norm.weight = norm * 1.01
    try:
        with pytest.raises(CheckpointError, match="another model"):
            Scheduler(*pair).load_prompt(file)
    finally:
        target.norm.weight = norm


def test_a_disk_that_is_full_when_a_prompt_is_saved(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[save_safetensors] Failed to write")

    monkeypatch.setattr(mx, "save_safetensors", full)
    file = tmp_path / "prompt.safetensors"
    with pytest.raises(OSError, match="disk") as caught:
        save(Scheduler(*pair), words(20, 1), file)
    assert caught.value.filename == str(file) and not list(tmp_path.iterdir())


def test_a_saved_prompt_with_other_shapes(pair: Pair, tmp_path: Path):
    file = tmp_path / "prompt.safetensors"
    save(Scheduler(*pair), words(20, 1), file)
    arrays, facts = mx.load(str(file), return_metadata=True)
    mx.eval(arrays)
    for name in ("keys.0", "values.0"):
        mx.save_safetensors(str(file), {**arrays, name: arrays[name][:, :, :-1]}, metadata=facts)
        with pytest.raises(CheckpointError, match="is damaged"):
            Scheduler(*pair).load_prompt(file)
    mx.save_safetensors(str(file), {**arrays, "keys.99": arrays["keys.0"]}, metadata=facts)
    with pytest.raises(CheckpointError, match=r"unexpected array keys\.99"):
        Scheduler(*pair).load_prompt(file)


def test_a_loaded_prompt_needs_its_file_no_more(pair: Pair, tmp_path: Path):
    file, prompt = tmp_path / "prompt.safetensors", words(60, 3)
    scheduler = Scheduler(*pair)
    save(scheduler, prompt, file)
    scheduler.load_prompt(file)
    file.write_bytes(b"")
    (row,) = run(scheduler, [*prompt, 7])
    assert row.stats.cached_tokens == 60 and is_plain_text(pair[0], row)


def test_a_saved_prompt_outlives_the_process(pair: Pair, tmp_path: Path):
    file, prompt = tmp_path / "prompt.safetensors", words(300, 3)
    save(Scheduler(*pair), prompt, file)
    assert [path.name for path in tmp_path.iterdir()] == ["prompt.safetensors"]
    scheduler = Scheduler(*pair)
    assert scheduler.load_prompt(file) == 300
    for row in run(scheduler, *([*prompt, 7, i] for i in range(3))):  # the first one doesn't take it from the others
        assert row.stats.cached_tokens == 300 and is_plain_text(pair[0], row)
    with pytest.raises(MemoryBudgetError, match="cache_bytes"):
        Scheduler(*pair, cache_bytes=1000).load_prompt(file)


def with_fact(file: bytes, name: str, value: object) -> bytes:
    """A safetensors file with other metadata."""
    size = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:size])
    header["__metadata__"][name] = json.dumps(value)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + file[size:]


def test_a_prompt_that_is_loaded_again_is_there_once(pair: Pair, tmp_path: Path):
    file, scheduler = tmp_path / "prompt.safetensors", Scheduler(*pair)
    save(scheduler, words(50, 1), file)
    scheduler.load_prompt(file)
    once = scheduler.cache.nbytes
    scheduler.load_prompt(file)
    assert scheduler.cache.nbytes == once > 0


def test_a_prompt_too_large_to_be_saved(pair: Pair, tmp_path: Path):
    scheduler = Scheduler(*pair, kv_budget=row_bytes(pair[0].config, 100, 4))
    with pytest.raises(MemoryBudgetError, match="need .* of KV"):
        save(scheduler, words(500, 1), tmp_path / "prompt.safetensors")
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_used(tmp_path: Path):
    file = tmp_path / "prompt.safetensors"
    with mlx_mtp.load() as lm:
        lm.save_prompt([{"role": "user", "content": "Who are you?"}], file)
        lm.load_prompt(file)
        assert lm.generate("Who are you?", temperature=0, max_tokens=5).stats.cached_tokens > 0
        with pytest.raises(CheckpointError, match="there is no such file: .*nothing.safetensors"):
            lm.load_prompt(tmp_path / "nothing.safetensors")
        with pytest.raises(CheckpointError, match="wasn.t saved by this version"):
            lm.load_prompt(DEMO / "target" / "model.safetensors")
        for unwritable in (tmp_path / "no" / "file.safetensors", file / "x.safetensors", tmp_path / ("x" * 300)):
            with pytest.raises(OSError) as caught:
                lm.save_prompt("x", unwritable)
            assert caught.value.filename == str(unwritable) and "partial" not in str(caught.value)
        whole = file.read_bytes()
        file.write_bytes(whole[:-10])
        with pytest.raises(CheckpointError, match="truncated"):
            lm.load_prompt(file)
        for name, value in (("written", 10**9), ("written", -1), ("capacity", 10**9), ("tokens", [0.5])):
            file.write_bytes(with_fact(whole, name, value))
            with pytest.raises(CheckpointError, match="is damaged"):
                lm.load_prompt(file)
        file.write_bytes(whole)
    target_folder, _ = make_pair("e2b", tmp_path / "other")
    with mlx_mtp.load(target_folder, drafter=False) as other, pytest.raises(CheckpointError, match="another model"):
        other.load_prompt(file)


@pytest.mark.parametrize("cancelled", [False, True])
def test_what_a_row_wrote_past_its_end_is_not_taken_for_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cancelled: bool
):
    """A ring has later positions in place of early ones then: of drafts that a limit, or a reader who left, cut off."""
    folders = make_pair("31b", tmp_path)
    for folder in folders:
        raw = json.loads((folder / "config.json").read_text())
        raw["text_config"]["sliding_window"] = 13  # with the longest block it nearly fills a ring of 32
        (folder / "config.json").write_text(json.dumps(raw))
    target, drafter = load_pair(*folders, "float32")
    prompt = words(30, 7)
    text = prompt + run(Scheduler(target, drafter), prompt, tokens=60, drafts=0)[0].tokens
    for count in range(1, 4) if cancelled else range(16, 20):
        scheduler = Scheduler(target, ScriptedDrafter(text))  # type: ignore[arg-type]
        row = scheduler.submit(Request(prompt, 50 if cancelled else count, SAMPLED, MAX_DRAFT_LENGTH))
        if cancelled:  # as by another thread, while a round is in flight
            settled = scheduler.engine._settled
            monkeypatch.setattr(
                scheduler.engine, "_settled", lambda it, row=row, count=count, settled=settled: (
                    row.cancel() if len(row.tokens) >= count else None, settled(it)
                )[1]
            )  # fmt: skip
        while not row.done:
            scheduler.step()
        for more in ([], row.tokens[:-1]):
            (again,) = run(scheduler, [*prompt, *more, 5], tokens=4, drafts=0)
            assert is_plain_text(target, again), (count, len(more), again.stats.cached_tokens)
