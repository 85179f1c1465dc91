"""`mlx-mtp info`: what a model is, what it needs, and whether this machine has it. Reads no weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import options as o

if TYPE_CHECKING:
    from ..names import Table
    from ..quantization import Rule


def info(
    model: o.Model = None,
    drafter: o.Drafter = None,
    no_draft: o.NoDraft = False,
    quantize: o.Quantize = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Shows sizes, memory, pairing, and whether it fits."""
    o.check_loading(drafter, no_draft, quantize)
    facts = describe(model, False if no_draft else drafter, quantize)
    print(json.dumps(facts) if as_json else _table(facts))


def describe(model: str | None, drafter: str | Literal[False] | None, quantize: int | None) -> dict[str, Any]:
    """Facts about a pair, as `mlx-mtp info --json` prints them.

    Raises:
        CheckpointError: A config.json is missing or isn't Gemma 4's, or a weight file is damaged.
    """
    from .. import checkpoint, sizes
    from ..api import find_pair
    from ..config import check_pair, drafter_config, target_config
    from ..errors import PairingError
    from ..names import drafter_table, target_table

    target_folder, drafter_folder = find_pair(model, drafter, weights=False)
    raw = checkpoint.read_json(target_folder / "config.json")
    config = target_config(raw)
    text = config.text
    dtype_bytes, rule = _storage(raw, quantize, target_table(text))
    target = sizes.target_sizes(text, dtype_bytes, rule)
    owners = [layer for i, layer in enumerate(text.layers) if layer.kv_owner == i]
    facts: dict[str, Any] = {
        "target": {
            "folder": str(target_folder),
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
            "stored_as": _stored_as(raw, quantize),
            "bytes_on_disk": _on_disk(target_folder),
            "parameters": target.parameters,
            "bytes_in_memory": target.weights,
            "bytes_read_per_token": target.read_per_token,
            "kv_bytes_per_1000_tokens": sizes.kv_bytes(text, 1000, dtype_bytes),
            "kv_bytes_at_full_context": sizes.kv_bytes(text, text.max_positions, dtype_bytes),
        },
        "drafter": None,
    }
    needed = target.weights
    if drafter_folder is not None:
        raw = checkpoint.read_json(drafter_folder / "config.json")
        config_d = drafter_config(raw)
        own = sizes.drafter_sizes(config_d, *_storage(raw, quantize, drafter_table(config_d)))
        try:
            check_pair(config, config_d)
            pairing = "fits the target"
        except PairingError as error:
            pairing = str(error)
        facts["drafter"] = {
            "folder": str(drafter_folder),
            "model_type": config_d.model_type,
            "head": f"{config_d.num_clusters} clusters" if config_d.num_clusters else "dense",
            "stored_as": _stored_as(raw, quantize),
            "bytes_on_disk": _on_disk(drafter_folder),
            "parameters": own.parameters,
            "bytes_in_memory": own.weights,
            "bytes_read_per_draft": own.read_per_token,
            "pairing": pairing,
        }
        needed += own.weights
    have = sizes.memory_for_models()
    facts["machine"] = {
        "memory": have,
        "needed": needed,
        "needed_at_full_context": needed + facts["target"]["kv_bytes_at_full_context"],
        "fits": needed + facts["target"]["kv_bytes_per_1000_tokens"] <= have,
        "fits_at_full_context": needed + facts["target"]["kv_bytes_at_full_context"] <= have,
    }
    return facts


def _storage(raw: dict[str, Any], quantize: int | None, table: Table) -> tuple[int, Rule | None]:
    """Bytes of an unquantised parameter once loaded here, and how the others are quantised."""
    from .. import checkpoint, quantization

    stored = quantization.stored(raw, table)
    rule = stored.rule() if stored else quantization.Scheme(quantization.Format(quantize)).rule() if quantize else None
    dtype = raw.get("dtype") or raw.get("torch_dtype") or raw.get("text_config", {}).get("dtype")
    return checkpoint.activation_dtype(checkpoint.DTYPES.get(dtype or "", checkpoint.DTYPES["bfloat16"])).size, rule


def _stored_as(raw: dict[str, Any], quantize: int | None) -> str:
    stored = raw.get("quantization") or raw.get("quantization_config")
    if stored:
        return f"{stored.get('bits')} bits, {stored.get('mode', 'affine')}"
    dtype = raw.get("dtype") or raw.get("torch_dtype") or raw.get("text_config", {}).get("dtype") or "unknown type"
    return f"{dtype}, quantised to {quantize} bits while loading" if quantize else str(dtype)


def _on_disk(folder: Path) -> int | None:
    """Bytes of the weight files, after a look at their headers; None where they aren't there."""
    from ..checkpoint import check_safetensors

    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        check_safetensors(path)
    return sum(path.stat().st_size for path in files) or None


def _size(count: int | None) -> str:
    if count is None:
        return "not downloaded"
    for unit, one in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= one:
            return f"{count / one:.2f} {unit}"
    return f"{count} bytes"


def _table(facts: dict[str, Any]) -> str:
    t, d, m = facts["target"], facts["drafter"], facts["machine"]
    experts = f", {t['experts_per_token']} of {t['experts']} experts a token" if t["experts"] else ""
    lines = [
        ("target", t["folder"]),
        ("  model", f"{t['model_type']}, {t['parameters'] / 1e6:,.1f} M parameters, {t['stored_as']}{experts}"),
        ("  layers", f"{t['layers']}: {t['sliding_layers']} sliding over {t['window']} tokens, "
                     f"{t['layers'] - t['sliding_layers']} full; {t['layers_with_kv']} with KV of their own"),
        ("  vocabulary", f"{t['vocabulary']:,} tokens; context {t['context']:,} tokens"),
        ("  on disk", _size(t["bytes_on_disk"])),
        ("  in memory", f"{_size(t['bytes_in_memory'])}, of which one token reads {_size(t['bytes_read_per_token'])}"),
        ("  KV", f"{_size(t['kv_bytes_per_1000_tokens'])} for 1,000 tokens, "
                 f"{_size(t['kv_bytes_at_full_context'])} for the full context"),
    ]  # fmt: skip
    if d:
        lines += [
            ("drafter", d["folder"]),
            ("  model", f"{d['model_type']}, {d['parameters'] / 1e6:,.1f} M parameters, {d['stored_as']}"),
            ("  head", d["head"]),
            ("  on disk", _size(d["bytes_on_disk"])),
            ("  in memory", f"{_size(d['bytes_in_memory'])}, one draft reads {_size(d['bytes_read_per_draft'])}"),
            ("  pairing", d["pairing"]),
        ]  # fmt: skip
    else:
        lines.append(("drafter", "none"))
    fits = "fits" if m["fits_at_full_context"] else "fits, but not at full context" if m["fits"] else "does NOT fit"
    lines.append(("machine", f"{_size(m['memory'])} for models; {_size(m['needed'])} needed without KV, "
                             f"{_size(m['needed_at_full_context'])} at full context: {fits}"))  # fmt: skip
    return "\n".join(f"{name:13}{value}" for name, value in lines)
