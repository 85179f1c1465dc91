"""`mlx-mtp tune`: which batch and draft length suit this machine.

With --simulate, what is to be expected of another one.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MTPError, ProfileError, PromptError
from ..files import listed, parse_json
from ..tuning import OBJECTIVES
from . import options as o

if TYPE_CHECKING:
    from ..checkpoint.quantization import Format
    from ..config import DrafterConfig, TargetConfig, TextConfig
    from ..tuning.choose import Choice, Option
    from ..tuning.measure import Measurement


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
            help="balanced: most tokens a second in all while a row keeps half of plain decoding alone. latency: the "
            "fastest single row. throughput: most in all.",
            metavar="balanced|latency|throughput",
        ),
    ] = "balanced",
    batch_sizes: Annotated[str, typer.Option(help="Batches to measure.", metavar="N,N,...")] = "1,2,4,6,8",
    contexts: Annotated[
        str, typer.Option(help="Context lengths in tokens to measure at.", metavar="N,N,...")
    ] = "256,2048",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts to measure acceptance on: .jsonl as for batch, or text, one a line.", metavar="FILE"
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw total and per-row speed by batch (needs matplotlib).", metavar="FILE.png")
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Show the profiles there are.")] = False,
    simulate: Annotated[
        str | None,
        typer.Option(
            help="Predict for an Apple chip (such as 'M4 Max') instead of measuring; MODEL is then E2B, E4B, 12B, "
            "26B-A4B (the default) or 31B, a folder or a repository, and --quantize its bits.",
            metavar="CHIP",
        ),
    ] = None,
    as_json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Measures this machine with a model, and saves what suits it: batch and draft length."""
    if objective not in OBJECTIVES:
        raise typer.BadParameter(f"expected {', '.join(OBJECTIVES)}", param_hint="--objective")
    o.check_loading(drafter, no_draft, quantize, quantize_drafter)
    rows, tokens = _numbers(batch_sizes, "--batch-sizes"), _numbers(contexts, "--contexts")
    if show:
        _list(as_json)
    elif simulate is not None:
        for option, given in (("--plot", plot), ("--prompts", prompts), ("--adapter", adapter)):
            if given:
                raise typer.BadParameter("nothing is measured with --simulate", param_hint=option)
        loading = drafter, no_draft, quantize, quantize_drafter
        print(_simulation(simulate, model, *loading, objective, tokens, rows, as_json))
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
        from ..tuning import choose, measure, profile
        from ..tuning.plot import write_plot

        found = measure.Measurement()
        total = measure.points(batches, contexts)
        with typer.progressbar(length=total, file=sys.stderr, label="measuring") as bar:
            try:
                measure.measure(
                    lm, found, batches, contexts=contexts, prompts=prompts or measure.PROMPTS,
                    progress=lambda _: bar.update(1),
                )  # fmt: skip
            except KeyboardInterrupt:
                any_yet = found.steps or found.acceptance
                so_far = "this is from what was measured so far" if any_yet else "nothing was measured yet"
                print(f"\nstopped: {so_far}", file=sys.stderr)
        options = choose.options(found) if found.acceptance or not lm.drafter_config else []
        choices = [choose.choose(options, name) for name in OBJECTIVES] if options else []
        key = profile.key_of(lm.description, lm.drafter_description, lm.adapter)
        saved, failed = None, None
        # What an interruption has left is better than nothing, but not than a whole measurement.
        if options and (found.complete or profile.find(key) is None):
            chosen = next(choice for choice in choices if choice.objective == objective)
            steps = choose.counted(found)
            new = profile.Profile(
                key=key,
                costs={rows: choose.prices(steps, rows) for rows in sorted({step.rows for step in steps})},
                acceptance=found.acceptance,
                rows=chosen.option.rows,
                drafts=chosen.option.drafts,
                objective=objective,
                drafter_position=found.drafter_position,
                measured=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            )
            try:
                saved = profile.save(new)
            except OSError as error:  # what took minutes to measure is shown nevertheless
                failed = error
        if as_json:
            print(json.dumps(facts(found, options, choices, saved, lm.config.text)))
        else:
            print(tables(found, options, choices, lm.config.text))
        if saved and not as_json:
            print(f"\nsaved for {objective} in {saved}")
        elif options and not as_json and not failed:
            print("\nnot saved: there is a profile from a whole measurement")
        if plot and options:
            write_plot(options, plot, f"{lm.folder.name} on {profile.device()}")
        if failed:
            raise MTPError(
                f"the profile can't be saved: {o.os_message(failed)}; MLX_MTP_PROFILES can name another folder"
            ) from failed
    if not found.complete:
        raise typer.Exit(o.INTERRUPTED)


def _numbers(text: str, option: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter("expected whole numbers from 1, with commas between them", param_hint=option)
    return sorted({int(part) for part in parts})


def _read_prompts(path: Path) -> list[Any]:
    """The prompts of a file.

    Raises:
        PromptError: There are none, or a line can't be understood.
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
            raise PromptError(f'{path}: line {number} is no JSON object with "prompt"') from None
        if not isinstance(prompt, str | list) or not prompt:
            raise PromptError(f"{path}: the prompt of line {number} is neither text, messages nor token ids")
        found.append(prompt)
    return found


def tables(found: Measurement, options: list[Option], choices: list[Choice], config: TextConfig) -> str:
    """All that was measured and chosen, for people."""
    from ..tuning import choose
    from ..tuning.cost_model import distinct_experts

    lines = []
    for context in sorted({step.context for step in found.steps}):
        own = [step for step in found.steps if step.context == context]
        widths = sorted(own[0].verify)
        speed = f"; prefill {found.prefill_tps[context]:,.0f} tok/s" if context in found.prefill_tps else ""
        lines += [
            f"Context {context:,}{speed}. Milliseconds of a verify pass by block width, of a draft, and of the host:",
            "batch  " + "".join(f"{width:>8d}" for width in widths) + "     draft    host  spread",
        ]
        for step in own:
            spread = max((s.high - s.low) / s.median for s in step.verify.values())
            drafted = f"{step.draft.median * 1e3:10.2f}" if step.draft else "         -"
            passes = "".join(f"{step.verify[width].median * 1e3:8.2f}" for width in widths)
            lines.append(f"{step.rows:5d}  {passes}{drafted}{step.host * 1e3:8.2f}  up to {spread:.0%}")
        lines.append("")
    if config.num_experts and found.steps:
        context = found.steps[0].context
        lines += [
            "Distinct experts that a layer is asked for, by block width, measured and (if tokens chose independently):",
            "batch  " + "".join(f"{width:>6d}{'':8}" for width in sorted(found.steps[0].experts)).rstrip(),
        ]
        for step in (step for step in found.steps if step.context == context):
            counts = []
            for width, count in step.experts.items():
                uniform = distinct_experts(config.num_experts, config.experts_per_token, step.rows * width)
                counts.append(f"{count:6.1f} {f'({uniform:.1f})':7}")
            lines.append(f"{step.rows:5d}  " + "".join(counts).rstrip())
        lines.append("")
    if parts := choose.split(found.steps):
        experts = f" + {parts.expert * 1e3:.3f} a distinct expert" if config.num_experts else ""
        lines += [
            f"Verify at context {parts.context:,}, in ms: {parts.fixed * 1e3:.2f} in any case + "
            f"{parts.dense * 1e3:.3f} a token{experts}; off by {parts.residual:.0%} on average.",
            "",
        ]
    if found.acceptance and found.drafter_position:
        lines.append("Chance that a draft is kept if those before it were, by position:")
        for kind, chances in found.acceptance.items():
            lines.append(f"  {kind:8}" + " ".join(f"{chance:5.2f}" for chance in chances))
        why = "the usual one" if found.drafter_position == "committed" else "where clearly more are kept"
        lines.append(f"The drafter's queries sit at the {found.drafter_position} position, {why}.")
        lines.append("")
    if options:
        drafts = sorted({option.drafts for option in options})
        lines += [
            "Expected tokens per second of all rows, by batch and draft length (* the best of the batch):",
            "batch  " + "".join(f"{k:>9d}" for k in drafts),
        ]
        for rows in sorted({option.rows for option in options}):
            own_options = {option.drafts: option for option in options if option.rows == rows}
            best = max(own_options.values(), key=lambda option: option.total_tps)
            cells = (
                f"{own_options[k].total_tps:8.1f}{'*' if own_options[k] is best else ' '}"
                if k in own_options
                else " " * 9
                for k in drafts
            )
            lines.append(f"{rows:5d}  " + "".join(cells).rstrip())
        lines.append("")
    lines += [f"left out: {what}" for what in found.skipped]
    if why := choose.restless(found.steps):
        lines += [f"The machine was busy with something else: {why}. Tune again when it is idle.", ""]
    lines += [f"{choice.objective:10} {choice.why}" for choice in choices]
    return "\n".join(lines)


def facts(
    found: Measurement,
    options: list[Option],
    choices: list[Choice],
    saved: Path | None,
    config: TextConfig,
) -> dict[str, Any]:
    """All that was measured and chosen, for JSON."""
    from ..tuning import choose
    from ..tuning.cost_model import distinct_experts

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
        "restless": choose.restless(found.steps),
        "profile": str(saved) if saved else None,
    }


def _list(as_json: bool) -> None:
    """Shows the saved profiles."""
    o.use_openblas()
    from ..tuning import profile

    rows: list[dict[str, Any]] = []
    for path in listed(profile.folder(), "*.json"):
        row: dict[str, Any] = {"path": str(path), "usable": True}
        rows.append(row)
        try:
            known = profile.read(path)
            row |= {"model": known.key.model, "quantize": known.key.quantize, "drafter": known.key.drafter,
                    "device": known.key.device, "objective": known.objective, "rows": known.rows,
                    "drafts": known.drafts, "measured": known.measured}  # fmt: skip
            # What it holds for besides this can only be told with the model at hand.
            profile.check(known, replace(known.key, **profile.here()), path)
        except ProfileError as error:
            row |= {"usable": False, "why": str(error)}
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        if not row["usable"]:
            print(f"not usable: {row['why']}")
            continue
        stored = f"{row['quantize']} bits" if row["quantize"] else "as stored"
        stored += f", the drafter in {row['drafter']}" if row["drafter"] else ""
        print(
            f"{row['model']} ({stored}) on {row['device']}: batch {row['rows']}, draft length {row['drafts']} "
            f"({row['objective']}), measured {row['measured']}\n    {row['path']}"
        )
    if not rows:
        print(f"no profiles in {profile.folder()}: mlx-mtp tune makes one", file=sys.stderr)


def _simulation(
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
) -> str:
    """The prediction's tables, one for each context, or their JSON.

    Raises:
        typer.BadParameter: Unknown chip or size, where the message lists those there are; too long a context.
    """
    from ..checkpoint.drafter_precision import drafter_format
    from ..checkpoint.quantization import Format
    from ..tuning import chips, cost_model, known_models, report

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
                "a size has its own: give a folder or repository for another", param_hint="--drafter"
            )
        how = Format(quantize) if quantize else None
        drafter_how = drafter_format(own_drafter, how, bool(quantize), quantize_drafter)
    pair = cost_model.pair(target, None if no_draft else own_drafter, how, drafter_how)
    if max(contexts) > (longest := pair.target.max_positions):
        raise typer.BadParameter(f"the model's own is {longest:,} tokens", param_hint="--contexts")
    if as_json:
        predicted = [report.simulation_facts(machine, pair, context, batches, objective) for context in contexts]
        bits = how.bits if how else None
        about = {"predicted": True, "chip": machine.name, "model": name, "bits": bits, "objective": objective}
        accepted = list(cost_model.PUBLISHED_ACCEPTANCE) if pair.drafter else []
        return json.dumps({**about, "acceptance": accepted, "contexts": predicted})
    return "\n\n".join(
        report.simulation(machine, name, pair, context, batches=batches, objective=objective) for context in contexts
    )


def _configs(
    model: str, drafter: str | None, no_draft: bool, quantize: int | None, quantize_drafter: str | int
) -> tuple[TargetConfig, DrafterConfig | None, Format | None, Format | None]:
    """The configurations of a folder or repository and of its drafter, if it has one, and how both are quantised."""
    from ..checkpoint.pair import find_pair

    target, own = find_pair(
        model, False if no_draft else drafter, quantize, quantize_drafter=quantize_drafter, weights=False
    )
    return target.config, own.config if own else None, target.format, own.format if own else None
