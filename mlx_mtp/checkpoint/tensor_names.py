"""Which stored tensors make up which of our parameters: the names of Gemma 4 checkpoints that are in circulation.

One table for targets and one for drafters. They cover Google's files, conversions by mlx-lm and by mlx-vlm, and
experts that are stacked, stacked in pairs, or one by one. Our own names are Google's without prefix, with experts
stacked under `experts.{gate,up,down}_proj`.

Knows names only: not shapes, files or values.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from ..config import DrafterConfig, TextConfig
from ..errors import CheckpointError

T = TypeVar("T")


@dataclass(frozen=True)
class RenameRule:
    """One row of a table. The first row whose pattern matches a whole name decides what becomes of the tensor.

    Attributes:
        pattern: Regular expression for names without prefix.
        parameter: The parameter's name, with the pattern's groups as in `re.sub`. Two names: its first and second
            half of rows. None: the tensor isn't used. If the pattern has a group `expert`, the tensor is that
            expert's part of the parameter.
        reason: Why it isn't used.
    """

    pattern: str
    parameter: str | tuple[str, str] | None
    reason: str = ""


@dataclass(frozen=True)
class Source:
    """Where one of our parameters comes from.

    Attributes:
        names: Stored tensors: one, or one for each expert, which are to be stacked.
        half: 0 or 1 if it is the first or second half of the stored tensor's rows (axis -2), else None.
        stacked: Whether there is a tensor for each expert.
    """

    names: tuple[str, ...]
    half: int | None = None
    stacked: bool = False

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Our parameter's shape, given those of the stored tensors.

        Raises:
            CheckpointError: Tensors to be stacked differ in shape, or there are no two halves.
        """
        shape = shapes[self.names[0]]
        for name in self.names:
            if shapes[name] != shape:
                raise CheckpointError(f"{name} is {list(shapes[name])}, but {self.names[0]} is {list(shape)}")
        if self.half is not None:
            if len(shape) < 2 or shape[-2] % 2:
                raise CheckpointError(f"{self.names[0]} is {list(shape)}: it can't be cut into gate and up")
            shape = (*shape[:-2], shape[-2] // 2, shape[-1])
        return (len(self.names), *shape) if self.stacked else shape


@dataclass(frozen=True)
class Layout:
    """What becomes of the tensors of a checkpoint.

    Attributes:
        sources: By our name, in the order of the stored ones.
        skipped: Stored names that aren't used, with the reason.
    """

    sources: dict[str, Source]
    skipped: dict[str, str]

    def left_out(self) -> str:
        """How many tensors aren't used and why, in one line; empty if all are."""
        return "; ".join(f"{count} tensors {reason}" for reason, count in Counter(self.skipped.values()).items())


class RenameTable:
    """Rows, ready to be asked.

    Attributes:
        rows: The rows.
    """

    def __init__(self, prefix: str, rows: Iterable[RenameRule]):
        self.rows = tuple(rows)
        self._prefix = re.compile(prefix)
        self._patterns = [re.compile(row.pattern) for row in self.rows]

    def layout(self, stored: Iterable[str]) -> Layout:
        """Sorts the names of a checkpoint. Names that nothing is known of are taken to be ours.

        Raises:
            CheckpointError: Two tensors are the same parameter, an expert is missing, or an adapter isn't merged.
        """
        sources: dict[str, Source] = {}
        experts: dict[str, dict[int, tuple[str, int | None]]] = {}
        skipped: dict[str, str] = {}
        for name in stored:
            if _ADAPTER.search(name):
                raise CheckpointError(
                    f"{name} is part of a LoRA adapter that isn't merged: merge it, or load it as adapter= (--adapter)"
                )
            row, match = self._find(name)
            if row.parameter is None:
                skipped[name] = row.reason
                continue
            expert = match.groupdict().get("expert")
            for parameter, half in _halves(row, match):
                if expert is not None:
                    experts.setdefault(parameter, {})[int(expert)] = (name, half)
                elif parameter in sources:
                    raise CheckpointError(f"{name} and {sources[parameter].names[0]} are the same tensor: one must go")
                else:
                    sources[parameter] = Source((name,), half)
        for parameter, parts in experts.items():
            if parameter in sources:
                raise CheckpointError(
                    f"{sources[parameter].names[0]} holds all experts, but some are stored one by one too"
                )
            if max(parts) >= len(parts):
                missing = next(i for i in range(len(parts)) if i not in parts)
                raise CheckpointError(f"{parameter}: expert {missing} is missing: the download is incomplete")
            names = tuple(parts[i][0] for i in range(len(parts)))
            sources[parameter] = Source(names, parts[0][1], stacked=True)
        return Layout(sources, skipped)

    def modules(self, stored: str) -> tuple[str, ...]:
        """Our names of a module, whose stored name may be anything that its weight could be stored under."""
        row, match = self._find(f"{stored}.weight")
        return tuple(parameter.removesuffix(".weight") for parameter, _ in _halves(row, match)) if row.parameter else ()

    def bare(self, stored: str) -> str:
        """A stored name without what stands before all names, and what fine-tuning leaves in them."""
        return self._prefix.sub("", stored.replace(_LEFT_OVER, "."), count=1)

    def _find(self, stored: str) -> tuple[RenameRule, re.Match[str]]:
        name = self.bare(stored)
        for row, pattern in zip(self.rows, self._patterns, strict=True):
            if match := pattern.fullmatch(name):
                return row, match
        raise AssertionError("the last row matches everything")


def _halves(row: RenameRule, match: re.Match[str]) -> list[tuple[str, int | None]]:
    if isinstance(row.parameter, tuple):
        return [(match.expand(name), half) for half, name in enumerate(row.parameter)]
    assert row.parameter is not None
    return [(match.expand(row.parameter), None)]


VISION_AND_AUDIO = "belong to vision and audio, which a text decoder does without"
MERGED_DRAFTER = "belong to a drafter"

_PREFIX = r"^(?:base_model\.model\.)?(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.)"
_LEFT_OVER = ".base_layer."
"""What PEFT puts into the names of maps with an adapter; like `base_model.model.` it may be left when it is merged."""
_ADAPTER = re.compile(r"\.lora_(?:a|b|A|B|embedding_[AB]|magnitude_vector)(?:\.|$)")
_PART = r"\.(weight|scales|biases)"
_TOWERS = RenameRule(
    r"(?:vision_tower|vision_embedder|embed_vision|audio_tower|embed_audio|multi_modal_projector)\..*",
    None,
    VISION_AND_AUDIO,
)
_MERGED = RenameRule(r"mtp\.(.*)", None, MERGED_DRAFTER)
_UNKNOWN = RenameRule(r"(?s:.*)", r"\g<0>")
_COMPUTED = RenameRule(r".*rotary_emb\..*", None, "are computed from config.json")
_BOUNDS = RenameRule(r".*\.(?:input|output)_(?:min|max)", None, "bound activations, which no text layer does")


def target_table(config: TextConfig) -> RenameTable:
    """The table for a target."""
    rows = [_TOWERS, _MERGED, _COMPUTED, _BOUNDS]
    if config.tied_head:
        rows.append(RenameRule(r"lm_head\..*", None, "repeat the embedding table, which is the output head"))
    if shared := [str(i) for i, layer in enumerate(config.layers) if layer.kv_owner != i]:
        layers = "|".join(shared)
        rows.append(
            RenameRule(
                rf"layers\.(?:{layers})\.self_attn\.(?:k_proj|v_proj|k_norm|v_norm)\..*",
                None,
                "are keys and values of layers that read those of a lower one",
            )
        )
    bank = r"(layers\.\d+\.experts)\.(?:switch_glu\.)?"
    rows += [
        RenameRule(bank + r"gate_up_proj", (r"\1.gate_proj.weight", r"\1.up_proj.weight")),
        RenameRule(bank + r"gate_up_proj" + _PART, (r"\1.gate_proj.\2", r"\1.up_proj.\2")),
        RenameRule(bank + r"(down|gate|up)_proj", r"\1.\2_proj.weight"),
        RenameRule(bank + r"(down|gate|up)_proj" + _PART, r"\1.\2_proj.\3"),
        RenameRule(bank + r"(?P<expert>\d{1,6})\.(down|gate|up)_proj" + _PART, r"\1.\3_proj.\4"),
        _UNKNOWN,
    ]
    return RenameTable(_PREFIX, rows)


def of_vision_or_audio(stored: str) -> bool:
    """Whether a target's tensor of this name can't belong to the text model."""
    return bool(re.fullmatch(_TOWERS.pattern, re.sub(_PREFIX, "", stored, count=1)))


def of_merged_drafter(stored: Mapping[str, T]) -> dict[str, T]:
    """Of a target's tensors those of a drafter that is merged in, under the names they have in a drafter's folder."""
    names = {name: re.fullmatch(_MERGED.pattern, re.sub(_PREFIX, "", name, count=1)) for name in stored}
    return {match[1]: stored[name] for name, match in names.items() if match}


def drafter_table(config: DrafterConfig) -> RenameTable:
    """The table for a drafter."""
    rows = [
        _COMPUTED,
        RenameRule(r"lm_head\..*", None, "repeat the embedding table, which is the output head"),
        RenameRule(
            r"layers\.\d+\.self_attn\.(?:k_proj|v_proj|k_norm|v_norm)\..*",
            None,
            "are keys and values of a drafter, which reads the target's",
        ),
    ]
    if config.num_clusters:
        rows += [
            RenameRule(r"masked_embedding\.(token_ordering|centroids\..*)", r"head.\1"),
            RenameRule(r"embed_tokens\.(.*)", r"head.embedding.\1"),
        ]
    else:
        rows.append(RenameRule(r"masked_embedding\..*", None, "are clusters of a head that config.json says is dense"))
    return RenameTable(r"^model\.", [*rows, _UNKNOWN])


def mlx_lm_name(name: str, multimodal: bool) -> str:
    """Under which name mlx-lm expects a parameter (or module) of a target.

    Args:
        name: Our name.
        multimodal: Whether the config.json has the text model's fields in a `text_config`.
    """
    name = re.sub(r"^(layers\.\d+\.experts)\.", r"\1.switch_glu.", name)
    inner = name if name.startswith("lm_head") else f"model.{name}"
    return f"language_model.{inner}" if multimodal else inner
