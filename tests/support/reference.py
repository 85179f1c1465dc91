"""transformers as the reference: what it computes, writes and drafts for the checkpoints that we load.

Needs a version that constructs the assistants, generates with them, and re-saves configs with `per_layer_config`: 5.24,
or 5.20 to 5.22. Version 5.18 can't start assisted generation with them, and 5.23 can't construct them (its
`kv_sharing_modes` raises ValueError when all layers share KV).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers
from transformers.generation.candidate_generator import SinglePositionMultiTokenCandidateGenerator

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def load(folder: Path) -> transformers.PreTrainedModel:
    """The model in a folder, float32, of the class that its config names; every tensor must find its place."""
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, report = getattr(transformers, architecture).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), f"{architecture}: {report}"
    model.generation_config.eos_token_id = None  # texts of a given length are compared
    return model


def logits(model: transformers.PreTrainedModel, tokens: Sequence[int]) -> np.ndarray:
    """Logits [len(tokens), vocab] of one forward pass without a cache."""
    with torch.no_grad():
        return model(torch.tensor([list(tokens)]), use_cache=False).logits[0].numpy()


def greedy(model: transformers.PreTrainedModel, prompt: Sequence[int], length: int) -> tuple[list[int], np.ndarray]:
    """Greedy decoding, token by token with a cache: the new tokens, and the logits [length, vocab] behind them."""
    result = model.generate(
        torch.tensor([list(prompt)]),
        do_sample=False,
        max_new_tokens=length,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return result.sequences[0, len(prompt) :].tolist(), torch.cat(result.logits).numpy()


def first_drafts(
    target: transformers.PreTrainedModel, drafter: transformers.PreTrainedModel, prompt: Sequence[int], k: int
) -> list[int]:
    """What assisted generation drafts first: the target's own token after the prompt, then k drafts."""
    drafter.generation_config.num_assistant_tokens = k
    proposals = []
    drafting = SinglePositionMultiTokenCandidateGenerator.get_candidates

    def listen(*args: object, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor | None]:
        candidates, scores = drafting(*args, **kwargs)
        if scores is not None:  # None in the first call, which runs the target only
            proposals.append(candidates[0, len(prompt) :].tolist())
        return candidates, scores

    with mock.patch.object(SinglePositionMultiTokenCandidateGenerator, "get_candidates", listen):
        # Room for the target's token, the drafts, and the token that verifying always adds.
        ids = torch.tensor([list(prompt)])
        target.generate(ids, assistant_model=drafter, do_sample=False, max_new_tokens=k + 2)
    assert len(proposals[0]) == k + 1
    return proposals[0]
