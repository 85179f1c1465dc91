"""`mlx-mtp tune`: measures which batch size and draft length suit this machine; --simulate predicts them for a chip."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..decode.objective import OBJECTIVES
from ..errors import MTPError, PromptError
from ..files import parse_json
from ..system.blas import use_openblas
from . import options as o
from . import render
from .tune_tables import simulation, tables

if TYPE_CHECKING:
    from ..checkpoint.quantization import Format
    from ..config import DrafterConfig, TargetConfig, TextConfig
    from ..decode.objective import Objective
    from ..models.drafter import Position
    from ..tuning.choose import Choice, Option
    from ..tuning.costs import Measurement


def tune(
    model: o.Model = None,
    drafter: o.Drafter = None,
    no_draft: o.NoDraft = False,
    adapter: o.Adapter = None,
    quantize: o.Quantize = None,
    quantize_drafter: o.QuantizeDrafter = "auto",
    objective: Annotated[
        str,
        typer.Option(
            help="balanced: most tokens per second in total, while each row keeps half the speed of plain decoding at "
            "batch 1. latency: the fastest single row. throughput: most in total.",
            metavar="balanced|latency|throughput",
        ),
    ] = "balanced",
    batch_sizes: Annotated[str, typer.Option(help="Batch sizes to measure.", metavar="N,N,...")] = "1,2,4,6,8",
    contexts: Annotated[
        str, typer.Option(help="Context lengths in tokens to measure at.", metavar="N,N,...")
    ] = "256,2048",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts to measure acceptance on: .jsonl as for batch, or text with one prompt per line.",
            metavar="FILE",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Plot total and per-row speed by batch size (needs matplotlib).", metavar="FILE.png"),
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="List the saved profiles.")] = False,
    simulate: Annotated[
        str | None,
        typer.Option(
            help="Predict for an Apple chip (such as 'M4 Max') instead of measuring; MODEL is then E2B, E4B, 12B, "
            "26B-A4B (the default) or 31B, a folder or a repository, and --quantize its bits.",
            metavar="CHIP",
        ),
    ] = None,
    as_json: o.Json = False,
    debug: o.Debug = False,  # noqa: ARG001 - `main` reads it
) -> None:
    """Measures a model on this machine, and saves the best batch size and draft length."""
    if objective not in OBJECTIVES:
        raise typer.BadParameter(f"expected {', '.join(OBJECTIVES)}", param_hint="--objective")
    o.check_loading(drafter, no_draft, quantize, quantize_drafter)
    rows, tokens = o.numbers(batch_sizes, "--batch-sizes"), o.numbers(contexts, "--contexts")
    if show:
        _list(as_json)
    elif simulate is not None:
        for option, given in (("--plot", plot), ("--prompts", prompts), ("--adapter", adapter)):
            if given:
                raise typer.BadParameter("nothing is measured with --simulate", param_hint=option)
        loading = drafter, no_draft, quantize, quantize_drafter
        _simulate(simulate, model, *loading, objective, tokens, rows, as_json)
    else:
        if plot:
            from ..tuning.plot import check_plot

            check_plot(plot)
        own = {"yours": _read_prompts(prompts)} if prompts else None
        loading = drafter, no_draft, quantize, quantize_drafter
        _tune(model, *loading, objective, rows, tokens, own, plot, as_json, adapter)


def _tune(
    model: str | None,
    drafter: str | None,
    no_draft: bool,
    quantize: int | None,
    quantize_drafter: str | int,
    objective: str,
    batches: list[int],
    contexts: list[int],
    prompts: dict[str, list[Any]] | None,
    plot: Path | None,
    as_json: bool,
    adapter: str | None,
) -> None:
    with o.load(model, drafter, no_draft, quantize, quantize_drafter, profile=None, adapter=adapter) as lm:
        from .. import profile
        from ..measuring.prompts import PROMPTS
        from ..tuning import acceptance, choose, costs
        from ..tuning.plot import write_plot

        found = costs.Measurement()
        total = costs.points(batches, contexts)
        steps_done = count(1)
        try:
            with render.progress("measuring", total) as done:
                acceptance.measure(
                    lm, found, batches, contexts=contexts, prompts=prompts or PROMPTS,
                    progress=lambda _: done(next(steps_done)),
                )  # fmt: skip
        except KeyboardInterrupt:
            so_far = "partial results" if found.steps or found.acceptance else "nothing was measured yet"
            print(f"\nstopped: {so_far}", file=sys.stderr)
        options = choose.options(found) if found.acceptance or not lm.drafter_config else []
        choices = [choose.choose(options, name) for name in OBJECTIVES] if options else []
        key = profile.key_of(lm.description, lm.drafter_description, lm.adapter)
        saved, failed = None, None
        # A partial measurement never replaces a complete one.
        if options and (found.complete or profile.saved_profile(key) is None):
            chosen = next(choice for choice in choices if choice.objective == objective)
            steps = choose.comparable_steps(found)
            new = profile.Profile(
                key=key,
                costs={rows: choose.prices(steps, rows) for rows in sorted({step.rows for step in steps})},
                acceptance=found.acceptance,
                rows=chosen.option.rows,
                drafts=chosen.option.drafts,
                objective=cast("Objective", objective),
                drafter_position=cast("Position | None", found.drafter_position),
                measured=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            )
            try:
                saved = profile.save_profile(new)
            except OSError as error:  # show the results all the same: measuring took minutes
                failed = error
        if as_json:
            print(json.dumps(facts(found, options, choices, saved, lm.config.text)))
        else:
            render.show(tables(found, options, choices, lm.config.text))
        if saved and not as_json:
            print(f"\nsaved for {objective} in {saved}")
        elif options and not as_json and not failed:
            print("\nnot saved: there is a profile from a complete measurement")
        if plot and options:
            write_plot(options, plot, f"{lm.folder.name} on {profile.device()}")
        if failed:
            raise MTPError(
                f"the profile can't be saved: {o.os_message(failed)}; MLX_MTP_PROFILES can name another folder"
            ) from failed
    if not found.complete:
        raise typer.Exit(o.INTERRUPTED)


def _read_prompts(path: Path) -> list[Any]:
    """The prompts of a file.

    Raises:
        PromptError: The file has no prompts, isn't UTF-8, or a line isn't a prompt.
    """
    try:
        lines = [line for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError:
        raise PromptError(f"{path} isn't UTF-8") from None
    if not lines:
        raise PromptError(f"{path} holds no prompts")
    if path.suffix.lower() != ".jsonl":
        return lines
    found = []
    for number, line in enumerate(lines, 1):
        try:
            prompt = parse_json(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            raise PromptError(f'{path}: line {number} isn\'t a JSON object with "prompt"') from None
        if not isinstance(prompt, str | list) or not prompt:
            raise PromptError(f"{path}: the prompt of line {number} is neither text, messages nor token ids")
        found.append(prompt)
    return found


def facts(
    found: Measurement,
    options: list[Option],
    choices: list[Choice],
    saved: Path | None,
    config: TextConfig,
) -> dict[str, Any]:
    """The measurements and choices as JSON values; `saved` is the profile's file, or None."""
    from ..simulate.cost_model import distinct_experts
    from ..tuning import choose

    parts, measured = choose.split(found.steps), asdict(found)
    for step in measured["steps"]:
        step["uniform_experts"] = {
            width: distinct_experts(config.num_experts, config.experts_per_token, step["rows"] * width)
            for width in step["experts"]
        }
    return {
        "measurement": measured,
        "options": [asdict(option) | {"row_tps": option.row_tps} for option in options],
        "choices": {c.objective: asdict(c.option) | {"row_tps": c.option.row_tps, "why": c.why} for c in choices},
        "verify_split": asdict(parts) if parts else None,
        "timing_anomaly": choose.timing_anomaly(found.steps),
        "profile": str(saved) if saved else None,
    }


def _list(as_json: bool) -> None:
    """Lists the saved profiles."""
    use_openblas()
    from .. import profile

    rows: list[dict[str, Any]] = []
    for saved in profile.saved_profiles():
        row: dict[str, Any] = {"path": str(saved.path), "usable": saved.why_not is None}
        rows.append(row)
        if known := saved.profile:
            row |= {"model": known.key.model, "quantize": known.key.quantize, "drafter": known.key.drafter,
                    "device": known.key.device, "objective": known.objective, "rows": known.rows,
                    "drafts": known.drafts, "measured": known.measured}  # fmt: skip
        if saved.why_not:
            row["why"] = saved.why_not
    if as_json:
        print(json.dumps(rows))
        return
    usable = [row for row in rows if row["usable"]]
    if usable:
        shown = []
        for row in usable:
            stored = f"{row['quantize']} bits" if row["quantize"] else "as stored"
            stored += f", the drafter in {row['drafter']}" if row["drafter"] else ""
            shown.append((
                f"{row['model']} ({stored})", row["device"], str(row["rows"]), str(row["drafts"]), row["objective"],
                row["measured"], row["path"],
            ))  # fmt: skip
        headers = ["model", "device", "batch", "draft length", "objective", "measured", "file"]
        render.show([render.table(headers, shown, left=(0, 1, 4, 5, 6))])
    for row in rows:
        if not row["usable"]:
            print(f"not usable: {row['why']}")
    if not rows:
        print(f"no profiles in {profile.profile_folder()}: mlx-mtp tune saves one", file=sys.stderr)


def _simulate(
    chip: str,
    model: str | None,
    drafter: str | None,
    no_draft: bool,
    quantize: int | None,
    quantize_drafter: str | int,
    objective: str,
    contexts: list[int],
    batches: list[int],
    as_json: bool,
) -> None:
    """Prints a prediction for each context, as tables or JSON.

    Raises:
        typer.BadParameter: The chip or the size is unknown (the message lists the known ones), or a context is too
            long for the model.
    """
    from ..checkpoint.drafter_precision import drafter_format
    from ..checkpoint.quantization import Format
    from ..simulate import chips, cost_model, known_models, report

    name = model or "26B-A4B"
    own_drafter: DrafterConfig | None
    try:
        machine = chips.chip(chip)
    except MTPError as error:
        raise typer.BadParameter(str(error), param_hint="--simulate") from None
    if "/" in name or Path(name).is_dir():
        target, own_drafter, how, drafter_how = _configs(name, drafter, no_draft, quantize, quantize_drafter)
    else:
        try:
            target, own_drafter = known_models.known_pair(name)
        except MTPError as error:
            raise typer.BadParameter(str(error), param_hint="MODEL") from None
        if drafter:
            raise typer.BadParameter(
                "a size has its own drafter: give a folder or repository as MODEL", param_hint="--drafter"
            )
        how = Format(quantize) if quantize else None
        drafter_how = drafter_format(own_drafter, how, bool(quantize), quantize_drafter)
    pair = cost_model.pair(target, None if no_draft else own_drafter, how, drafter_how)
    if max(contexts) > (longest := pair.target.max_positions):
        raise typer.BadParameter(f"the model's context is {longest:,} tokens", param_hint="--contexts")
    if as_json:
        predicted = [report.simulation_facts(machine, pair, context, batches, objective) for context in contexts]
        bits = how.bits if how else None
        about = {"predicted": True, "chip": machine.name, "model": name, "bits": bits, "objective": objective}
        accepted = list(cost_model.PUBLISHED_ACCEPTANCE) if pair.drafter else []
        print(json.dumps({**about, "acceptance": accepted, "contexts": predicted}))
        return
    for i, context in enumerate(contexts):
        parts = simulation(machine, name, pair, context, batches=batches, objective=objective)
        render.show(["", *parts] if i else parts)


def _configs(
    model: str, drafter: str | None, no_draft: bool, quantize: int | None, quantize_drafter: str | int
) -> tuple[TargetConfig, DrafterConfig | None, Format | None, Format | None]:
    """The configs of a folder's or repository's target and drafter, and the formats of both."""
    from ..checkpoint.pair import find_pair

    target, own = find_pair(
        model, False if no_draft else drafter, quantize, quantize_drafter=quantize_drafter, weights=False
    )
    return target.config, own.config if own else None, target.format, own.format if own else None
