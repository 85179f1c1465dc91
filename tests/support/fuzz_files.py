"""A sound folder for the fuzzer: what can be damaged in it, and how each thing is read."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np

import mlx_mtp
from mlx_mtp.checkpoint.description import read_drafter, read_target
from mlx_mtp.checkpoint.load import load_drafter, load_target
from mlx_mtp.checkpoint.safetensors_files import INDEX
from mlx_mtp.cli.batch import _finished, _parse
from mlx_mtp.cli.chatting.store import read_conversation
from mlx_mtp.cli.tune import _read_prompts
from mlx_mtp.config import check_pair
from mlx_mtp.errors import MTPError
from mlx_mtp.files import sha256
from mlx_mtp.profile import SCHEMA, key_of, load_profile
from mlx_mtp.session.generation_config import read_generation
from mlx_mtp.session.options import GenerationOptions
from mlx_mtp.text.tokenizer import Tokenizer
from tests.support.fuzz import damaged_header, damaged_text, hostile_template
from tests.support.fuzz_guard import Guard
from tests.support.fuzz_pieces import damaged_model, tiny_model
from tests.support.oracle_pairs import write_pair
from tests.support.random_controls import SCHEMA as RECORD
from tests.support.random_controls import TOOLS
from weights_convert.converter import _JOURNAL, _recorded_files, _write_journal
from weights_convert.plan import make_plan

PAIR = 390
"""The random pair that is damaged: one with all parts, and a tokenizer."""

TEMPLATE = """{% for message in messages %}{{ '<|turn>' + message.role + message.content | string | trim + '<turn|>' }}
{% endfor %}{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"""
"""A chat template that is compiled at once, for the kinds that don't change it."""

Make = Callable[[Random], bytes]
Read = Callable[[], object]


class Files:
    """A sound folder, what can be damaged in it, and how each thing is read.

    Attributes:
        kinds: By name: the file, what makes a damaged version, and what reads it.
        peak: Most memory of the process when the folder was ready, in bytes.
    """

    def __init__(self, folder: Path, lm: mlx_mtp.MTPModel, target: Path, drafter: Path) -> None:
        """Prepares the folder; `lm` is the model that is in it."""
        self._lm, self._target, self._drafter = lm, target, drafter
        self.peak = 0.0
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
        chat.write_text(TEMPLATE)
        self._pieces = folder / "pieces"
        self._pieces.mkdir()
        pieces = self._pieces / "tokenizer.model"
        pieces.write_bytes(model := tiny_model())
        for name in ("config.json", "chat_template.jinja", "evil.py"):
            (self._pieces / name).write_bytes((target / name).read_bytes())
        added = self._pieces / "tokenizer_config.json"
        added.write_text(json.dumps(_ADDED))
        saved, output = folder / "saved.json", folder / "output.jsonl"
        lines, self._plan, self._aside = (
            folder / "lines.jsonl",
            make_plan(read_target(target), None, None),
            folder / "aside",
        )
        journal = self._write_journal()
        adapter, low_rank = self._adapter / "adapter_config.json", self._adapter / "adapters.safetensors"
        self.kinds: dict[str, tuple[Path, Make, Read]] = {
            "config": (target / "config.json", text(target / "config.json"), self._load),
            "drafter": (drafter / "config.json", text(drafter / "config.json"), self._load_drafter),
            "generation": (target / "generation_config.json", text(target / "generation_config.json"), self._defaults),
            "index": (target / INDEX, lambda rng: damaged_text(rng, index), self._load),
            "weights": (weights, raw(weights), self._load),
            "drafter weights": (drafter / "model.safetensors", raw(drafter / "model.safetensors"), self._load_drafter),
            "tokenizer": (tokenizer, text(tokenizer), self._chat),
            "pieces": (pieces, lambda rng: damaged_model(rng, model), lambda: self._chat(self._pieces)),
            "added tokens": (added, text(added), lambda: self._chat(self._pieces)),
            "tokenizer config": (target / "tokenizer_config.json", text(target / "tokenizer_config.json"), self._chat),
            "template": (chat, lambda rng: hostile_template(rng).encode("utf-8", "surrogatepass"), self._chat),
            "profile": (self._profile, text(self._profile), lambda: load_profile(self._profile)),
            "prompt": (self._prompt, raw(self._prompt), lambda: lm.load_prompt(self._prompt)),
            "adapter": (adapter, text(adapter), self._load_adapted),
            "adapter weights": (low_rank, raw(low_rank), self._load_adapted),
            "messages": (target / "messages", lambda rng: damaged_text(rng, _MESSAGES), self._messages),
            "conversation": (saved, lambda rng: damaged_text(rng, _MESSAGES), lambda: self._conversation(saved)),
            "output": (output, lambda rng: damaged_text(rng, _OUTPUT), lambda: _finished(output, ["", "a"])),
            "line": (target / "line", lambda rng: damaged_text(rng, _LINE), self._line),
            "schema": (target / "schema", _schema, self._schema),
            "tools": (target / "tools", lambda rng: damaged_text(rng, TOOLS), self._tools),
            "tune's prompts": (lines, lambda rng: damaged_text(rng, _LINE), lambda: _read_prompts(lines)),
            "journal": (journal, text(journal), lambda: _recorded_files(self._aside, self._plan)),
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

    def _write_journal(self) -> Path:
        """A conversion that was interrupted after its weights."""
        self._aside.mkdir()
        sums = {
            name: (self._aside / name).write_bytes(b"weights") and sha256(self._aside / name)
            for name in self._plan.files
        }
        _write_journal(self._aside, self._plan, sums)
        return self._aside / _JOURNAL

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

    def _chat(self, folder: Path | None = None) -> None:
        tokenizer = Tokenizer.from_folder(folder or self._target)
        tokens = tokenizer.encode_prompt(tokenizer.prompt(_MESSAGES, False, TOOLS)[:10_000])
        tokenizer.decode(tokens[:1000])

    def _conversation(self, path: Path) -> None:
        self._lm.chat().restore(read_conversation(path))

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

_ADDED = {
    "bos_token": {"content": "<bos>"}, "eos_token": "<eos>",
    "added_tokens_decoder": {"0": {"content": "<pad>", "special": True}, "6": {"content": "<|turn>", "special": True}},
}  # fmt: skip

_OUTPUT = {"index": 0, "id": 5, "line_sha256": "e3b0c442", "text": "a", "tokens": [5], "finish_reason": "stop"}

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


def peak_memory() -> float:
    """Most memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def prepared() -> Iterator[tuple[Files, Guard]]:
    """A folder to damage, and who watches over it."""
    logging.disable(logging.WARNING)
    try:
        # In memory where there is such a folder: each case writes a file.
        with tempfile.TemporaryDirectory(dir=next((it for it in ["/dev/shm"] if os.path.isdir(it)), None)) as name:
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
                guard, files.peak = Guard(folder), peak_memory()
                yield files, guard
    finally:
        logging.disable(logging.NOTSET)
