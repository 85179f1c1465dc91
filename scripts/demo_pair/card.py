"""Writes the model card: everything measured comes from the run that made the pair."""

from __future__ import annotations

import os
import platform
from math import prod
from pathlib import Path

import tokenizers
import torch
from safetensors import safe_open

from . import config, drafter, target
from .data import documentation_source
from .evaluate import DRAFTS, LONGEST, PAGE_START, Row, table
from .text import LONGEST as LONGEST_TEXT
from .training import Trainer

TEMPLATE = Path(__file__).with_name("card_template.md")


def _parameters(file: Path) -> int:
    """Trained numbers in a safetensors file."""
    with safe_open(file, "pt") as tensors:
        sizes = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no dict
    return sum(prod(one.get_shape()) for one in sizes.values() if one.get_dtype() == "BF16")


def write(
    out: Path, rows: list[Row], own: int, target_runs: tuple[Trainer, Trainer], drafter_run: Trainer, command: str
) -> None:
    """Writes `out`/README.md.

    Args:
        out: The pair's folder.
        rows: The evaluation.
        own: Texts the target wrote for the drafter.
        target_runs: The target's training and its drill.
        drafter_run: The drafter's training.
        command: How the pair was made.
    """
    files = {name: out / name / "model.safetensors" for name in ("target", "drafter")}
    text, assistant = config.TARGET["text_config"], config.DRAFTER["text_config"]
    card = TEMPLATE.read_text(encoding="utf-8").format(
        target_parameters=_parameters(files["target"]),
        drafter_parameters=_parameters(files["drafter"]),
        target_bytes=files["target"].stat().st_size,
        drafter_bytes=files["drafter"].stat().st_size,
        target_layers=text["num_hidden_layers"],
        drafter_layers=assistant["num_hidden_layers"],
        hidden=text["hidden_size"],
        drafter_hidden=assistant["hidden_size"],
        window=text["sliding_window"],
        shared=text["num_kv_shared_layers"],
        ple=text["hidden_size_per_layer_input"],
        clusters=config.DRAFTER["num_centroids"],
        read=config.DRAFTER["centroid_intermediate_top_k"],
        unroll=drafter.UNROLL,
        vocab=config.VOCAB,
        positions=text["max_position_embeddings"],
        longest=LONGEST_TEXT,
        documentation=documentation_source(),
        own=own,
        command=command,
        target_steps=f"{target_runs[0].steps:,}",
        drill_steps=f"{target_runs[1].steps:,}",
        drafter_steps=f"{drafter_run.steps:,}",
        target_minutes=sum(run.seconds for run in target_runs) / 60,
        drafter_minutes=drafter_run.seconds / 60,
        target_tokens=f"{target.BATCH_TOKENS:,}",
        drafter_tokens=f"{drafter.BATCH_TOKENS:,}",
        threads=torch.get_num_threads(),
        machine=f"{platform.machine()}, {os.cpu_count()} cores",
        torch=torch.__version__,
        tokenizers=tokenizers.__version__,
        python=platform.python_version(),
        page_start=PAGE_START,
        answer=LONGEST,
        drafts=DRAFTS,
        table=table(rows),
    )
    (out / "README.md").write_text(card, encoding="utf-8")
