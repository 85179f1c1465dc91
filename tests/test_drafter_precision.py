"""`load(quantize_drafter=)`: which precision a drafter gets, that sizes show it, and that texts don't depend on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mlx_mtp
from mlx_mtp import profile as profiles
from mlx_mtp.checkpoint.quantization import Format, Scheme
from mlx_mtp.checkpoint.sizes import weight_bytes
from mlx_mtp.cli.info import describe
from mlx_mtp.decode.round_cost import Prices
from mlx_mtp.errors import CheckpointError, MTPError, ProfileError
from mlx_mtp.models.drafter import Drafter
from tests.support.command_line import run
from tests.support.tiny_checkpoints import make_pair
from weights_convert.converter import convert

TOKENS = list(range(5, 45))
MXFP4 = Format(4, 32, "mxfp4")


def in_force(lm: mlx_mtp.MTPModel) -> Format | None:
    """How the projections of a loaded drafter are quantised."""
    with lm.models() as (_, drafter):
        assert isinstance(drafter, Drafter)
        layer = drafter.pre_projection
        return Format(layer.bits, layer.group_size, layer.mode) if "scales" in layer else None


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense and a clustered pair, and their targets and drafters in formats of their own, by name."""
    folder = tmp_path_factory.mktemp("pairs")
    found = {}
    for kind in ("31b", "e2b"):
        target, drafter = make_pair(kind, folder / kind)
        found |= {kind: target, f"{kind}-drafter": drafter}
        found[f"{kind}-drafter-8"] = convert(drafter, folder / f"{kind}-d8", Scheme(Format(8)))
        for name, how in (("2", Format(2)), ("4", Format(4, 32)), ("8", Format(8)), ("mxfp4", MXFP4)):
            found[f"{kind}-{name}"] = convert(target, folder / f"{kind}-{name}", Scheme(how))
    return found


@pytest.mark.parametrize("target, drafter, options, expected", [
    ("31b", "31b-drafter", {}, None),
    ("31b-4", "31b-drafter", {}, Format(4, 32)),
    ("31b-8", "31b-drafter", {}, Format(8)),
    ("31b-mxfp4", "31b-drafter", {}, MXFP4),
    ("31b-2", "31b-drafter", {}, Format(4)),  # 2 bits are too few for a drafter
    ("31b", "31b-drafter", {"quantize": 5}, Format(5)),
    ("31b", "31b-drafter", {"quantize": 2}, Format(4)),
    ("31b-4", "31b-drafter", {"quantize_drafter": None}, None),
    ("31b-4", "31b-drafter", {"quantize_drafter": "none"}, None),
    ("31b", "31b-drafter", {"quantize": 4, "quantize_drafter": "none"}, None),
    ("31b", "31b-drafter", {"quantize_drafter": 6}, Format(6)),
    ("31b-4", "31b-drafter", {"quantize_drafter": 2}, Format(2)),
    ("31b-4", "31b-drafter-8", {}, Format(8)),
    ("31b", "31b-drafter-8", {"quantize": 4}, Format(8)),
    ("e2b-4", "e2b-drafter", {}, None),
    ("e2b", "e2b-drafter", {"quantize": 4}, Format(4)),
    ("e2b-4", "e2b-drafter", {"quantize_drafter": 4}, Format(4)),
])  # fmt: skip
def test_which_precision_a_drafter_gets_and_that_info_says_so(
    target: str, drafter: str, options: dict[str, Any], expected: Format | None, pairs: dict[str, Path]
):
    folders = pairs[target], pairs[drafter]
    with mlx_mtp.load(*folders, **options) as lm:
        assert in_force(lm) == expected
        with lm.models() as (own_target, own):
            sizes = weight_bytes(own_target), weight_bytes(own)
    asked = {"quantize": None, "quantize_drafter": "auto", **options}
    facts = describe(str(folders[0]), str(folders[1]), asked["quantize"], None, asked["quantize_drafter"])
    assert (facts["target"]["bytes_in_memory"], facts["drafter"]["bytes_in_memory"]) == sizes
    assert facts["machine"]["needed"] == sum(sizes)
    stored = facts["drafter"]["stored_as"]
    if drafter.endswith("8"):
        assert stored == "8 bits, affine"
    else:
        assert stored == (f"float32, quantised to {expected} while loading" if expected else "float32")


@pytest.mark.parametrize("target", ["31b", "31b-4"])
def test_texts_do_not_depend_on_it(target: str, pairs: dict[str, Path]):
    texts = set()
    for choice in ("auto", "none", 3):
        with mlx_mtp.load(pairs[target], pairs["31b-drafter"], quantize_drafter=choice) as lm:
            for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 3}):
                answer = lm.generate(TOKENS, max_tokens=40, draft_length=3, ignore_eos=True, **options)
                texts.add((tuple(options), *answer.tokens))
                assert answer.stats.drafted > 0
    assert len(texts) == 2


@pytest.mark.parametrize("choice", [7, 0, -4, 1, True, 4.0, "4", "AUTO", "", [4]])
def test_anything_else_is_refused(choice: Any):
    with pytest.raises(MTPError, match="quantize_drafter must be 'auto', 'none' or 2, 3, 4, 5, 6 or 8 bits") as error:
        mlx_mtp.load(quantize_drafter=choice)
    assert "\n" not in str(error.value)


def test_bits_of_a_drafter_that_is_quantised_already_are_an_error_with_a_way_out(pairs: dict[str, Path]):
    with pytest.raises(CheckpointError, match=r"31b-d8: .* quantised already: .*--quantize-drafter.*--no-draft"):
        mlx_mtp.load(pairs["31b-4"], pairs["31b-drafter-8"], quantize_drafter=4)
    with mlx_mtp.load(pairs["31b-4"], pairs["31b-drafter-8"], quantize_drafter="none") as lm:
        assert in_force(lm) == Format(8)


def test_a_profile_holds_for_one_precision(pairs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MLX_MTP_PROFILES", str(tmp_path / "profiles"))
    folders = pairs["31b-4"], pairs["31b-drafter"]
    path = tmp_path / "profile.json"
    with mlx_mtp.load(*folders) as lm:
        key = profiles.key_of(lm.description, lm.drafter_description)
    assert key.drafter == "4 bits in groups of 32"
    saved = profiles.Profile(key, {1: Prices({1: 1.0, 2: 1.5}, 0.5, 0.0)}, {}, 1, 1, "latency", "committed", "now")
    profiles.save_profile(saved).rename(path)
    mlx_mtp.load(*folders, profile=path).close()
    for other in ("none", 8):
        with pytest.raises(ProfileError, match="another precision of the drafter"):
            mlx_mtp.load(*folders, profile=path, quantize_drafter=other)
    # One from before profiles said it was measured with the drafter as stored, whatever runs now.
    old = json.loads(path.read_text()) | {"schema": 1}
    del old["key"]["drafter"]
    path.write_text(json.dumps(old))
    with pytest.raises(ProfileError, match="wasn't written by this version"):
        mlx_mtp.load(*folders, profile=path)


def test_the_option(pairs: dict[str, Path]):
    where = pairs["31b-4"], "--drafter", pairs["31b-drafter"]
    facts = json.loads(run("info", *where, "--quantize-drafter", 6, "--json").stdout)
    assert facts["drafter"]["stored_as"] == "float32, quantised to 6 bits in groups of 64 while loading"
    assert "quantised to 4 bits in groups of 32 while loading" in run("info", *where).stdout
    for wrong in ("7", "yes", "4.0", "-4"):
        done = run("generate", "x", "--quantize-drafter", wrong)
        assert done.returncode == 2 and "auto, none, or 2" in " ".join(done.stderr.replace("│", " ").split())
    done = run("generate", "x", "--no-draft", "--quantize-drafter", "4")
    assert done.returncode == 2 and "--no-draft loads no drafter" in " ".join(done.stderr.replace("│", " ").split())
