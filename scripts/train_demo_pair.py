"""Trains the embedded pair from scratch: text, tokenizer, target, drafter, evaluation, model card.

    python scripts/train_demo_pair.py --out mlx_mtp/demo

Needs the project's extra `test` (torch, transformers). An interrupted run continues from its checkpoints. The model
card, mlx_mtp/demo/README.md, has the time it takes and the results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
import torch
from tokenizers import Tokenizer

from mlx_mtp.system.blas import use_openblas

use_openblas()  # before anything imports mlx

from scripts.demo_pair import card, config, drafter, evaluate, export, own_texts, target
from scripts.demo_pair.data import conversations, prose
from scripts.demo_pair.model import Drafter
from scripts.demo_pair.tokenizer import train as train_tokenizer


def make_tokenizer(seed: int, state: Path) -> Tokenizer:
    """Trains the tokenizer, or takes the one in `state`."""
    file = state / "tokenizer.json"
    if not file.exists():
        documents = [*conversations(seed, 3000), *prose(held_out=False)]
        texts = [message["content"] for d in documents for message in d.messages] + [d.text for d in documents]
        train_tokenizer(texts).save(str(file))
    return Tokenizer.from_file(str(file))


def make_own_texts(tokenizer: Tokenizer, folder: Path, count: int, seed: int, state: Path) -> list[list[int]]:
    """Generates `count` texts with the exported target, or takes those in `state`."""
    file = state / "own_texts.json"
    if not file.exists():
        prompts = own_texts.prompts(tokenizer, seed + 2, count)
        file.write_text(json.dumps(own_texts.write(folder, prompts, seed)))
    return json.loads(file.read_text())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "mlx_mtp" / "demo", help="folder for the pair")
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "demo_pair", help="folder for checkpoints")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--target-steps", type=int, default=3000)
    parser.add_argument("--drafter-steps", type=int, default=1500)
    parser.add_argument("--own-texts", type=int, default=448, help="texts that the target writes for the drafter")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    out, state, seed = options.out, options.state, options.seed
    state.mkdir(parents=True, exist_ok=True)

    tokenizer = make_tokenizer(seed, state)
    model, target_runs = target.train(tokenizer, options.target_steps, seed, state)
    export.rounded(model)
    # The drafter is trained for the exported target, on texts that this target generated.
    export.export(state / "pair", tokenizer, model, Drafter(config.DRAFTER))
    texts = make_own_texts(tokenizer, state / "pair" / "target", options.own_texts, seed, state)
    assistant, drafter_run = drafter.train(tokenizer, model, texts, options.drafter_steps, seed, state)

    export.export(out, tokenizer, model, assistant)
    gaps = export.check(out, model, assistant, texts[-1])
    print(f"largest differences from torch: target {gaps[0]:.1e}, drafter {gaps[1]:.1e}")
    rows = evaluate.evaluate(out)
    command = f"python scripts/train_demo_pair.py --out mlx_mtp/demo --seed {seed}"
    command += f" --target-steps {options.target_steps} --drafter-steps {options.drafter_steps}"
    card.write(out, rows, len(texts), target_runs, drafter_run, command)
    print(evaluate.table(rows))


if __name__ == "__main__":
    main()
