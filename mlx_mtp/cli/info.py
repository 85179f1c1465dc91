"""`mlx-mtp info`: a model's sizes and memory, whether it fits here, and its predicted speed. Reads no weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..errors import MTPError
from . import options as o
from . import render

if TYPE_CHECKING:
    from ..checkpoint.description import AnyDescription, DrafterDescription, TargetDescription
    from ..simulate.chips import Chip

PREDICTED = "PREDICTED, not measured"
HOW_GOOD = " (half of the published speeds lie outside such a range, see docs/cost_model.md)"

_FITS = "fits the target"
"""Value of "pairing" for a drafter that was made for the target."""


def info(
    model: o.Model = None,
    drafter: o.Drafter = None,
    no_draft: o.NoDraft = False,
    quantize: o.Quantize = None,
    quantize_drafter: o.QuantizeDrafter = "auto",
    chip: Annotated[
        str | None,
        typer.Option(help="Predict the speed for this Apple chip instead of this machine's.", metavar="CHIP"),
    ] = None,
    as_json: o.Json = False,
    debug: o.Debug = False,  # noqa: ARG001 - `main` reads it
) -> None:
    """Shows sizes, memory, pairing, whether a model fits, and its predicted speed; downloads no weights."""
    o.check_loading(drafter, no_draft, quantize, quantize_drafter)
    machine = chip_named(chip)
    facts = describe(model, False if no_draft else drafter, quantize, machine, quantize_drafter)
    if as_json:
        print(json.dumps(facts))
    else:
        render.show([render.pairs(_table(facts), width=len("  unquantised"))])


def describe(
    model: str | None,
    drafter: str | Literal[False] | None,
    quantize: int | None,
    chip: Chip | None,
    quantize_drafter: int | str | None = "auto",
) -> dict[str, Any]:
    """Facts about a pair, as `mlx-mtp info --json` prints them.

    Args:
        model: Folder or repository of the target; None for the embedded demo pair.
        drafter: See `api.load`.
        quantize: See `api.load`.
        chip: Chip to predict the speed for; None for no prediction.
        quantize_drafter: See `api.load`.

    Raises:
        CheckpointError: A config.json is missing or isn't Gemma 4's, or downloaded weights can't be loaded.
    """
    from ..checkpoint import fit as fits
    from ..checkpoint import sizes
    from ..checkpoint.pair import find_pair, suggest_no_draft
    from ..config import check_pair
    from ..errors import PairingError
    from ..kv import kv_bytes
    from ..system.wired import WIRED

    target, own = find_pair(model, drafter, quantize, quantize_drafter=quantize_drafter, weights=False)
    config, text, dtype_bytes = target.config, target.text, target.dtype_bytes
    size = sizes.of(target)
    owners = [layer for i, layer in enumerate(text.layers) if layer.kv_owner == i]
    facts: dict[str, Any] = {
        "target": {
            "folder": str(target.folder),
            "model_type": config.model_type,
            "layers": len(text.layers),
            "sliding_layers": sum(layer.sliding for layer in text.layers),
            "layers_with_kv": len(owners),
            "experts": text.num_experts,
            "experts_per_token": text.experts_per_token,
            "hidden_size": text.hidden_size,
            "vocabulary": text.vocab_size,
            "window": text.sliding_window,
            "context": text.max_positions,
            "stored_as": _stored_as(target),
            "activation_bits": 8 * dtype_bytes,
            **_on_disk(target),
            "parameters": size.parameters,
            "bytes_in_memory": size.weights,
            "bytes_read_per_token": size.read_per_token,
            "kv_bytes_at": {str(n): kv_bytes(text, n, dtype_bytes) for n in _lengths(text.max_positions)},
        },
        "drafter": None,
    }
    if own:
        with suggest_no_draft():
            on_disk = _on_disk(own)
        size, clusters = sizes.of(own), own.config.num_clusters
        try:
            check_pair(config, own.config)
            pairing = _FITS
        except PairingError as error:
            pairing = str(error)
        facts["drafter"] = {
            "folder": str(own.folder),
            "merged": own.merged,
            "model_type": own.config.model_type,
            "head": f"{clusters} clusters" if clusters else "dense",
            "stored_as": _stored_as(own),
            **on_disk,
            "parameters": size.parameters,
            "bytes_in_memory": size.weights,
            "bytes_read_per_draft": size.read_per_token,
            "pairing": pairing,
        }
    have = sizes.memory_for_models()

    def fit(bits: int | None) -> dict[str, Any]:
        """Memory of the pair if it is quantised to `bits` while loading."""
        found = fits.fit(target, own, bits, quantize_drafter)
        return {
            "quantize": bits,
            "needed": found.needed,
            "bytes_read_per_token": found.read_per_token,
            "longest_context": found.longest_context,
        }

    asked = fit(quantize)
    facts["machine"] = {
        "memory": have,
        "wired_at_most": WIRED.most,
        **asked,
        "fits": asked["longest_context"] > 0,
        "choices": [],
    }
    if not target.stored:
        facts["machine"]["choices"] = [fit(bits) for bits in fits.CHOICES]
    facts["expected"] = None
    if chip:
        fitting = own if facts["drafter"] and facts["drafter"]["pairing"] == _FITS else None
        facts["expected"] = _expected(target, fitting, chip)
    return facts


def chip_named(name: str | None) -> Chip | None:
    """The chip with a name, or this machine's; None if there are no figures for this machine."""
    from ..simulate.chips import chip, this_chip

    try:
        return chip(name) if name else this_chip()
    except MTPError as error:
        raise typer.BadParameter(str(error), param_hint="--chip") from None


def _expected(target: TargetDescription, drafter: DrafterDescription | None, chip: Chip) -> dict[str, Any]:
    """The cost model's prediction for one row, see `report.single_row`."""
    from ..simulate import cost_model, report

    own = (drafter.config, target.format, drafter.format) if drafter else (None, target.format, None)
    return report.single_row(chip, cost_model.pair(target.config, *own))


def _lengths(longest: int) -> list[int]:
    """Context lengths for which KV sizes are shown."""
    return [n for n in (1024, 8192, 32768, 131072) if n < longest] + [longest]


def _stored_as(it: AnyDescription) -> str:
    if it.stored:
        return f"{it.stored.common.bits} bits, {it.stored.common.mode}"
    dtype = it.stated_dtype or "unknown type"
    return f"{dtype}, quantised to {it.quantize} while loading" if it.quantize else dtype


def _on_disk(described: AnyDescription) -> dict[str, Any]:
    """Bytes of the weight files that exist, None if there are none, and the names of missing files.

    Raises:
        CheckpointError: The headers show that the files can't be loaded.
    """
    from ..checkpoint import load, safetensors_files
    from ..files import listed

    if not listed(described.folder, "*.safetensors"):
        return {"bytes_on_disk": None, "files_missing": []}
    files = safetensors_files.weight_files(described.folder)
    missing = [path.name for path in files if not path.is_file()]
    size = sum(path.stat().st_size for path in files if path.name not in missing)
    if missing:
        for path in files:
            if path.name not in missing:
                safetensors_files.read_header(path)
    else:
        tensors = load.stored_tensors(described)
        if described.merged:
            size = sum(tensor.nbytes for tensor in tensors.values())
        load.assign(load.empty_model(described), tensors, described)
    return {"bytes_on_disk": size or None, "files_missing": missing}


def _size(count: int) -> str:
    from ..checkpoint.sizes import format_bytes

    return format_bytes(count)


def _stored(facts: dict[str, Any]) -> str:
    if facts["bytes_on_disk"] is None:
        return "not downloaded"
    size, missing = _size(facts["bytes_on_disk"]), facts["files_missing"]
    return f"{size}; NOT complete: {missing[0]} is missing, {len(missing)} in all" if missing else size


def _table(facts: dict[str, Any]) -> list[tuple[str, str]]:
    t, d, m = facts["target"], facts["drafter"], facts["machine"]
    experts = f", {t['experts_per_token']} of {t['experts']} experts per token" if t["experts"] else ""
    lines = [
        ("target", t["folder"]),
        ("  model", f"{t['model_type']}, {t['parameters'] / 1e6:,.1f} M parameters, {t['stored_as']}{experts}"),
        ("  layers", (f"{t['layers']}: {t['sliding_layers']} sliding over {t['window']} tokens, "
                      f"{t['layers'] - t['sliding_layers']} full; {t['layers_with_kv']} with their own KV")),
        ("  vocabulary", f"{t['vocabulary']:,} tokens; context {t['context']:,} tokens"),
        ("  on disk", _stored(t)),
        ("  in memory", (f"{_size(t['bytes_in_memory'])} with {t['activation_bits']}-bit activations; "
                         f"one token reads {_size(t['bytes_read_per_token'])}")),
        ("  KV", ", ".join(f"{_size(size)} at {int(n):,} tokens" for n, size in t["kv_bytes_at"].items())),
    ]  # fmt: skip
    if d:
        lines += [
            ("drafter", d["folder"] + (", merged into the target's files" if d["merged"] else "")),
            ("  model", f"{d['model_type']}, {d['parameters'] / 1e6:,.1f} M parameters, {d['stored_as']}"),
            ("  head", d["head"]),
            ("  on disk", _stored(d)),
            ("  in memory", f"{_size(d['bytes_in_memory'])}, one draft reads {_size(d['bytes_read_per_draft'])}"),
            ("  pairing", d["pairing"]),
        ]  # fmt: skip
    else:
        lines.append(("drafter", "none"))
    lines.append(("machine", f"{_size(m['memory'])} for models; {_fits(m, t['context'])}"))
    wired = (
        f"the model's memory while it has rows, at most {_size(m['wired_at_most'])} (macOS 15 or later)"
        if m["wired_at_most"]
        else "nothing: only Macs wire memory"
    )
    lines.append(("  wired", wired))
    if e := facts["expected"]:
        lines.append((f"  on {e['chip']}", _speed(e)))
    for choice in m["choices"]:
        label = f"  {choice['quantize']} bits" if choice["quantize"] else "  unquantised"
        reads = f"one token reads {_size(choice['bytes_read_per_token'])}"
        lines.append((label, f"{_fits(choice, t['context'])}; {reads}"))
    return lines


def _speed(expected: dict[str, Any]) -> str:
    if expected["plain_tps"] is None:
        return "does NOT fit, in its largest configuration"
    plain = f"{speed_range(expected['plain_tps'])} tok/s plain"
    if drafts := expected["draft_length"]:
        drafting = f"{speed_range(expected['drafting_tps'])} with {drafts} drafts a round"
    else:
        drafting = "no gain from drafting" if drafts == 0 else "no drafter"
    return f"{PREDICTED}: {plain}, {drafting}, one row at {expected['context']:,} tokens{HOW_GOOD}"


def speed_range(speeds: list[float]) -> str:
    """A range of tokens per second in words."""
    return "{:.0f} to {:.0f}".format(*speeds)


def _fits(fit: dict[str, Any], context: int) -> str:
    needed, longest = f"{_size(fit['needed'])} needed", fit["longest_context"]
    if longest == context:
        return f"{needed} without KV: fits at full context"
    return f"{needed} without KV: fits up to {longest:,} tokens" if longest else f"{needed}: does NOT fit"
