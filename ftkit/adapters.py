"""Adapters that no other library loads: what learned, by the names of the model's own modules, in safetensors and JSON.

Beside `adapter.safetensors` lies `adapter.json`: how the base is loaded, the sha256 over its tensors, and the method
with its settings, which puts its modules into the base again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from ftkit import plugins, reload, rundir, verify
from ftkit.errors import RecipeError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ftkit.methods import Method

SETTINGS, WEIGHTS = "adapter.json", "adapter.safetensors"


def write_weights(model: nn.Module, directory: Path) -> None:
    """Everything of a model that learns."""
    directory.mkdir(parents=True, exist_ok=True)
    learned = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters() if parameter.requires_grad}
    save_file(learned, directory / WEIGHTS, {"format": "pt"})


def write_settings(method: Any, artifact: Mapping[str, Any], model: Any, directory: Path) -> None:
    """How what `write_weights` wrote of this model is loaded; a base in few bits differs between devices, and has no sha256."""
    learned = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}
    sha256 = None if "quantization_config" in artifact["load_kwargs"] else verify.base_sha256(reload.digests(model), learned)
    rundir.write_json(directory / SETTINGS, {**artifact, "method": method.model_dump(), "base_sha256": sha256})


def is_own(directory: Path) -> bool:
    """Whether it holds such an adapter."""
    return (directory / SETTINGS).is_file()


def settings(directory: Path) -> dict[str, Any]:
    """What `write_settings` wrote."""
    try:
        return json.loads((directory / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{directory / SETTINGS} cannot be read: {error}") from error


def method_of(directory: Path) -> Method:
    """The method that an adapter was made by, with its settings."""
    given = settings(directory)["method"]
    method: Method = plugins.find("method", given["kind"]).model_validate(given)
    return method


def load(directory: Path, device: str) -> Any:
    """The base with the adapter, in eval mode.

    Raises RecipeError if the base is another one than that of the training.
    """
    artifact = settings(directory)
    model = reload.load_base(directory, artifact, device)
    tensors = weights(directory)
    # some parameters have several names, such as the bias of a head that fills masks
    learned = {id(parameter) for name, parameter in model.named_parameters() if name in tensors}
    names = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in learned}
    if (known := artifact["base_sha256"]) and known != verify.base_sha256(reload.digests(model), names):
        name = reload.base_name(directory, artifact)
        raise RecipeError(f"{name} has changed, or is another model: it is not the base that {directory} was trained on")
    return put_on(model, directory, tensors).eval()


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / WEIGHTS)


def put_on(model: Any, directory: Path, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The base model with the adapter's modules and weights, in the type of its own.

    Raises RecipeError if they do not fit.
    """
    import torch
    from transformers import GenerationConfig

    method_of(directory).attach(model)
    places = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name not in places or places[name].shape != tensor.shape:
            takes = f"takes {tuple(places[name].shape)}" if name in places else "has no place for it"
            raise RecipeError(f"{directory} does not belong to its base: the adapter has {name} of shape {tuple(tensor.shape)}, the base {takes}")
        with torch.no_grad():
            places[name].copy_(tensor)
    if (directory / "generation_config.json").is_file():  # with the tokens that end a turn as it was learned
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model
