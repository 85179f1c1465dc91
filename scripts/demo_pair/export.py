"""Writes the pair as Hugging Face folders and checks that the package's own models compute what torch computed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from . import config
from .model import Drafter, Target
from .tokenizer import TOKENIZER_CONFIG

TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def target_weights(target: Target) -> dict[str, Tensor]:
    """The target's weights under their published names, in bfloat16."""
    return {f"model.language_model.{name}": tensor.bfloat16() for name, tensor in target.state_dict().items()}


def drafter_weights(drafter: Drafter) -> dict[str, Tensor]:
    """The drafter's weights under their published names, in bfloat16; the token order stays int64."""
    state = drafter.state_dict()
    return {name: t.bfloat16() if t.is_floating_point() else t.clone() for name, t in state.items()}


def rounded(model: torch.nn.Module) -> None:
    """Rounds a model's weights to bfloat16 in place: what comes after it is trained on what will be published."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())


def export(out: Path, tokenizer: Tokenizer, target: Target, drafter: Drafter) -> None:
    """Writes `out`/target and `out`/drafter; each folder appears whole or not at all."""
    template = {"chat_template.jinja": TEMPLATE.read_text()}
    texts = {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": _json(TOKENIZER_CONFIG)}
    _folder(out / "target", config.TARGET, config.GENERATION, target_weights(target), {**texts, **template})
    _folder(out / "drafter", config.DRAFTER, config.DRAFTER_GENERATION, drafter_weights(drafter), {})


def _folder(
    folder: Path,
    model: Mapping[str, Any],
    generation: Mapping[str, Any],
    weights: dict[str, Tensor],
    texts: dict[str, str],
) -> None:
    aside, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    for path in (aside, old):
        shutil.rmtree(path, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in weights.items()}, aside / "model.safetensors", {"format": "pt"})
    (aside / "model.safetensors").chmod(0o644)
    for name, text in {"config.json": _json(model), "generation_config.json": _json(generation), **texts}.items():
        (aside / name).write_text(text, encoding="utf-8")
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


@torch.no_grad()
def check(out: Path, target: Target, drafter: Drafter, tokens: list[int], steps: int = 4) -> tuple[float, float]:
    """Loads the exported pair with the package and compares both models with torch's, in float32.

    Args:
        out: Where `export` wrote.
        target: The target that was exported.
        drafter: The drafter that was exported.
        tokens: A text of more tokens than the window.
        steps: Draft steps.

    Returns:
        Largest differences of the target's logits and of the drafter's.

    Raises:
        ValueError: A difference that rounding can't explain.
    """
    import mlx.core as mx

    from mlx_mtp.checkpoint.description import read_drafter, read_target
    from mlx_mtp.checkpoint.load import load_drafter, load_target
    from mlx_mtp.decode.prefill import prefill

    rounded(target)
    rounded(drafter)
    count = len(tokens) - steps
    sequence = torch.tensor([tokens[:count]])
    run = target(sequence)
    expected = target.logits(run.hidden)[0]
    embedded = target.embed(torch.tensor([[tokens[count:]]]))
    at = torch.tensor([[count - 1]])
    drafts = [drafter.logits(h)[0, 0] for h in drafter.unroll(embedded, run.hidden[:, -1:], run.lent, at)]

    described = read_target(out / "target", dtype="float32")
    model = load_target(described)
    assistant = load_drafter(read_drafter(out / "drafter", dtype="float32"), described.config, "committed")
    hidden: list[mx.array] = []
    kv, last = prefill(model, tokens[:count], keep=hidden.append)
    found = model.logits(mx.concatenate(hidden, axis=1))[0]
    target_gap = float((torch.tensor(found.tolist()) - expected).abs().max())
    lent = assistant.borrow(kv, mx.array([count], dtype=mx.int32))
    drafter_gap = 0.0
    for token, want in zip(tokens[count:], drafts, strict=True):
        scores, ids, last = assistant(model.embed(mx.array([token])), last, lent)
        gap = torch.tensor(scores[0].tolist()) - want[torch.tensor(ids[0].tolist())]
        drafter_gap = max(drafter_gap, float(gap.abs().max()))
    if max(target_gap, drafter_gap) > 1e-2:
        raise ValueError(f"the package's logits differ from torch's: target {target_gap}, drafter {drafter_gap}")
    return target_gap, drafter_gap
