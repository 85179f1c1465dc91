"""The kinds of long work that a fault can hit: how each is started, and what must hold after it was killed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import mlx_mtp
from mlx_mtp.checkpoint.pair import DEMO
from mlx_mtp.cli.chatting.store import Store, read_conversation, write_conversation
from mlx_mtp.errors import MTPError
from mlx_mtp.profile import load_profile
from weights_convert import verify_sums

from .killed import PROMPTS
from .tiny_checkpoints import make_pair
from .tiny_hub import serve

ROOT = Path(__file__).resolve().parents[2]

Files = dict[str, bytes]


def files(folder: Path) -> Files:
    """The contents of all files in a folder, by relative path; links count as what they lead to."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Work:
    """A kind of long work, whose results go into a folder.

    Attributes:
        name: Its name.
        typed: What is typed at its terminal; "" if it needs none.
        share: Its share of a number of kills; smaller for work that takes longer.
    """

    name: ClassVar[str]
    typed: ClassVar[str] = ""
    share: ClassVar[int] = 4

    def __init__(self, shared: Path) -> None:
        """Makes what the work reads, in a folder of its own."""
        self.shared = shared

    def close(self) -> None:
        """Ends what runs beside the work."""

    def arguments(self, folder: Path) -> list[object]:
        """What `tests.support.killed` runs."""
        raise NotImplementedError

    def environment(self, folder: Path) -> dict[str, str]:
        """Its own environment variables."""
        return {}

    def begin(self, folder: Path) -> None:
        """Writes what an earlier run has left."""

    def wrong(self, folder: Path) -> Iterator[str]:
        """What mustn't be, at any moment."""
        yield from ()

    def finished(self, folder: Path) -> Mapping[str, object]:
        """What is finished, by name; it must be there unchanged from then on."""
        return {}

    def result(self, folder: Path) -> object:
        """What all complete runs must agree in."""
        return files(folder)

    def names(self, folder: Path) -> set[str]:
        """Names of all files that a complete run leaves."""
        return set(files(folder))


class Convert(Work):
    """A target and its drafter, in many small files."""

    name = "convert"
    options: ClassVar[tuple[object, ...]] = ("--bits", 4)

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        self.source = make_pair("e2b", shared)[0]

    def arguments(self, folder: Path) -> list[object]:
        return ["mlx-mtp", "convert", self.source, folder / "new", *self.options]

    def wrong(self, folder: Path) -> Iterator[str]:
        for made in (folder / "new", folder / "new-assistant"):
            if made.exists():
                try:
                    verify_sums(made)
                except MTPError as error:
                    yield f"half a model: {error}"
        for name, recorded, path in self._recorded(folder):
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != recorded:
                yield f"{name} is recorded as finished and isn't"

    def finished(self, folder: Path) -> Mapping[str, object]:
        done = {name: path.stat().st_ino for name, _, path in self._recorded(folder) if path.is_file()}
        return done | {str(path.relative_to(folder)): path.stat().st_ino for path in folder.glob("new*/*.safetensors")
                       if path.parent.name in ("new", "new-assistant")}  # fmt: skip

    @staticmethod
    def _recorded(folder: Path) -> Iterator[tuple[str, str, Path]]:
        """Name in the result, checksum and path of the weight files that are recorded as finished."""
        for journal in folder.glob("new*.partial/conversion.json"):
            for name, digest in json.loads(journal.read_bytes())["files"].items():
                yield f"{journal.parent.stem}/{name}", digest, journal.parent / name


class Learn(Convert):
    """A target whose 4-bit weights mlx-lm learns."""

    name = "convert --method gptq"
    share = 1

    def __init__(self, shared: Path) -> None:
        Work.__init__(self, shared)
        self.source = DEMO / "target"
        text = shared / "text"
        text.write_bytes((ROOT / "docs/tuning.md").read_bytes()[:1500])
        self.options = ("--bits", 4, "--no-draft", "--method", "gptq", "--calibration", text)

    def finished(self, folder: Path) -> Mapping[str, object]:
        return {}  # all learnt weights must come from the same run, so it begins again


class Batch(Work):
    """The prompts of a file."""

    name = "batch"

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        self.source = shared / "in.jsonl"
        lines = [{"prompt": f"How many minutes are {i} hours?", "max_tokens": 8 + i} for i in range(16)]
        self.source.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def arguments(self, folder: Path) -> list[object]:
        return ["mlx-mtp", "batch", self.source, "-o", folder / "out.jsonl", "--seed", 5, "--batch-size", 2]

    def finished(self, folder: Path) -> Mapping[str, object]:
        output = folder / "out.jsonl"
        whole = output.read_text().rpartition("\n")[0] if output.exists() else ""
        return {str(json.loads(line)["index"]): line for line in whole.splitlines()}

    def result(self, folder: Path) -> object:
        answers = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
        return [(answer["index"], answer["text"], answer["tokens"]) for answer in answers]


class Trace(Work):
    """An answer with a trace, in place of an older one."""

    name = "generate --trace"
    share = 2

    def arguments(self, folder: Path) -> list[object]:
        return ["mlx-mtp", "generate", "Who are you?", "--trace", folder / "trace.json"]

    def begin(self, folder: Path) -> None:
        (folder / "trace.json").write_text("{}")

    def wrong(self, folder: Path) -> Iterator[str]:
        if not (folder / "trace.json").read_text().endswith("}"):
            yield "half a trace"

    def result(self, folder: Path) -> object:
        return sorted(json.loads((folder / "trace.json").read_bytes()))


class Tune(Work):
    """A profile and a plot, in place of older ones."""

    name = "tune"
    share = 2

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        self.prompts = shared / "prompts.txt"
        self.prompts.write_text("Who are you?\n")
        self.old: Files = {}

    def arguments(self, folder: Path) -> list[object]:
        return ["mlx-mtp", "tune", "--no-draft", "--batch-sizes", 1, "--contexts", 16, "--prompts", self.prompts,
                "--plot", folder / "plot.png"]  # fmt: skip

    def environment(self, folder: Path) -> dict[str, str]:
        return {"MLX_MTP_PROFILES": str(folder / "profiles")}

    def begin(self, folder: Path) -> None:
        for name, content in self.old.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)

    def wrong(self, folder: Path) -> Iterator[str]:
        profiles = list((folder / "profiles").glob("*.json"))
        if self.old and not (profiles and (folder / "plot.png").exists()):
            yield "the older profile or plot is gone"
        for path in profiles:
            load_profile(path)
        plot = folder / "plot.png"
        if plot.exists() and not plot.read_bytes().endswith(b"IEND\xaeB`\x82"):
            yield "half a plot"

    def result(self, folder: Path) -> object:
        if not self.old:  # the first run: the others find what it has left
            self.old = files(folder)
        return sorted(path.name for path in (folder / "profiles").iterdir())


class Prompts(Work):
    """Two prompts that are saved in the same file by turns."""

    name = "save_prompt"

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        self.whole = []
        with mlx_mtp.load() as lm:
            for prompt in PROMPTS:
                lm.save_prompt(prompt, shared / "prompt.safetensors")
                self.whole.append((shared / "prompt.safetensors").read_bytes())

    def arguments(self, folder: Path) -> list[object]:
        return ["prompts", folder / "prompt.safetensors", 6]

    def begin(self, folder: Path) -> None:
        (folder / "prompt.safetensors").write_bytes(self.whole[0])

    def wrong(self, folder: Path) -> Iterator[str]:
        if (folder / "prompt.safetensors").read_bytes() not in self.whole:
            yield "the saved prompt isn't whole"


class Chat(Work):
    """A conversation in a terminal, which is kept, and saved twice in the same file."""

    name = "chat"
    typed = "Who are you?\n/save {folder}/saved\nWhat is the capital of Italy?\n/save {folder}/saved\n\x04"

    _EARLIER: ClassVar[list[dict[str, Any]]] = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
    ]

    def arguments(self, folder: Path) -> list[object]:
        return ["mlx-mtp", "chat", "--temperature", 0, "--max-tokens", 30]

    def environment(self, folder: Path) -> dict[str, str]:
        return {"HOME": str(folder), "XDG_DATA_HOME": str(folder)}

    def _home(self, folder: Path) -> AbstractContextManager[object]:
        return mock.patch.dict("os.environ", self.environment(folder))

    def begin(self, folder: Path) -> None:
        with self._home(folder):
            Store().keep(self._EARLIER)
        write_conversation(folder / "saved", self._EARLIER)

    def wrong(self, folder: Path) -> Iterator[str]:
        with self._home(folder):
            conversations = [Store().resume(), read_conversation(folder / "saved")]
        for it in conversations:
            if it != self._EARLIER and (len(it) not in (2, 4) or it[0]["content"] != "Who are you?"):
                yield f"a conversation that nobody had: {it}"

    def result(self, folder: Path) -> object:
        with self._home(folder):
            return Store().resume(), read_conversation(folder / "saved")


class Get(Work):
    """A target in two files and its drafter, from a hub on this machine that takes its time."""

    name = "get"

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        target, drafter = make_pair("e2b", shared, shards=2)
        root = shared / "hub"
        (root / "google").mkdir(parents=True)
        shutil.move(target, root / "google/gemma-4-E2B-it")
        shutil.move(drafter, root / "google/gemma-4-E2B-it-assistant")
        self._running = ExitStack()
        self.hub = self._running.enter_context(serve(root))
        self.hub.pause = 0.01

    def close(self) -> None:
        self._running.close()

    def arguments(self, folder: Path) -> list[object]:
        return ["mlx-mtp", "get", "E2B"]

    def environment(self, folder: Path) -> dict[str, str]:
        return {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1",
                "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip

    def _blobs(self, folder: Path) -> list[Path]:
        return [path for path in folder.glob("hub/*/blobs/*") if re.fullmatch("[0-9a-f]{64}", path.name)]

    def wrong(self, folder: Path) -> Iterator[str]:
        for path in self._blobs(folder):
            if hashlib.sha256(path.read_bytes()).hexdigest() != path.name:
                yield f"{path.name} isn't whole"

    def finished(self, folder: Path) -> Mapping[str, object]:
        return {path.name: path.stat().st_ino for path in self._blobs(folder)}

    def result(self, folder: Path) -> object:
        return {name: content for name, content in files(folder).items() if "/snapshots/" in name}

    def names(self, folder: Path) -> set[str]:
        # Not what a kill leaves of the library's own: empty files, and one with the 40 bytes of a commit.
        return {name for name, content in files(folder).items() if content and "/refs/" not in name}


KINDS: tuple[type[Work], ...] = (Convert, Learn, Batch, Trace, Tune, Prompts, Chat, Get)
