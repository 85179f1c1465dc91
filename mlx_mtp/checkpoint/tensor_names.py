"""Names of tensors: which stored tensors make up which of a model's parameters, in all known Gemma 4 checkpoints.

There is one table for targets and one for drafters. They cover Google's files, conversions by mlx-lm and by mlx-vlm,
and experts that are stacked, stacked with gate and up in one tensor, or stored one by one. The models' parameters have
Google's names without prefix, with experts stacked under `experts.{gate,up,down}_proj`.

Not here: shapes, files and values.
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
    """A rule of a `RenameTable`. The first rule whose pattern matches the whole name applies to a tensor.

    Attributes:
        pattern: Regular expression for names without prefix. If it has a group `expert`, the tensor is that expert's
            part of the parameter.
        parameter: The parameter's name, with the pattern's groups as in `re.sub`. Two names if the first half of the
            tensor's rows is one parameter and the second half another. None if the tensor isn't used.
        reason: Why the tensor isn't used.
    """

    pattern: str
    parameter: str | tuple[str, str] | None
    reason: str = ""


@dataclass(frozen=True)
class Source:
    """The stored tensors that make up a parameter.

    Attributes:
        names: Names of the stored tensors: one, or one for each expert.
        half: 0 or 1 if the parameter is the first or second half of the stored rows (axis -2); None if it is all.
        stacked: Whether the tensors of all experts are stacked.
    """

    names: tuple[str, ...]
    half: int | None = None
    stacked: bool = False

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The parameter's shape.

        Args:
            shapes: Shapes of the stored tensors by name.

        Raises:
            CheckpointError: The experts' tensors differ in shape, or a tensor can't be split in halves.
        """
        shape = shapes[self.names[0]]
        for name in self.names:
            if shapes[name] != shape:
                raise CheckpointError(f"{name} is {list(shapes[name])}, but {self.names[0]} is {list(shape)}")
        if self.half is not None:
            if len(shape) < 2 or shape[-2] % 2:
                raise CheckpointError(f"{self.names[0]} is {list(shape)}: it can't be split into gate and up")
            shape = (*shape[:-2], shape[-2] // 2, shape[-1])
        return (len(self.names), *shape) if self.stacked else shape


@dataclass(frozen=True)
class Layout:
    """How the tensors of a checkpoint are used.

    Attributes:
        sources: By parameter name, the stored tensors; in the order of the stored names.
        skipped: By stored name, why a tensor isn't used.
    """

    sources: dict[str, Source]
    skipped: dict[str, str]

    def left_out(self) -> str:
        """How many tensors aren't used and why, in one line; empty if all are."""
        return "; ".join(f"{count} tensors {reason}" for reason, count in Counter(self.skipped.values()).items())


class RenameTable:
    """Maps the names of stored tensors to parameters.

    Attributes:
        rules: The rules, in order; the last one matches every name.
    """

    def __init__(self, prefix: str, rules: Iterable[RenameRule]) -> None:
        """Makes a table.

        Args:
            prefix: Regular expression of the prefix to remove from names before the rules apply.
            rules: The rules, in order; the last one must match every name.
        """
        self.rules = tuple(rules)
        self._prefix = re.compile(prefix)
        self._patterns = [re.compile(rule.pattern) for rule in self.rules]

    def layout(self, stored: Iterable[str]) -> Layout:
        """Assigns the tensors of a checkpoint to parameters; unknown names stay as they are.

        Args:
            stored: The names of the stored tensors.

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
            rule, match = self._find(name)
            if rule.parameter is None:
                skipped[name] = rule.reason
                continue
            expert = match.groupdict().get("expert")
            for parameter, half in _halves(rule, match):
                if expert is not None:
                    experts.setdefault(parameter, {})[int(expert)] = (name, half)
                elif parameter in sources:
                    raise CheckpointError(
                        f"{name} and {sources[parameter].names[0]} are the same tensor: delete one of them"
                    )
                else:
                    sources[parameter] = Source((name,), half)
        for parameter, parts in experts.items():
            if parameter in sources:
                raise CheckpointError(
                    f"{sources[parameter].names[0]} has all experts, but some are stored one by one as well: delete "
                    "either"
                )
            sources[parameter] = _stacked(parameter, parts)
        return Layout(sources, skipped)

    def modules(self, stored: str) -> tuple[str, ...]:
        """The paths of a module in the model, by the name that it has in a checkpoint; () if it isn't used."""
        rule, match = self._find(f"{stored}.weight")
        if not rule.parameter:
            return ()
        return tuple(parameter.removesuffix(".weight") for parameter, _ in _halves(rule, match))

    def bare(self, stored: str) -> str:
        """A stored name without prefix, and without the parts that a merged adapter has left in it."""
        return self._prefix.sub("", stored.replace(_LEFT_OVER, "."), count=1)

    def _find(self, stored: str) -> tuple[RenameRule, re.Match[str]]:
        name = self.bare(stored)
        for rule, pattern in zip(self.rules, self._patterns, strict=True):
            if match := pattern.fullmatch(name):
                return rule, match
        raise AssertionError("the last rule matches everything")


def _stacked(parameter: str, parts: Mapping[int, tuple[str, int | None]]) -> Source:
    """The source of a parameter whose experts are stored one by one, given by their numbers."""
    if max(parts) >= len(parts):
        missing = next(i for i in range(len(parts)) if i not in parts)
        raise CheckpointError(f"{parameter}: expert {missing} is missing: the download is incomplete")
    return Source(tuple(parts[i][0] for i in range(len(parts))), parts[0][1], stacked=True)


def _halves(rule: RenameRule, match: re.Match[str]) -> list[tuple[str, int | None]]:
    if isinstance(rule.parameter, tuple):
        return [(match.expand(name), half) for half, name in enumerate(rule.parameter)]
    assert rule.parameter is not None
    return [(match.expand(rule.parameter), None)]


VISION_AND_AUDIO = "belong to vision and audio, which this text decoder doesn't have"
MERGED_DRAFTER = "belong to a drafter"

_PREFIX = r"^(?:base_model\.model\.)?(?:model\.language_model\.|language_model\.model\.|language_model\.|model\.)"
_LEFT_OVER = ".base_layer."
"""PEFT adds this to the names of layers with an adapter; like `base_model.model.` it may remain after merging."""
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
_BOUNDS = RenameRule(r".*\.(?:input|output)_(?:min|max)", None, "are bounds of activations, which text layers lack")


def target_table(config: TextConfig) -> RenameTable:
    """The table of a target with this config."""
    rules = [_TOWERS, _MERGED, _COMPUTED, _BOUNDS]
    if config.tied_head:
        rules.append(RenameRule(r"lm_head\..*", None, "repeat the embedding table, which is the output head"))
    if shared := [str(i) for i, layer in enumerate(config.layers) if layer.kv_owner != i]:
        layers = "|".join(shared)
        rules.append(
            RenameRule(
                rf"layers\.(?:{layers})\.self_attn\.(?:k_proj|v_proj|k_norm|v_norm)\..*",
                None,
                "are keys and values of layers that use another layer's",
            )
        )
    bank = r"(layers\.\d+\.experts)\.(?:switch_glu\.)?"
    rules += [
        RenameRule(bank + r"gate_up_proj", (r"\1.gate_proj.weight", r"\1.up_proj.weight")),
        RenameRule(bank + r"gate_up_proj" + _PART, (r"\1.gate_proj.\2", r"\1.up_proj.\2")),
        RenameRule(bank + r"(down|gate|up)_proj", r"\1.\2_proj.weight"),
        RenameRule(bank + r"(down|gate|up)_proj" + _PART, r"\1.\2_proj.\3"),
        RenameRule(bank + r"(?P<expert>\d{1,6})\.(down|gate|up)_proj" + _PART, r"\1.\3_proj.\4"),
        _UNKNOWN,
    ]
    return RenameTable(_PREFIX, rules)


def of_vision_or_audio(stored: str) -> bool:
    """Whether a target's tensor belongs to vision or audio, by its stored name."""
    return bool(re.fullmatch(_TOWERS.pattern, re.sub(_PREFIX, "", stored, count=1)))


def of_merged_drafter(stored: Mapping[str, T]) -> dict[str, T]:
    """The tensors of a drafter that is merged into a target.

    Args:
        stored: The target's tensors, or anything else, by stored name.

    Returns:
        Those of the drafter, under the names that they would have in a drafter's own folder.
    """
    names = {name: re.fullmatch(_MERGED.pattern, re.sub(_PREFIX, "", name, count=1)) for name in stored}
    return {match[1]: stored[name] for name, match in names.items() if match}


def drafter_table(config: DrafterConfig) -> RenameTable:
    """The table of a drafter with this config."""
    rules = [
        _COMPUTED,
        RenameRule(r"lm_head\..*", None, "repeat the embedding table, which is the output head"),
        RenameRule(
            r"layers\.\d+\.self_attn\.(?:k_proj|v_proj|k_norm|v_norm)\..*",
            None,
            "are keys and values of a drafter, which uses the target's",
        ),
    ]
    if config.num_clusters:
        rules += [
            RenameRule(r"masked_embedding\.(token_ordering|centroids\..*)", r"head.\1"),
            RenameRule(r"embed_tokens\.(.*)", r"head.embedding.\1"),
        ]
    else:
        rules.append(RenameRule(r"masked_embedding\..*", None, "are clusters, but config.json says the head is dense"))
    return RenameTable(r"^model\.", [*rules, _UNKNOWN])


def mlx_lm_name(name: str, multimodal: bool) -> str:
    """The name of a target's parameter or module in mlx-lm's conversions.

    Args:
        name: The parameter's name here.
        multimodal: Whether config.json has the text model's fields in a `text_config`.
    """
    name = re.sub(r"^(layers\.\d+\.experts)\.", r"\1.switch_glu.", name)
    inner = name if name.startswith("lm_head") else f"model.{name}"
    return f"language_model.{inner}" if multimodal else inner
