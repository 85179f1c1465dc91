"""Runs mlx-lm's or mlx-vlm's server for bench_server.py, in an environment of their own.

    python -m venv /tmp/peers
    /tmp/peers/bin/pip install "mlx[cpu]" mlx-vlm==0.7.10 mlx-lm==0.32.2 scipy-openblas32==0.3.23.293.2
    python scripts/bench_server.py --peers /tmp/peers/bin/python

mlx-lm's takes a whole model as a draft model, which Gemma's drafters aren't, so it runs without one. mlx-vlm's can't
load a checkpoint without a vision tower, so this script loads the language model, and leaves the tower as it is made,
which costs nothing as long as no image comes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlx_mtp.system.blas import use_openblas

BLAS = use_openblas()  # before MLX is imported


def run_mlx_lm(target: Path, port: str) -> None:
    """Runs mlx-lm's server until it is ended."""
    from mlx_lm import server

    thoughts = '{"enable_thinking": false}'
    sys.argv = ["mlx_lm.server", "--model", str(target), "--port", port, "--chat-template-args", thoughts]
    server.main()


def run_mlx_vlm(target: Path, drafter: Path, draft_length: int, port: str) -> None:
    """Runs mlx-vlm's server until it is ended, with its MTP drafter."""
    from mlx_vlm import server
    from mlx_vlm.models.gemma4.config import ModelConfig, VisionConfig
    from mlx_vlm.models.gemma4.gemma4 import Model
    from mlx_vlm.server import generation
    from mlx_vlm.tokenizer_utils import load_tokenizer
    from mlx_vlm.utils import StoppingCriteria
    from transformers import AutoTokenizer

    from mlx_mtp.measuring.peer_mlx_vlm import load_target

    stops = json.loads((target / "generation_config.json").read_text("utf-8"))["eos_token_id"]

    def load(*_: object, **__: object) -> tuple[Any, Any]:
        language_model = load_target(target)
        config = ModelConfig(language_model.config, VisionConfig(), None, "gemma4")
        model = Model(config)
        model.language_model = language_model
        tokenizer = AutoTokenizer.from_pretrained(target)
        tokenizer.stopping_criteria = StoppingCriteria(stops, tokenizer)
        tokenizer.detokenizer = load_tokenizer(target, return_tokenizer=False)(tokenizer)
        return model, tokenizer

    generation.load = load
    generation.resolve_eos_token_ids = lambda *_: set(stops)
    drafting = ["--draft-model", str(drafter), "--draft-kind", "mtp", "--draft-block-size", str(draft_length + 1)]
    sys.argv = ["mlx_vlm.server", "--model", str(target), "--port", port, *(drafting if draft_length else [])]
    server.main()


if __name__ == "__main__":
    name, target, drafter, draft_length, port = sys.argv[1:]
    if name == "mlx-lm":
        run_mlx_lm(Path(target), port)
    else:
        run_mlx_vlm(Path(target), Path(drafter), int(draft_length), port)
