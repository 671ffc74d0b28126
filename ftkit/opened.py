"""A finished run, opened again: to measure it on other rows, or to ask it something."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit import rundir
from ftkit.data.types import Limits
from ftkit.device import pick, use_all_cores, use_kernels_for
from ftkit.errors import RecipeError

if TYPE_CHECKING:
    from os import PathLike

    import torch

    from ftkit.recipe.spec import Recipe
    from ftkit.report import Reporter


@dataclass
class Opened:
    """A run's model as a fresh process loads it, and what it was trained on."""

    path: Path
    manifest: dict[str, Any]
    recipe: Recipe
    model: Any
    tokenizer: Any
    limits: Limits


def open_here(target: str | Path, report: Reporter) -> Opened:
    """`open_run` where this process computes, with all its cores and the kernels of a run."""
    use_all_cores()
    use_kernels_for("fp32")
    with report.stage("loading the model"):
        return open_run(target, pick())


def open_run(target: str | Path, device: torch.device) -> Opened:
    """Load the model of a run exactly as its manifest says, in eval mode on `device` (int8: on the CPU).

    Raises RecipeError if `target` is no finished run, HubError if its base is on the hub and cannot be had.
    """
    from ftkit import reload
    from ftkit.model import quiet_libraries
    from ftkit.recipe import read
    from ftkit.sources import Source, hub_errors

    path = Path(target)
    if not rundir.is_run(path):
        what = "has no manifest.json of ftkit" if path.is_dir() else "does not exist" if not path.exists() else "is a file"
        raise RecipeError(f"{target} is not a run directory: it {what}")
    manifest = rundir.finished(path)
    artifact = manifest["artifact"]
    recipe = read(path / "recipe.yaml").recipe
    quiet_libraries()
    directory = path / "model"
    model = load(directory, artifact, device)
    with hub_errors(Source(str(directory))):
        tokenizer = reload.load_tokenizer(directory, artifact)
    assert recipe.data.max_length is not None, "a run resolves it"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return Opened(path, manifest, recipe, model, tokenizer, Limits(recipe.data.max_length, recipe.data.truncation))


def load(directory: Path, artifact: dict[str, Any], device: torch.device) -> Any:
    """A run's model exactly as an artifact says, in eval mode.

    Raises HubError if its base is on the hub and cannot be had, DiskError if a file of weights is broken.
    """
    from ftkit import reload
    from ftkit.model import mend
    from ftkit.sources import Source, check_whole, hub_errors

    weights = reload.base_name(directory, artifact) if artifact.get("base") else str(directory)
    check_whole(directory)
    with hub_errors(Source(weights, artifact.get("revision"))):
        model = _load(directory, artifact, str(device))
    mend(model)
    return model


def _load(directory: Path, artifact: dict[str, Any], device: str) -> Any:
    """The model of a run: as its manifest says, but for soft prompts, of which PEFT loses positions and takes no padding on the left.

    One that its manifest puts into 8 bits is on the CPU, for which these are.
    """
    from ftkit import prompts, reload

    loader = prompts if artifact["loads_with"] == "peft" and prompts.is_stored(directory) else reload
    if "quantise" not in artifact:
        return loader.load(directory, artifact, device)
    from ftkit import int8

    model = loader.load(directory, artifact, "cpu")
    int8.quantise(model)
    return model


def load_model(path: str | PathLike[str], device: str) -> Any:
    """`ftkit.load`."""
    from ftkit import adapters, merge, prompts

    given = Path(path)
    if rundir.is_run(given):
        artifact = rundir.finished(given)["artifact"]
        return _load(given / "model", artifact, device)
    if adapters.is_own(given):
        return adapters.load(given, device)
    if rundir.is_run(given.parent) and given.name == "model":
        return load_model(given.parent, device)
    if prompts.is_stored(given):
        return _load(given, merge.find(given).artifact, device)
    what = "is no run directory, nor the model of one" if given.is_dir() else "does not exist"
    raise RecipeError(f"{path} {what}")
