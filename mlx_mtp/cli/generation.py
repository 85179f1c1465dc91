"""The options of every command that generates, each spelt once for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from ..decode.limits import MAX_AUTO_LENGTH, MAX_DRAFT_LENGTH, MAX_TEMPERATURE
from ..files import parse_json
from ..system.blas import use_openblas


def _inverted(flag: bool) -> bool:
    return not flag


def _draft_length(value: str) -> str | int:
    if value == "auto":
        return value
    if not value.isdecimal() or int(value) > MAX_DRAFT_LENGTH:
        raise typer.BadParameter(f"expected auto or a number from 0 to {MAX_DRAFT_LENGTH}")
    return int(value)


def _ids(value: str) -> list[int]:
    try:
        return [int(token) for token in value.split(",")]
    except ValueError:
        raise typer.BadParameter("expected token ids, separated by commas") from None


def _bias(value: str) -> dict[int, float]:
    try:
        pairs = [pair.split("=") for pair in value.split(",")]
        return {int(token): float(bias) for token, bias in pairs}
    except ValueError:
        raise typer.BadParameter("expected TOKEN=NUMBER, separated by commas") from None


def _response_format(value: str) -> dict[str, Any]:
    if value == "json":
        return {"type": "json_object"}
    if value.startswith("regex:"):
        return {"type": "regex", "pattern": value.removeprefix("regex:")}
    if value.endswith(".json"):
        return {"type": "json_schema", "json_schema": {"schema": json_file(value)}}
    if value.endswith(".lark"):
        return {"type": "grammar", "grammar": _text(value)}
    raise typer.BadParameter("expected json, regex:PATTERN, a JSON schema's FILE.json or a grammar's FILE.lark")


def json_file(path: str) -> Any:
    """Reads a JSON file for an option.

    Raises:
        typer.BadParameter: It can't be read, or isn't JSON.
    """
    try:
        return parse_json(_text(path))
    except ValueError as error:
        raise typer.BadParameter(f"{path} isn't JSON: {error}") from None


def _text(path: str) -> str:
    try:
        return Path(path).expanduser().read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise typer.BadParameter(f"{path} isn't UTF-8") from None
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from None


@dataclass
class SharedOptions:
    """The options of every command that generates; names and meaning are those of `GenerationOptions`."""

    draft_length: Annotated[
        Any,
        typer.Option(help="Tokens to draft in a round; 0 for plain decoding.", metavar="auto|N", parser=_draft_length),
    ] = "auto"
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.", min=1, metavar="N")] = 256
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 is greedy. Default of this and the next three: the model's.",
            min=0,
            max=MAX_TEMPERATURE,
            metavar="T",
        ),
    ] = None
    top_k: Annotated[
        int | None, typer.Option(help="Sample only from the K most probable tokens; 0 for all.", min=0, metavar="K")
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample only from the best tokens that together reach this probability.", min=0.001, max=1, metavar="P"
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Sample only from tokens with at least this share of the best one's probability.",
            min=0,
            max=1,
            metavar="P",
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(help="The same seed gives the same text. Default: a new one each time.", metavar="N"),
    ] = None
    sanitize: Annotated[
        bool,
        typer.Option(
            "--no-sanitize", help="Encode special tokens' names in the text as special tokens.", callback=_inverted
        ),
    ] = False  # that of the flag; the callback makes it True
    exactness: Annotated[
        str,
        typer.Option(
            help="fast: the choices of the verify pass. invariant: the same text at any draft length on any device. "
            "stepwise: bit for bit plain decoding, and no faster.",
            metavar="fast|invariant|stepwise",
        ),
    ] = "fast"

    repetition_penalty: Annotated[
        float, typer.Option(help="Makes tokens of the prompt and the text less likely, above 1.", metavar="R")
    ] = 1.0
    presence_penalty: Annotated[
        float, typer.Option(help="Subtracted from the logits of tokens that the text has.", metavar="P")
    ] = 0.0
    frequency_penalty: Annotated[
        float, typer.Option(help="Subtracted from a token's logit for each time that the text has it.", metavar="F")
    ] = 0.0
    logit_bias: Annotated[
        Any, typer.Option(help="Added to logits, by token id.", metavar="TOKEN=NUMBER,...", parser=_bias)
    ] = None
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: log-probabilities, of N other tokens too.", min=0, max=20, metavar="N"),
    ] = None
    stop_token_ids: Annotated[
        Any, typer.Option(help="Further token ids that end the text.", metavar="TOKEN,...", parser=_ids)
    ] = None
    response_format: Annotated[
        Any,
        typer.Option(
            help="What the answer must be: json, regex:PATTERN, a JSON schema (FILE.json) or a grammar (FILE.lark).",
            metavar="FORMAT",
            parser=_response_format,
        ),
    ] = None
    thinking_budget: Annotated[int | None, typer.Option(help="Most tokens of thought.", min=0, metavar="N")] = None
    prediction: Annotated[
        Any,
        typer.Option(help="What most of the text is expected to be, to draft from.", metavar="FILE", parser=_text),
    ] = None

    def __post_init__(self) -> None:
        """Checks values that typer can't check.

        Raises:
            typer.BadParameter: Exit code 2.
        """
        if self.exactness not in ("fast", "invariant", "stepwise"):
            raise typer.BadParameter("expected fast, invariant or stepwise", param_hint="--exactness")
        if self.repetition_penalty <= 0:
            raise typer.BadParameter("expected a number above 0", param_hint="--repetition-penalty")
        fixed = isinstance(self.draft_length, int)
        if self.exactness == "invariant" and fixed and self.draft_length > MAX_AUTO_LENGTH:
            raise typer.BadParameter(
                f"with --exactness invariant at most {MAX_AUTO_LENGTH}", param_hint="--draft-length"
            )


def generating(max_tokens: int = 256) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command that generates.

    The command takes `generation: GenerationOptions`; its command line has the options of `SharedOptions` there.

    Args:
        max_tokens: The command's default of --max-tokens.
    """
    annotations = inspect.get_annotations(SharedOptions, eval_str=True)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        shared = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=max_tokens if field.name == "max_tokens" else field.default,
                annotation=annotation,
            )
            for field, annotation in zip(fields(SharedOptions), annotations.values(), strict=True)
        ]
        # The module of `GenerationOptions` imports MLX, so the name can't be looked up here.
        signature = inspect.signature(command, locals={"GenerationOptions": object}, eval_str=True)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            own = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            parameters += shared if parameter.name == "generation" else [own]

        def run(**given: Any) -> None:
            checked = SharedOptions(**{parameter.name: given.pop(parameter.name) for parameter in shared})
            use_openblas()  # before MLX is imported
            from ..session.options import GenerationOptions

            command(**given, generation=GenerationOptions(**vars(checked)))

        # typer reads these.
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # functions may have one
        return run

    return decorate
