"""Linear layers in 8 bits for inference on a CPU: weights rounded once, inputs as they come.

Of what torch 2.13 has, the kernel of `quantized.linear_dynamic` was the fastest for single rows, and faster than float for batches, too
(MiniLM on two cores with VNNI); `torch._int_mm` and `onednn.qlinear_pointwise` leave the rounding of inputs to several calls more.  Its
packed weights are no tensors that could be saved: the float model is what is stored, and a load rounds it again to the same bits.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from ftkit.methods.modules import linear_below_head, size_of
from ftkit.model import head_of

KIND = "int8"  # what a manifest calls it
STEPS = 127  # of a weight, on either side of 0


class Int8Linear(nn.Module):
    """A linear layer with a scale for each output, and one for each tensor of inputs, float32 to float32."""

    weight = None  # some architectures ask for its type

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.inputs, self.outputs = size_of(layer)
        weight = (layer.weight if isinstance(layer, nn.Linear) else layer.weight.T).detach().float()  # [outputs, inputs]; Conv1D's is the other way round
        bias = None if layer.bias is None else layer.bias.detach().float()
        scales = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny).double() / STEPS
        with warnings.catch_warnings():  # torch 2.13 will drop such tensors some day (pytorch issue 184982)
            warnings.filterwarnings("ignore", message=".*quantize_per_channel.*")
            rounded = torch.quantize_per_channel(weight, scales, torch.zeros(self.outputs, dtype=torch.int64), 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(rounded, bias)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs]."""
        # Without VNNI, sums of two products are kept in 16 bits, which inputs of 8 bits overflow: 7 are taken, as torch's own layer does.
        return torch.ops.quantized.linear_dynamic(inputs.float(), self.packed, reduce_range=not torch.cpu._is_vnni_supported())


def quantise(model: Any) -> None:
    """Put the linear layers below the head into 8 bits, in place; embeddings, norms and head stay as they are."""
    heads = tuple(f"{head}." for head in head_of(model))
    for name in linear_below_head(model):
        if f"{name}.".startswith(heads):  # where the base is the model itself
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Int8Linear(model.get_submodule(name)))


def num_bytes(model: nn.Module) -> int:
    """What the weights of a model take in memory."""
    packed = sum(module.outputs * (module.inputs + 8) for module in model.modules() if isinstance(module, Int8Linear))  # with a scale and a bias each
    return packed + sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
