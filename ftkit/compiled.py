"""Layers that torch.compile turns into kernels of their own, one by one: layers of one kind share what is compiled."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from ftkit.attention import layers_of
from ftkit.errors import MissingDependency, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check(model: PreTrainedModel, device: torch.device) -> None:
    """Refuse what cannot be compiled: no list of layers, no compiler."""
    if not layers_of(model):
        raise RecipeError(f"train.compile: {type(model).__name__} has no single list of layers to compile; leave it out")
    if device.type == "cuda" and find_spec("triton") is None:
        raise MissingDependency("train.compile needs Triton on a GPU, which is not installed: pip install triton")
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))):
        raise MissingDependency("train.compile needs a C++ compiler on a CPU, such as g++ or that of the environment variable CXX; none was found")


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each layer for batches of any size, at its first call; what it computes stays the same up to rounding."""
    for layer in layers_of(model):
        layer.compile(dynamic=True)


def seconds() -> float:
    """What compiling took in this process so far."""
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent().get("total_wall_time", 0.0)


def undo(model: PreTrainedModel) -> None:
    """Leave layers to Python again."""
    for layer in layers_of(model):
        layer._compiled_call_impl = None
