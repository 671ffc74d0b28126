"""Weights in few bits, as bitsandbytes holds them: counted, kept as they were loaded, and with biases that can learn."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn


def num_values(parameter: torch.Tensor) -> int:
    """How many numbers a tensor stands for: 4-bit tensors hold two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def share_in_few_bits(model: nn.Module) -> float:
    """How much of a model's values are in packed or whole bytes, not in float."""
    counts = [(num_values(parameter), parameter.is_floating_point()) for parameter in model.parameters()]
    return sum(count for count, is_float in counts if not is_float) / sum(count for count, _ in counts)


def as_objects(extra: dict[str, Any]) -> dict[str, Any]:
    """A method's JSON-able load arguments as transformers takes them."""
    if "quantization_config" not in extra:
        return extra
    return extra | {"quantization_config": transformers.BitsAndBytesConfig(**extra["quantization_config"])}


def steady_quantised(model: nn.Module) -> None:
    """Keep the layers of bitsandbytes <= 0.50 from rewriting themselves in a forward pass.

    What later steps, saves or dequantisation see would change: in eval mode, CPUs with avx512_bf16 repack 4-bit weights
    in place (bitsandbytes issue 2078); and every layer rounds its bias, in place, to the type that it computes in.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        if _of_bitsandbytes(module) and module.bias is not None:
            _keep_bias(module)


def _of_bitsandbytes(module: nn.Module) -> bool:
    return hasattr(module, "compute_type_is_set") or hasattr(module, "init_8bit_state")


def _keep_bias(module: Any) -> None:
    """Give a layer its bias back after each forward pass."""
    stored: list[tuple[nn.Parameter, torch.Tensor]] = []

    def give_back(*_: Any) -> None:
        bias, data = stored.pop()
        bias.data = data

    module.register_forward_pre_hook(lambda *_: stored.append((module.bias, module.bias.data)))
    module.register_forward_hook(give_back, always_call=True)  # recomputed layers may end early


def add_biases_apart(model: nn.Module) -> None:
    """Let layers of bitsandbytes add their biases to what they give without, so that these can learn in float32.

    A layer that computes in bfloat16 would give them gradients of that type, which no optimizer takes.
    """
    for module in model.modules():
        if _of_bitsandbytes(module) and module.bias is not None:
            _add_bias_apart(module)


def _add_bias_apart(module: Any) -> None:
    taken: list[nn.Parameter] = []

    def take(*_: Any) -> None:
        taken.append(module.bias)
        module.bias = None

    def add(_: Any, args: Any, output: torch.Tensor | None) -> torch.Tensor | None:
        module.bias = taken.pop()
        return None if output is None else output + module.bias.to(output.dtype)

    module.register_forward_pre_hook(take)
    module.register_forward_hook(add, always_call=True)
