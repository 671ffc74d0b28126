"""A text's embedding from the states of its tokens, and the files that tell sentence-transformers how it is made.

The files are those of its `SentenceTransformer.save`, with the keys that its versions from 2.0 to 6.2 read.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from pathlib import Path

    import torch

Pooling: TypeAlias = Literal["mean", "cls", "last"]

MODES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "last": "pooling_mode_lasttoken"}
OTHER_MODES = ("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens")
FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json")
POOLING, NORMALIZE = "1_Pooling", "2_Normalize"


def pool(states: torch.Tensor, mask: torch.Tensor, how: Pooling) -> torch.Tensor:
    """Of texts padded on the right, states [B, n + L, H] and mask [B, L]: float32 [B, H].  Of n virtual tokens in front there are states like any other."""
    import torch
    from torch.nn import functional as F

    mask = F.pad(mask, (states.shape[1] - mask.shape[1], 0), value=1)
    states, lengths = states.float(), mask.sum(1)
    if how == "mean":
        return (states * mask.unsqueeze(-1)).sum(1) / lengths.unsqueeze(-1)
    return states[:, 0] if how == "cls" else states[torch.arange(len(states), device=states.device), lengths - 1]


def write_layout(directory: Path, width: int, how: Pooling, normalize: bool, max_length: int) -> None:
    """Beside a model of transformers: its texts have `max_length` tokens at most, and its states `width` numbers."""
    from ftkit import rundir

    steps = [("", "Transformer"), (POOLING, "Pooling"), *([(NORMALIZE, "Normalize")] if normalize else [])]
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"} for i, (path, kind) in enumerate(steps)]
    settings: dict[str, Any] = {"word_embedding_dimension": width, **dict.fromkeys((*MODES.values(), *OTHER_MODES), False), MODES[how]: True}
    rundir.write_json(directory / FILES[0], modules)
    rundir.write_json(directory / FILES[1], {"max_seq_length": max_length, "do_lower_case": False})
    rundir.write_json(directory / FILES[2], {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"})
    rundir.write_json(directory / POOLING / "config.json", settings)
    if normalize:
        rundir.write_json(directory / NORMALIZE / "config.json", {})


def copy_layout(source: Path, directory: Path) -> None:
    """The files that `write_layout` wrote beside one model, if it did, beside another."""
    for name in (*FILES, POOLING, NORMALIZE):
        if (source / name).is_dir():
            shutil.copytree(source / name, directory / name)
        elif (source / name).is_file():
            shutil.copy(source / name, directory)
