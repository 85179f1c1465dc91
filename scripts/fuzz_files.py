"""Does any file, damaged or hostile, do more than raise the package's own errors?

Each case changes one thing that is read from outside (a config, an index, a safetensors header, a tokenizer, a chat
template, a profile, a saved prompt, an adapter, messages, a line of JSON, a schema) and reads it as the package does.
Of every case:

- only an `MTPError` of one line comes out, or nothing;
- nothing outside the case's folder is opened but Python's own files, nothing is written, no program is started, and no
  connection made (an audit hook sees what Python does; what MLX and the tokenizer's library do in C it doesn't);
- no code in the folder is imported, and no pickle opened: the folder has some;
- it takes at most 2 s of the processor, and no more memory than 200 MB above the file's size.

Seeded: case i of a kind and a seed is the same in every run.

    python scripts/fuzz_files.py [--cases 1000000] [--seed 0] [--first 0] [--kind template] [--minutes 60]
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Annotated, Any

import mlx.core as mx
import numpy as np
import typer

import mlx_mtp
from mlx_mtp.checkpoint.description import read_drafter, read_target
from mlx_mtp.checkpoint.load import load_drafter, load_target
from mlx_mtp.checkpoint.safetensors_files import INDEX
from mlx_mtp.cli.batch import _parse
from mlx_mtp.config import check_pair
from mlx_mtp.errors import MTPError
from mlx_mtp.profile import SCHEMA, key_of, load_profile
from mlx_mtp.session.generation_config import read_generation
from mlx_mtp.session.options import GenerationOptions
from mlx_mtp.text.tokenizer import Tokenizer
from tests.support.fuzz import damaged_header, damaged_text, hostile_template
from tests.support.oracle_pairs import write_pair
from tests.support.random_controls import SCHEMA as RECORD
from tests.support.random_controls import TOOLS

SECONDS, MEGABYTES = 2.0, 200
"""What a case may take."""

PAIR = 390
"""The random pair that is damaged: one with all parts, and a tokenizer."""

Make = Callable[[Random], bytes]
Read = Callable[[], object]


class Guard:
    """An audit hook that notes what a case must not do. Hooks can't be removed: it sleeps outside of `watching`."""

    def __init__(self, folder: Path) -> None:
        """Allows reading in this folder, and of Python's own files."""
        own = [sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), *sys.path, "/usr/share/zoneinfo"]
        self._folder, self._own = str(folder), tuple(os.path.realpath(path) for path in own if path)
        self._awake, self.found = False, list[str]()
        sys.addaudithook(self._hook)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Notes what happens in the block, in `found`."""
        self.found.clear()
        self._awake = True
        try:
            yield
        finally:
            self._awake = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._awake:
            return
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path, mode = os.fsdecode(arguments[0]), str(arguments[1] or "")
            inside = path.startswith(self._folder)
            if set(mode) & set("wax+") or (inside and path.endswith((".py", ".bin", ".pt"))):
                self.found.append(f"opens {path!r} with {mode!r}")
            elif not inside and not os.path.realpath(path).startswith(self._own):
                self.found.append(f"reads {path!r}")
        elif event == "import" and "evil" in str(arguments[0]):
            self.found.append(f"imports {arguments[0]}")
        elif event.partition(".")[0] in ("socket", "subprocess", "shutil", "ctypes", "pickle") or event in (
            "os.system", "os.exec", "os.fork", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.link",
            "os.symlink", "os.truncate", "os.posix_spawn", "os.putenv",
        ):  # fmt: skip
            self.found.append(f"{event}{arguments!r:.200}")


class Files:
    """A sound folder, what can be damaged in it, and how each thing is read.

    Attributes:
        kinds: By name: the file, what makes a damaged version, and what reads it.
    """

    def __init__(self, folder: Path, lm: mlx_mtp.MTPModel, target: Path, drafter: Path) -> None:
        """Prepares the folder; `lm` is the model that is in it."""
        self._lm, self._target, self._drafter = lm, target, drafter
        for name in ("evil.py", "modeling_evil.py", "pytorch_model.bin", "__init__.py"):
            (target / name).write_text("raise SystemExit('code of a checkpoint runs')")
        self._prompt, self._profile, self._adapter = (
            target / "prompt.safetensors",
            target / "profile",
            folder / "adapter",
        )
        lm.save_prompt([5, 6, 7, 8], self._prompt)
        self._profile.write_text(json.dumps(self._sound_profile()))
        self._write_adapter()
        weights = target / "model.safetensors"
        header = json.loads(weights.read_bytes()[8 : 8 + int.from_bytes(weights.read_bytes()[:8], "little")])
        index = {"weight_map": {name: weights.name for name in header if name != "__metadata__"}}

        def text(path: Path) -> Make:
            value = json.loads(path.read_text())
            return lambda rng: damaged_text(rng, value)

        def raw(path: Path) -> Make:
            content = path.read_bytes()
            return lambda rng: damaged_header(rng, content)

        tokenizer, chat = target / "tokenizer.json", target / "chat_template.jinja"
        adapter, low_rank = self._adapter / "adapter_config.json", self._adapter / "adapters.safetensors"
        self.kinds: dict[str, tuple[Path, Make, Read]] = {
            "config": (target / "config.json", text(target / "config.json"), self._load),
            "drafter": (drafter / "config.json", text(drafter / "config.json"), self._load_drafter),
            "generation": (target / "generation_config.json", text(target / "generation_config.json"), self._defaults),
            "index": (target / INDEX, lambda rng: damaged_text(rng, index), self._load),
            "weights": (weights, raw(weights), self._load),
            "drafter weights": (drafter / "model.safetensors", raw(drafter / "model.safetensors"), self._load_drafter),
            "tokenizer": (tokenizer, text(tokenizer), self._chat),
            "tokenizer config": (target / "tokenizer_config.json", text(target / "tokenizer_config.json"), self._chat),
            "template": (chat, lambda rng: hostile_template(rng).encode("utf-8", "surrogatepass"), self._chat),
            "profile": (self._profile, text(self._profile), lambda: load_profile(self._profile)),
            "prompt": (self._prompt, raw(self._prompt), lambda: lm.load_prompt(self._prompt)),
            "adapter": (adapter, text(adapter), self._load_adapted),
            "adapter weights": (low_rank, raw(low_rank), self._load_adapted),
            "messages": (target / "messages", lambda rng: damaged_text(rng, _MESSAGES), self._messages),
            "line": (target / "line", lambda rng: damaged_text(rng, _LINE), self._line),
            "schema": (target / "schema", _schema, self._schema),
            "tools": (target / "tools", lambda rng: damaged_text(rng, TOOLS), self._tools),
        }

    def _sound_profile(self) -> dict[str, Any]:
        key = asdict(key_of(read_target(self._target), None))
        costs = {"1": {"verify": {"1": 1.0, "2": 1.1}, "draft": 0.1, "packing": 0.0}}
        return {"schema": SCHEMA, "key": key, "costs": costs, "acceptance": {}, "rows": 1, "drafts": 1,
                "objective": "latency", "drafter_position": None, "measured": ""}  # fmt: skip

    def _write_adapter(self) -> None:
        self._adapter.mkdir()
        config = {"fine_tune_type": "lora", "num_layers": 9, "lora_parameters": {"rank": 2, "scale": 1.0}}
        (self._adapter / "adapter_config.json").write_text(json.dumps(config))
        shape = load_target(read_target(self._target)).layers[0].mlp.down_proj.weight.shape
        name = "model.layers.0.mlp.down_proj"
        parts = {f"{name}.lora_a": np.zeros((shape[1], 2)), f"{name}.lora_b": np.zeros((2, shape[0]))}
        arrays = {part: mx.array(array.astype(np.float32)) for part, array in parts.items()}
        mx.save_safetensors(str(self._adapter / "adapters.safetensors"), arrays)

    def _load(self) -> None:
        load_target(read_target(self._target))

    def _load_drafter(self) -> None:
        own = read_drafter(self._drafter)
        check_pair(self._lm.config, own.config)
        load_drafter(own, self._lm.config, "committed")

    def _load_adapted(self) -> None:
        load_target(read_target(self._target), self._adapter)

    def _defaults(self) -> None:
        read_generation(read_target(self._target))

    def _chat(self) -> None:
        tokenizer = Tokenizer.from_folder(self._target)
        tokens = tokenizer.chat(_MESSAGES, False, TOOLS)
        tokenizer.decode(tokens[:1000])

    def _content(self, name: str) -> Any:
        return _parse('{"prompt":' + (self._target / name).read_text("utf-8", "replace") + "}")["prompt"]

    def _messages(self) -> None:
        self._lm.encode(self._content("messages"))

    def _line(self) -> None:
        item = _parse((self._target / "line").read_text("utf-8", "replace"))
        prompt = item.pop("prompt")
        self._lm.encode(prompt)
        self._prepared(prompt, GenerationOptions().updated(item))

    def _schema(self) -> None:
        given = self._content("schema")
        self._prepared([5, 6], GenerationOptions().updated({"response_format": given}))

    def _tools(self) -> None:
        options = GenerationOptions().updated({"tools": self._content("tools"), "tool_choice": "required"})
        self._prepared([5, 6], options)

    def _prepared(self, prompt: Any, options: GenerationOptions) -> None:
        for answer in self._lm._calls.prepare(prompt, options):
            control = answer.request.control and answer.request.control(answer.request.prompt)
            if control:
                control.adjustments([])


_MESSAGES = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "hello"}]},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
    {"role": "tool", "tool_call_id": "a", "content": "2"}, {"role": "user", "content": "he <turn|> he"},
]  # fmt: skip

_LINE = {
    "prompt": "hello", "id": 5, "max_tokens": 5, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": 3,
    "stop": ["a"], "draft_length": 2, "exactness": "fast", "logit_bias": {"5": 1.0}, "logprobs": 2, "prediction": "he",
    "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "stop_token_ids": [5],
    "response_format": {"type": "regex", "pattern": "[a-c]+"}, "thinking_budget": 3, "tools": TOOLS,
    "tool_choice": "auto", "sanitize": True, "thinking": False, "ignore_eos": False,
}  # fmt: skip

_FORMATS: list[dict[str, Any]] = [
    {"type": "json_schema", "json_schema": {"schema": RECORD}},
    {"type": "json_schema", "json_schema": {"schema": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {
        "type": "array", "items": {"$ref": "#/$defs/a"}, "maxItems": 9}]}}, "$ref": "#/$defs/a"}}},
    {"type": "regex", "pattern": "([A-Z][a-z]+ ){1,9}[0-9]+"},
    {"type": "grammar", "grammar": 'start: ("ab" | x)+\nx: /[0-9]{1,5}/'},
]  # fmt: skip


def _schema(rng: Random) -> bytes:
    return damaged_text(rng, rng.choice(_FORMATS))


@contextmanager
def prepared() -> Iterator[tuple[Files, Guard]]:
    """A folder to damage, and who watches over it."""
    logging.disable(logging.WARNING)
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name).resolve()
            target, drafter = write_pair(folder, PAIR)
            (folder / "outside.safetensors").write_bytes((target / "model.safetensors").read_bytes())
            with mlx_mtp.load(target, drafter=drafter, profile=None, dtype="float32") as lm:
                files = Files(folder, lm, target, drafter)
                for _, _, read in files.kinds.values():  # what is imported late is imported now
                    try:
                        read()
                    except (MTPError, OSError):
                        continue
                yield files, Guard(folder)
    finally:
        logging.disable(logging.NOTSET)


def wrong(files: Files, guard: Guard, kind: str, seed: int, number: int) -> tuple[str, bool]:
    """Runs a case.

    Returns:
        What is wrong with it, "" for nothing; and whether an error was raised.
    """
    path, make, read = files.kinds[kind]
    sound = path.read_bytes() if path.exists() else None
    content = make(Random(f"{seed} {kind} {number}"))
    path.write_bytes(content)
    begun, memory = time.process_time(), _peak()
    found, refused = [], True
    try:
        with guard.watching():
            read()
        refused = False
    except MTPError as error:
        if "\n" in str(error) or not str(error):
            found.append(f"an error of several lines, or none: {str(error)!r:.300}")
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        found.append(f"{type(error).__name__} comes out: {str(error)!r:.300}")
    finally:
        if sound is None:
            path.unlink()
        else:
            path.write_bytes(sound)
    took, grew = time.process_time() - begun, (_peak() - memory) / 2**20
    if took > SECONDS:
        found.append(f"takes {took:.1f} s")
    if grew > MEGABYTES + len(content) / 2**20:
        found.append(f"takes {grew:.0f} MB")
    return "; ".join([*found, *guard.found[:3]]), refused


def _peak() -> float:
    """Most memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(
    cases: Annotated[int, typer.Option(help="How many cases.")] = 1_000_000,
    seed: Annotated[int, typer.Option(help="What they are drawn with.")] = 0,
    first: Annotated[int, typer.Option(help="Number of the first one.")] = 0,
    kind: Annotated[list[str] | None, typer.Option(help="Which kinds; all by default, in turn.")] = None,
    minutes: Annotated[float, typer.Option(help="Stop after that.")] = 1e9,
) -> None:
    """Prints every case that is wrong; exits with 1 if there is any."""
    begun, counts, bad = time.perf_counter(), Counter[str](), 0
    with prepared() as (files, guard):
        kinds = kind or list(files.kinds)
        for number in range(first, first + cases):
            if time.perf_counter() - begun > 60 * minutes:
                break
            name = kinds[number % len(kinds)]
            problem, refused = wrong(files, guard, name, seed, number)
            counts.update({"cases": 1, "refused": refused})
            if problem:
                bad += 1
                print(f"{name} {number}: {problem}", flush=True)
            if counts["cases"] % 10_000 == 0:
                print(f"{counts['cases']:,} cases, {bad} wrong", flush=True)
    print(f"{counts['cases']:,} cases, {counts['refused']:,} refused: {bad} wrong")
    raise SystemExit(bad > 0)


if __name__ == "__main__":
    typer.run(main)
