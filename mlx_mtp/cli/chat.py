"""`mlx-mtp chat`: a conversation in the terminal, or over a pipe."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as o
from .chatting import commands
from .chatting.lines import Lines, Reader
from .chatting.screen import can_move, screen
from .chatting.settings import Settings
from .chatting.store import Store
from .chatting.talk import Talk
from .generation import generating

if TYPE_CHECKING:
    from ..session.options import GenerationOptions


@generating(max_tokens=2048)
def chat(
    context: typer.Context,
    model: o.Model = None,
    drafter: o.Drafter = None,
    no_draft: o.NoDraft = False,
    adapter: o.Adapter = None,
    *,
    generation: GenerationOptions,
    stop: o.Stop = None,
    system: o.System = None,
    think: o.Think = False,
    thoughts: Annotated[bool, typer.Option("--thoughts", help="Show the model's thoughts, dimmed.")] = False,
    show_drafts: Annotated[
        bool, typer.Option("--show-drafts", help="Show tokens that came from drafts in another shade.")
    ] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Show Markdown as it was written.")] = False,
    n: Annotated[
        int, typer.Option("--n", help="Answers to each message, to pick from.", min=1, max=commands.MOST_ANSWERS)
    ] = 1,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the last conversation.")] = False,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Keep neither entries nor conversations for later sessions.")
    ] = False,
    quantize: o.Quantize = None,
    quantize_drafter: o.QuantizeDrafter = "auto",
    trace: o.TraceFile = None,
    debug: o.Debug = False,  # noqa: ARG001 - `main` reads it
) -> None:
    """Chats with a model; /help lists the commands."""
    o.check_stop(stop)
    if resume and no_history:
        raise typer.BadParameter("--no-history keeps nothing to resume", param_hint="--resume")
    generation = generation.updated({"stop": stop})
    settings = Settings(context, generation)
    store = None if no_history else Store()
    shown = screen(markdown=not plain)
    if shown.styled:
        shown.thoughts, shown.drafts = thoughts, show_drafts
    with o.load(model, drafter, no_draft, quantize, quantize_drafter, adapter=adapter) as lm, o.tracing(lm, trace):
        name = "the embedded demo pair" if model is None else model
        shown.note(f"{name}{'' if lm.drafter_config else ', without a drafter'}; /help lists commands")
        conversation = lm.chat(system, think, rolling=True)
        tokenizer = lm.tokenizer
        assert tokenizer is not None  # or there would be no conversation
        talk = Talk(
            conversation,
            generation,
            settings,
            _reader(store, settings),
            shown,
            store,
            n,
            lambda text: len(tokenizer.encode(text)),
            lm.config.text.max_positions,
        )
        if resume:
            commands.resume(talk)
            conversation.system = system or conversation.system
        talk.run()


def _reader(store: Store | None, settings: Settings) -> Reader:
    """The best reader for this process's streams."""
    if not (sys.stdin.isatty() and sys.stdout.isatty() and can_move()):
        return Lines()
    from .chatting.editor import Editor  # takes a while to import

    history = None
    if store:
        try:
            history = store.history()
        except OSError as error:
            print(f"the history isn't kept: {o.os_message(error)}", file=sys.stderr)
    return Editor(history, [*commands.COMMANDS, "/quit"], settings.names)
