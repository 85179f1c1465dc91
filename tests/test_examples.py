"""The examples run, and do what they say."""

from __future__ import annotations

import ast
import asyncio
import sys

import pytest

from scripts.examples import edit, records, two_readers


@pytest.fixture(autouse=True)
def no_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["example"])


def test_records_have_the_form(capsys: pytest.CaptureFixture[str]):
    records.main()
    lines = [line.split(" ", 1) for line in capsys.readouterr().out.splitlines()]
    assert sorted(index for index, _ in lines) == ["0", "1", "2"]
    assert all(set(ast.literal_eval(record)) == {"name", "kind", "year"} for _, record in lines)


def test_a_story_comes_though_its_neighbour_is_cancelled(capsys: pytest.CaptureFixture[str]):
    asyncio.run(two_readers.main())
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_an_edit_is_the_same_text(capsys: pytest.CaptureFixture[str]):
    edit.main()
    assert "the same text in" in capsys.readouterr().out
