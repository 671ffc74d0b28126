"""Liger's Triton kernels (arXiv 2410.10989) in place of a model's norms, gated layers and rotary positions, on CUDA.

Its losses stay out: ours sees supervised positions only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from ftkit.attention import Unsupported
from ftkit.errors import MissingDependency, RecipeError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ftkit.report import Reporter

SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new")  # what the kernels of gated layers compute
ABSENT = object()
LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


class Liger:
    """A model whose modules compute with Liger's kernels until `remove`.

    Liger changes modules, and names in the Python module of the architecture; both are put back.  Raises Unsupported
    where it has nothing for the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        text = model.config.get_text_config()
        activation = getattr(text, "hidden_act", None) or getattr(text, "hidden_activation", None)
        wanted = {"rms_norm": True, "layer_norm": True, "swiglu": activation in SILU, "geglu": activation in GELU}
        places = [vars(module) for module in model.modules()] + [vars(sys.modules[type(model).__module__])]
        before = [dict(place) for place in places]
        self._changed: list[tuple[dict[str, Any], str, Any]] = []
        for rope in (True, False):  # for some architectures it has no rotary positions
            try:
                _apply_liger_kernel_to_instance(model=model, rope=rope, **wanted, **LOSSES)
                reason = "its modules are none of those that there are kernels for"
                break
            except (NotImplementedError, TypeError, ValueError, AttributeError) as error:
                reason = str(error)
                self._changed = [*_changes(places, before)]
                self.remove()
        self._changed = [*_changes(places, before)]
        if not self._changed:
            raise Unsupported(reason)

    def remove(self) -> None:
        """Leave the model, and its architecture, as they were."""
        for place, name, value in self._changed:
            if value is ABSENT:
                del place[name]
            else:
                place[name] = value
        self._changed = []


def _changes(places: list[dict[str, Any]], before: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Where something is other than before, its name, and what it was."""
    for place, old in zip(places, before, strict=True):
        yield from ((place, name, old.get(name, ABSENT)) for name in place if place[name] is not old.get(name, ABSENT))


def check(asked: bool | Literal["auto"], device: torch.device) -> None:
    """Raise MissingDependency where the kernels are asked for and cannot be had."""
    if asked is not True:
        return
    if device.type != "cuda":
        raise MissingDependency("train.liger: true needs a GPU: Liger's kernels are made by Triton; leave it out")
    if not installed():
        raise MissingDependency("train.liger: true needs Liger's kernels, which are not installed: pip install 'ftkit[liger]'")


def installed() -> bool:
    return find_spec("liger_kernel") is not None and find_spec("triton") is not None


def choose(asked: bool | Literal["auto"], model: PreTrainedModel, device: torch.device, report: Reporter) -> Liger | None:
    """The model with Liger's kernels, where that is asked for or possible (`auto`); says so.

    Raises RecipeError where they are asked for, and there are none for the architecture.
    """
    check(asked, device)
    if asked is False or device.type != "cuda" or not installed():
        return None
    try:
        found = Liger(model)
    except Unsupported as error:
        if asked is True:
            raise RecipeError(f"train.liger: Liger has no kernels for {type(model).__name__}: {error}") from error
        return None
    report.note(f"Liger's kernels compute norms, gated layers or rotary positions of {type(model).__name__} (train.liger: false leaves them to torch)")
    return found
