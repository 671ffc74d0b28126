"""Liger's Triton kernels (arXiv 2410.10989) in place of a model's norms, gated layers and rotary positions, on CUDA.

Its losses stay out: ours sees supervised positions only.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from ftkit.errors import MissingDependency, RecipeError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ftkit.report import Reporter

SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh", "gelu_new")  # what the kernels of gated layers compute
_ABSENT = object()


class Liger:
    """A model whose modules compute with Liger's kernels until `remove`.

    Liger changes modules, and names in the Python module of the architecture; both are put back.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        places = [vars(module) for module in model.modules()] + [vars(sys.modules[type(model).__module__])]
        before = [dict(place) for place in places]
        activation = getattr(model.config.get_text_config(), "hidden_act", None) or getattr(model.config.get_text_config(), "hidden_activation", None)
        _apply_liger_kernel_to_instance(
            model=model,
            rope=True,
            rms_norm=True,
            layer_norm=True,
            swiglu=activation in SILU,
            geglu=activation in GELU,
            cross_entropy=False,
            fused_linear_cross_entropy=False,
        )
        self._changed = [
            (place, name, old.get(name, _ABSENT))
            for place, old in zip(places, before, strict=True)
            for name in place
            if old.get(name, _ABSENT) is not place[name]
        ]

    def remove(self) -> None:
        """Leave the model, and its architecture, as they were."""
        for place, name, value in self._changed:
            if value is _ABSENT:
                del place[name]
            else:
                place[name] = value
        self._changed = []


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
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known

    kind = model.config.model_type
    if kind not in known:
        if asked is True:
            raise RecipeError(f"train.liger: Liger has no kernels for {kind}; it has some for {', '.join(sorted(known))}")
        return None
    report.note(f"Liger's kernels compute the norms, gated layers and rotary positions of {type(model).__name__} (train.liger: false leaves them to torch)")
    return Liger(model)
