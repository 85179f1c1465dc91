"""The documentation's code runs, and the reference has every public name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import pytest

import mlx_mtp
from mlx_mtp.decode.logprobs import TokenLogprob
from mlx_mtp.decode.request import Stats
from mlx_mtp.session.answer import Span

DOCS = Path(__file__).resolve().parent.parent / "docs"


def blocks(page: str, kind: str) -> list[tuple[int, str]]:
    """The code blocks of a page that begin with ``` and this: the line of each, and its code."""
    text = (DOCS / page).read_text()
    found = re.finditer(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, block.start(1)), block[1]) for block in found]


@pytest.mark.parametrize("page", ["api.md", "macos-apps.md"])
def test_the_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Blocks of a page continue each other."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    code = blocks(page, "python")
    assert code
    for line, block in code:
        exec(compile("\n" * line + block, str(DOCS / page), "exec"), names)


@pytest.mark.parametrize("kind", ["python notrun", "python toga"])
def test_code_for_a_mac_is_python(kind: str):
    code = blocks("macos-apps.md", kind)
    assert code
    for line, block in code:
        compile("\n" * line + block, "macos-apps.md", "exec")


def public(names: Iterable[str]) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def named(text: str) -> set[str]:
    """The names that stand in backquotes."""
    return {name for quoted in re.findall(r"`([^`\n]+)`", text) for name in re.findall(r"\w+", quoted)}


def test_the_reference_has_every_public_name():
    """Each in the section about its class."""
    with mlx_mtp.load() as lm:
        attributes, of_chat = public(vars(lm)), public(vars(lm.chat()))
    expected = {
        "load": set(inspect.signature(mlx_mtp.load).parameters),
        "MTPModel": public(dir(mlx_mtp.MTPModel)) | attributes,
        "Chat": public(dir(mlx_mtp.Chat)) | of_chat,
        "GenerationOptions": public(dir(mlx_mtp.GenerationOptions)),
        **{it.__name__: public(dir(it)) | {field.name for field in fields(it)} for it in (mlx_mtp.Generation, Stats)},
        **{it.__name__: {field.name for field in fields(it)} for it in (mlx_mtp.Chunk, TokenLogprob)},
        "Span": set(Span._fields),
    }
    page = (DOCS / "api.md").read_text()
    sections = dict(re.findall(r"^## `(\w+)`\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL))
    assert sections.keys() == expected.keys()
    missing = {of: sorted(names - named(sections[of])) for of, names in expected.items()}
    assert not any(missing.values()), missing
    assert set(mlx_mtp.__all__) <= named(page)
