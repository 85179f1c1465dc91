"""Quantised weights that are learnt from text, by mlx-lm: GPTQ and DWQ.

    gptq   rounds a matrix's columns one after the other; each makes up for the errors of those before it, as far as the
           inputs that the matrix sees on the text allow
    dwq    rounds plainly, then trains the scales, and whatever isn't quantised, until the model predicts on the text
           what the unquantised one predicts

Both need the whole unquantised model in memory. They run on an unquantised conversion, which mlx-lm loads, and only the
values of the new weights are theirs: which matrices are quantised, and how, is the plan's. Mlx-lm's third one, AWQ, has
a table of architectures without Gemma 4's, and hands layers neither per-layer inputs nor the KV that they share.

Mlx-lm is imported when something is learnt, not before.
"""

from __future__ import annotations

import hashlib
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_mtp.checkpoint import sizes
from mlx_mtp.checkpoint.quantization import Format, Scheme
from mlx_mtp.errors import CheckpointError, MemoryBudgetError
from mlx_mtp.files import read_bytes
from mlx_mtp.text.tokenizer import Tokenizer, has_tokenizer

from .plan import FINGERPRINT, Parameter, Plan

METHODS = ("gptq", "dwq")

GPTQ_BITS = (2, 4, 8)
"""What mlx-lm's GPTQ can pack."""

LENGTH = 512
"""Tokens of a sequence of calibration text, mlx-lm's default."""

_SHORTEST, _FEWEST = 32, 8
"""Tokens of a sequence, and sequences, that a calibration text has to have at least: of fewer nothing is learnt."""

_BATCH = 4
"""Sequences at a time; mlx-lm's default for DWQ."""

_RATE = 1e-6
"""Learning rate of DWQ, mlx-lm's default."""

_SEED = 123


@dataclass(frozen=True)
class Learning:
    """How weights are learnt.

    Attributes:
        method: One of METHODS.
        calibration: File with text like that which the model is for.
    """

    method: str
    calibration: Path

    def __post_init__(self) -> None:
        if self.method == "awq":
            raise CheckpointError(
                "mlx-lm's AWQ doesn't support Gemma 4 (its table of architectures has none of them): use gptq or dwq"
            )
        if self.method not in METHODS:
            raise CheckpointError(f"there is no method {self.method!r}: use {' or '.join(METHODS)}")

    def check(self, scheme: Scheme | None) -> None:
        """Checks that the method can quantise so.

        Raises:
            CheckpointError: It can't.
        """
        if scheme is None:
            raise CheckpointError(f"{self.method} quantises: say to how many bits")
        if scheme.common.mode != "affine":
            raise CheckpointError(f"{self.method} has affine quantisation only, not {scheme.common.mode}")
        if self.method == "gptq" and scheme.common.bits not in GPTQ_BITS:
            raise CheckpointError(f"gptq quantises to 2, 4 or 8 bits, not to {scheme.common.bits}: use dwq")
        if self.method == "dwq" and scheme.common.bits == 8:
            raise CheckpointError("dwq trains scales of fewer than 8 bits, and leaves 8 as they are: use gptq or none")

    def planned(self, plan: Plan, scheme: Scheme) -> Plan:
        """A plain conversion's plan, told apart from it.

        Raises:
            CheckpointError: A matrix doesn't fit the groups, or the text can't be read.
        """
        for parameters in plan.files.values():
            for it in parameters:
                if it.format and it.shape[-1] % scheme.common.group_size:
                    raise CheckpointError(
                        f"{self.method} needs all matrices in groups of {scheme.common.group_size}, and {it.name} has "
                        f"{it.shape[-1]} weights a row: take smaller groups"
                    )
        how = f"{plan.fingerprint} {self.method}".encode() + hashlib.sha256(self._text().encode()).digest()
        fingerprint = hashlib.sha256(how).hexdigest()
        ours = plan.config["mlx_mtp"] | {FINGERPRINT: fingerprint}
        return replace(plan, config=plan.config | {"mlx_mtp": ours}, fingerprint=fingerprint)

    def sequences(self, folder: Path) -> mx.array:
        """The text in tokens of a model, int32, [sequences, at most LENGTH].

        Args:
            folder: The model's.

        Raises:
            CheckpointError: The text can't be read or is too short, or the model has no tokenizer.
        """
        if not has_tokenizer(folder):
            raise CheckpointError(f"{folder} has no tokenizer.json: {self.method} needs one to read the text")
        tokens = Tokenizer.from_folder(folder).encode_raw(self._text())
        length = min(LENGTH, len(tokens) // _FEWEST)
        if length < _SHORTEST:
            raise CheckpointError(
                f"{self.calibration} has {len(tokens)} tokens of text: {self.method} needs {_SHORTEST * _FEWEST} at "
                f"least, and more than {LENGTH * 100} for a model of use"
            )
        return mx.array(tokens[: len(tokens) // length * length], dtype=mx.int32).reshape(-1, length)

    def check_memory(self, needed: int) -> None:
        """Checks that an unquantised model of `needed` bytes fits in memory.

        Raises:
            MemoryBudgetError: It doesn't.
        """
        if needed > (have := sizes.memory_for_models()):
            raise MemoryBudgetError(
                f"{self.method} needs the unquantised model in memory, {sizes.format_bytes(needed)}, and models can "
                f"have {sizes.format_bytes(have)} here: convert without --method"
            )

    def _text(self) -> str:
        try:
            return read_bytes(self.calibration).decode()
        except OSError as error:
            raise CheckpointError(f"{self.calibration} can't be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.calibration} is no text in UTF-8: {error}") from error


def learn(plan: Plan, plain: Path, data: mx.array, method: str, common: Format) -> Plan:
    """The plan with the weights that were learnt.

    Args:
        plan: Of a target, quantised.
        plain: Folder with the same target, unquantised.
        data: From `Learning.sequences`.
        method: One of METHODS.
        common: Format of all that has none of its own; with gptq, what has keeps what plain rounding makes of it.

    Raises:
        CheckpointError: Mlx-lm can't load the model.
    """
    with redirect_stdout(sys.stderr):  # mlx-lm reports there
        learnt = (_gptq if method == "gptq" else _dwq)(plan, plain, data, common)

    def with_values(parameter: Parameter) -> Parameter:
        entries = parameter.entries()
        if not all(entry.name in learnt for entry in entries):
            return parameter
        return replace(parameter, values=tuple(learnt[entry.name].astype(entry.dtype) for entry in entries))

    return replace(plan, files={name: list(map(with_values, group)) for name, group in plan.files.items()})


def _load(plain: Path) -> Any:
    from mlx_lm.utils import load_model

    try:
        return load_model(plain, lazy=True)[0]
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"mlx-lm can't load {plain}: {error}; a newer mlx-lm may, or leave out --method"
        ) from error


def _gptq(plan: Plan, plain: Path, data: mx.array, common: Format) -> dict[str, mx.array]:
    from mlx_lm.quant.gptq import gptq_quantize

    model, _ = gptq_quantize(
        _load(plain), data, common.bits, common.group_size,
        fallback_bits=common.bits, fallback_group_size=common.group_size, batch_size=_BATCH,
    )  # fmt: skip
    # Embeddings, which it rounds plainly, and what the plan has in another format are written as ever.
    wanted = {it.name.removesuffix(".weight") for group in plan.files.values() for it in group if it.format == common}
    modules = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    return {
        f"{path}.{name}": value
        for path, module in modules
        if path in wanted and not isinstance(module, nn.QuantizedEmbedding)
        for name, value in module.parameters().items()
    }


def _dwq(plan: Plan, plain: Path, data: mx.array, common: Format) -> dict[str, mx.array]:
    from mlx.optimizers import Adam
    from mlx_lm.quant.dwq import dwq_quantize

    parameters = [it for group in plan.files.values() for it in group]
    formats = {it.name.removesuffix(".weight"): asdict(it.format) for it in parameters if it.format}
    teacher, student = _load(plain), _load(plain)
    nn.quantize(student, class_predicate=lambda path, _: formats.get(path, False))
    samples = [(tokens, 0) for tokens in data.tolist()]
    held_out = max(1, len(samples) // 8)
    dwq_quantize(
        student, lambda batch, *_, split: teacher(batch), Adam(_RATE, bias_correction=True),
        samples[held_out:], samples[:held_out], min(_BATCH, held_out), data.shape[1], _SEED,
        dtype=next(it.dtype for it in parameters if it.name.endswith("norm.weight")),
    )  # fmt: skip
    return dict(tree_flatten(student.parameters()))
