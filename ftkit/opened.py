"""A finished run, opened again: to measure it on other rows, or to ask it something."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit import rundir
from ftkit.data.types import Limits
from ftkit.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ftkit.recipe.spec import Recipe


@dataclass
class Opened:
    """A run's model as a fresh process loads it, and what it was trained on."""

    path: Path
    manifest: dict[str, Any]
    recipe: Recipe
    model: nn.Module
    tokenizer: Any
    limits: Limits


def is_run(target: str | Path) -> bool:
    """Whether `target` is the directory of a run that finished."""
    return (Path(target) / "manifest.json").is_file()


def open_run(target: str | Path, device: torch.device) -> Opened:
    """Load the model of a run exactly as its manifest says, in eval mode on `device`."""
    from ftkit.recipe import read
    from ftkit.reload import load

    path = Path(target)
    if not is_run(path):
        raise RecipeError(f"{target} is not a run directory: it has no manifest.json")
    manifest = rundir.read_json(path / "manifest.json")
    if "artifact" not in manifest:
        raise RecipeError(f"{target} has no model yet: its run is {manifest.get('status', 'unfinished')}; continue it with --resume")
    recipe = read(path / "recipe.yaml").recipe
    model, tokenizer = load(path / "model", manifest["artifact"], str(device))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return Opened(path, manifest, recipe, model, tokenizer, Limits(recipe.data.max_length, recipe.data.truncation))
