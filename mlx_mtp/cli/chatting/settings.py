"""/set: options of the generation, with the names, values and checks of the command line."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import typer

from ...errors import MTPError
from ..generation import SharedOptions

if TYPE_CHECKING:
    from ...session.options import GenerationOptions

_POINTLESS = {"logprobs", "sanitize"}
"""Options that change nothing one sees in a chat, or that one decides at the start."""


class Settings:
    """Changes the options of a generation as the command line would."""

    def __init__(self, context: typer.Context, start: GenerationOptions) -> None:
        """Takes the command's options.

        Args:
            context: That of the running command.
            start: What the command line gave.
        """
        self._context, self._start = context, start
        names = {field.name for field in fields(SharedOptions)} - _POINTLESS | {"stop"}
        self._options: dict[str, Any] = {it.name: it for it in context.command.params if it.name in names}
        self.names = sorted(self._options)

    def changed(self, options: GenerationOptions, name: str, value: str) -> GenerationOptions:
        """Options with one value replaced.

        Args:
            options: The options so far.
            name: An option, as `GenerationOptions` or the command line spells it.
            value: Its value as text; "default" for that of the command line.

        Raises:
            MTPError: There is no such option, or the value can't be used.
        """
        name = name.removeprefix("--").replace("-", "_")
        option = self._options.get(name)
        if option is None:
            raise MTPError(f"there is no option {name}: use one of {', '.join(self.names)}")
        if value == "default":
            return options.updated({name: getattr(self._start, name)})
        try:
            parsed = option.process_value(self._context, [value] if option.multiple else value)
        except typer.BadParameter as error:
            raise MTPError(f"{name}: {error.message}") from None
        return options.updated({name: parsed})
