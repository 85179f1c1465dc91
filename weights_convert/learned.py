"""Learns quantised weights from a calibration text with mlx-lm: GPTQ or DWQ.

    gptq   rounds the columns of a matrix one after the other; each compensates for the errors of the earlier ones on
           the inputs that the matrix gets from the text
    dwq    rounds to nearest, then trains the scales and the unquantised parameters, so that the model predicts on the
           text what the unquantised model predicts

Both need the whole unquantised model in memory. mlx-lm loads an unquantised conversion and learns the values of the new
weights; the plan decides which matrices are quantised, and in which format. mlx-lm's AWQ isn't offered: its table of
architectures lacks Gemma 4's, and it passes layers neither per-layer inputs nor shared KV.

mlx-lm is imported only when weights are learnt.
"""

from __future__ import annotations

import hashlib
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

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
"""Bits that mlx-lm's GPTQ can pack."""

LENGTH = 512
"""Tokens in a sequence of calibration text; mlx-lm's default."""

_SHORTEST, _FEWEST = 32, 8
"""Fewest tokens in a sequence, and fewest sequences; a shorter calibration text is refused."""

_BATCH = 4
"""Batch size in sequences; mlx-lm's default for DWQ."""

_RATE = 1e-6
"""Learning rate of DWQ; mlx-lm's default."""

_SEED = 123


@dataclass(frozen=True)
class Learning:
    """How weights are learnt.

    Attributes:
        method: One of METHODS.
        calibration: UTF-8 file with text similar to the model's use.

    Raises:
        CheckpointError: There is no such method.
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
        """Checks that the method can learn weights in a scheme's common format.

        Raises:
            CheckpointError: It can't; the message says why.
        """
        if scheme is None:
            raise CheckpointError(f"{self.method} quantises: give the number of bits")
        if scheme.common.mode != "affine":
            raise CheckpointError(f"{self.method} supports affine quantisation only, not {scheme.common.mode}")
        if self.method == "gptq" and scheme.common.bits not in GPTQ_BITS:
            raise CheckpointError(f"gptq quantises to 2, 4 or 8 bits, not to {scheme.common.bits}: use dwq")
        if self.method == "dwq" and scheme.common.bits == 8:
            raise CheckpointError("dwq learns nothing at 8 bits: use fewer bits, gptq or no method")

    def planned(self, plan: Plan, scheme: Scheme) -> Plan:
        """A plan with a fingerprint that depends on the method and the text.

        Raises:
            CheckpointError: A matrix isn't divisible into groups, or the text can't be read.
        """
        for parameters in plan.files.values():
            for it in parameters:
                if it.format and it.shape[-1] % scheme.common.group_size:
                    raise CheckpointError(
                        f"{self.method} needs all matrices in groups of {scheme.common.group_size}, and {it.name} has "
                        f"{it.shape[-1]} weights per row: use smaller groups"
                    )
        how = f"{plan.fingerprint} {self.method}".encode() + hashlib.sha256(self._text().encode()).digest()
        fingerprint = hashlib.sha256(how).hexdigest()
        ours = plan.config["mlx_mtp"] | {FINGERPRINT: fingerprint}
        return replace(plan, config=plan.config | {"mlx_mtp": ours}, fingerprint=fingerprint)

    def sequences(self, folder: Path) -> mx.array:
        """The tokenized text, int32 [sequences, length] with length at most LENGTH.

        Args:
            folder: A folder with the model's tokenizer.

        Raises:
            CheckpointError: The text can't be read or is too short, or the model has no tokenizer.
        """
        if not has_tokenizer(folder):
            raise CheckpointError(f"{folder} has no tokenizer.json: {self.method} needs one to read the text")
        tokens = Tokenizer.from_folder(folder).encode_raw(self._text())
        length = min(LENGTH, len(tokens) // _FEWEST)
        if length < _SHORTEST:
            raise CheckpointError(
                f"{self.calibration} has {len(tokens)} tokens of text: {self.method} needs at least "
                f"{_SHORTEST * _FEWEST}, and more than {LENGTH * 100} for a good result"
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
            raise CheckpointError(f"{self.calibration} isn't UTF-8 text: {error}") from error


def learn(plan: Plan, plain: Path, data: mx.array, method: str, common: Format) -> Plan:
    """A plan with learnt values.

    Args:
        plan: Plan of a quantised target.
        plain: Folder with an unquantised conversion of the same target.
        data: Token ids from `Learning.sequences`.
        method: One of METHODS.
        common: The scheme's common format. gptq learns only matrices of this format; others are rounded to nearest.

    Raises:
        CheckpointError: mlx-lm can't load the model.
    """
    with redirect_stdout(sys.stderr):  # mlx-lm prints its progress
        learnt = _gptq(plan, plain, data, common) if method == "gptq" else _dwq(plan, plain, data)

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
    # GPTQ rounds embeddings to nearest, and knows one format only: the rest is converted as without it.
    wanted = {it.name.removesuffix(".weight") for group in plan.files.values() for it in group if it.format == common}
    modules = dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
    return {
        f"{path}.{name}": value
        for path, module in modules.items()
        if path in wanted and not isinstance(module, nn.QuantizedEmbedding)
        for name, value in module.parameters().items()
    }


def _dwq(plan: Plan, plain: Path, data: mx.array) -> dict[str, mx.array]:
    from mlx.optimizers import Adam
    from mlx_lm.quant.dwq import dwq_quantize

    parameters = [it for group in plan.files.values() for it in group]
    formats = {it.name.removesuffix(".weight"): asdict(it.format) for it in parameters if it.format}
    teacher, student = _load(plain), _load(plain)
    nn.quantize(student, class_predicate=lambda path, _: formats.get(path, False))
    samples = [(tokens, 0) for tokens in cast("list[list[int]]", data.tolist())]

    def predict(batch: mx.array, *_: Any, split: str) -> Any:  # noqa: ARG001 - dwq_quantize names it
        return teacher(batch)

    held_out = max(1, len(samples) // 8)
    dwq_quantize(
        student, predict, Adam(_RATE, bias_correction=True),
        samples[held_out:], samples[:held_out], min(_BATCH, held_out), data.shape[1], _SEED,
        dtype=next(it.dtype for it in parameters if it.name.endswith("norm.weight")),
    )  # fmt: skip
    return dict(tree_flatten(student.parameters()))
