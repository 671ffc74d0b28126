"""Students that begin as parts of a stored model: some of its layers, or a BERT as a DistilBERT (arXiv 1910.01108, 2 and 3)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn

from ftkit.attention import layers_of
from ftkit.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ftkit.recipe.spec import Model

# What DistilBERT calls the modules of BERT that it has, as transformers' examples/research_projects/distillation/scripts/extract_distilbert.py
IN_LAYERS = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}
ELSEWHERE = {
    "bert": "distilbert",
    "cls.predictions.transform.dense": "vocab_transform",
    "cls.predictions.transform.LayerNorm": "vocab_layer_norm",
    "cls.predictions.decoder": "vocab_projector",
}
SETTINGS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "hidden_act": "activation",
    "initializer_range": "initializer_range",
    "pad_token_id": "pad_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
}


def config_of(stored: PreTrainedConfig, spec: Model) -> PreTrainedConfig:
    """That of the part of a stored model that `model.layers` and `model.convert` ask for; a copy where they ask for nothing.

    Raises RecipeError for layers that there are not, and where there are two stacks of them, or one layer that runs many times.
    """
    config = copy.deepcopy(stored)
    if spec.layers is not None:
        _keep(config, spec.layers)
    if spec.convert is not None:
        if config.model_type != "bert":
            raise RecipeError(f"model.convert: {spec.convert} is made of a BERT, and this is {config.model_type}; leave it out")
        config = transformers.DistilBertConfig(**{theirs: getattr(config, own) for own, theirs in SETTINGS.items()})
        config._commit_hash = getattr(stored, "_commit_hash", None)
    return config


def _keep(config: PreTrainedConfig, layers: Sequence[int]) -> None:
    """Let a config have these of its layers, in this order."""
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise RecipeError(f"model.layers: {config.model_type} has two stacks of layers, and the list does not say of which; leave it out")
    if hasattr(text, "num_hidden_groups"):
        raise RecipeError(f"model.layers: {config.model_type} has one layer for all; give model.config: {{num_hidden_layers: {len(layers)}}}")
    if beyond := [layer for layer in layers if layer >= text.num_hidden_layers]:
        raise RecipeError(f"model.layers: there is no layer {beyond[0]}: {config.model_type} has {text.num_hidden_layers}, counted from 0")
    for name, values in text.to_dict().items():
        if "layer" in name and isinstance(values, list) and len(values) == text.num_hidden_layers:  # layer_types, no_rope_layers, ...
            setattr(text, name, [values[layer] for layer in layers])
    text.num_hidden_layers = len(layers)


@torch.no_grad()
def take(student: PreTrainedModel, whole: PreTrainedModel, spec: Model) -> dict[str, str]:
    """Copy into the student, tensor by tensor, what it shares with the whole model; names there -> names here.

    Raises RecipeError where the layers of the whole model cannot be told from its other modules.
    """
    own, stored = student.state_dict(), whole.state_dict()
    names = {name: here for name in stored if (here := _here(name, _layers(student), _layers(whole), spec)) in own}
    for there, here in names.items():
        own[here].copy_(stored[there])
    if spec.convert:  # rows of one text see their first kind of token alone, which DistilBERT has no embedding for
        ours: Any = student.base_model
        theirs: Any = whole.base_model
        ours.embeddings.position_embeddings.weight += theirs.embeddings.token_type_embeddings.weight[0]
    return names


def _layers(model: PreTrainedModel) -> str:
    """What the list of a model's layers is called."""
    layers = layers_of(model)
    found = (name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and [*module] == layers)
    if not layers or (name := next(found, None)) is None:
        raise RecipeError(f"model.layers: the layers of {type(model).__name__} cannot be told from its other modules; leave it out")
    return name


def _here(name: str, here: str, there: str, spec: Model) -> str | None:
    """What a tensor of the whole model is called in the student, where the list of layers has another name; None for one of a layer that is left out."""
    if not name.startswith(f"{there}."):
        return _renamed(name, ELSEWHERE) if spec.convert else name
    number, _, inner = name.removeprefix(f"{there}.").partition(".")
    place = int(number) if spec.layers is None else spec.layers.index(int(number)) if int(number) in spec.layers else None
    return None if place is None else f"{here}.{place}.{_renamed(inner, IN_LAYERS) if spec.convert else inner}"


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    return next((new + name.removeprefix(old) for old, new in modules.items() if name.startswith(f"{old}.")), name)
