"""The library says what it has to say through `logging`, and writes nothing to the terminal by itself."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_mtp


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A target without a drafter, which is worth a warning."""
    return Path(shutil.copytree(Path(mlx_mtp.__file__).parent / "demo" / "target", tmp_path / "target"))


def use(target: str | Path) -> None:
    """The life of a model."""
    with mlx_mtp.load(target) as lm:
        lm.generate("Hello!", max_tokens=3)
        lm.generate_batch(["Hello!", "Who are you?"], max_tokens=3)
        lm.unload()
        with pytest.raises(mlx_mtp.PromptError):
            lm.generate("Hello!", logits_processors=[lambda tokens, logits: 1 / 0])
        list(lm.stream("Hello!", max_tokens=3))


def test_nothing_is_printed(target: Path):
    code = "import sys; from tests.test_logging import use; use(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, target], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_app_that_asks_hears_everything(caplog: pytest.LogCaptureFixture, target: Path):
    caplog.set_level(logging.DEBUG, "mlx_mtp")
    use(target)
    levels = {record.levelno: record.getMessage() for record in caplog.records}
    assert "weights" in levels[logging.DEBUG] and "unloaded" in levels[logging.INFO]
    assert "drafter" in levels[logging.WARNING]
    assert all(record.name.startswith("mlx_mtp.") for record in caplog.records)
