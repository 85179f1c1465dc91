"""What the training of target and drafter have in common: optimisers, schedule, checkpoints, log.

Matrices inside the layers are trained with Muon, all else with AdamW: in the few minutes a CPU has, this gets further
than AdamW alone.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor, nn

from mlx_mtp.files import replacing

WARMUP = 50
CLIP = 1.0


class Trainer:
    """Steps a model through a fixed number of steps.

    Attributes:
        model: What is trained.
        step: Steps done.
        steps: Steps to do.
        seconds: Time spent, in this process and those before it.
    """

    def __init__(self, name: str, model: nn.Module, steps: int, muon: float, adam: float, state: Path) -> None:
        """Makes a trainer that continues from its checkpoint if there is one.

        Args:
            name: For the log and the checkpoint's file name.
            model: What to train.
            steps: Steps of the whole run.
            muon: Peak learning rate of Muon.
            adam: Peak learning rate of Adam.
            state: Folder for checkpoints.
        """
        self.name, self.model, self.steps, self.step = name, model, steps, 0
        self._file = state / f"{name}.pt"
        matrices = {id(p): p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n}
        others = [p for p in model.parameters() if id(p) not in matrices]
        self._optimisers = [
            torch.optim.Muon(matrices.values(), lr=muon, weight_decay=0.0),
            torch.optim.AdamW(others, lr=adam, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self._rates = [muon, adam]
        self.seconds, self._clock, self._loss = 0.0, time.monotonic(), 0.0
        if self._file.exists():
            saved = torch.load(self._file, weights_only=True)
            self.step, self.seconds = saved["step"], saved["seconds"]
            model.load_state_dict(saved["model"])
            for optimiser, kept in zip(self._optimisers, saved["optimisers"], strict=True):
                optimiser.load_state_dict(kept)

    def update(self, loss: Tensor) -> None:
        """One optimiser step."""
        # Up linearly, then down linearly over the last 60 % of the steps.
        scale = min((self.step + 1) / WARMUP, 1.0, (self.steps - self.step) / (0.6 * self.steps))
        for optimiser, rate in zip(self._optimisers, self._rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * scale
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for optimiser in self._optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        value = float(loss.detach())
        self._loss = value if self._loss == 0 else 0.95 * self._loss + 0.05 * value
        if self.step % 50 == 0 or self.step == self.steps:
            minutes = self.seconds / 60
            print(f"{self.name}: step {self.step}/{self.steps} loss {self._loss:.4f} minutes {minutes:.1f}", flush=True)
        if self.step % 200 == 0 or self.step == self.steps:
            self._save()

    def _save(self) -> None:
        optimisers = [optimiser.state_dict() for optimiser in self._optimisers]
        state = {"step": self.step, "seconds": self.seconds, "model": self.model.state_dict(), "optimisers": optimisers}
        with replacing(self._file) as aside:
            torch.save(state, aside)
