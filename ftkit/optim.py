"""The optimizer and the learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ftkit.errors import MissingDependency, RecipeError
from ftkit.recipe.spec import Train

if TYPE_CHECKING:
    from ftkit.recipe import Resolved

ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8  # arXiv 1412.6980, section 2
LION_BETAS = (0.9, 0.99)  # arXiv 2302.06675, algorithm 2
SGD_MOMENTUM = 0.9  # arXiv 1512.03385, section 3.4
WSD_DECAY = 0.2  # arXiv 2404.06395 decays over the last 10 %; arXiv 2405.18392 finds 20 % as good as cosine
WIDTH_EXPONENT = 0.78  # of Llamas in tinker-cookbook (hyperparam_utils.py), which has a smaller one for Qwens: lower rates are the safer side
FUSED_DEVICES = ("cuda", "cpu", "mps", "xpu")


def learning_rate(resolved: Resolved, config: Any) -> float:
    """The recipe's; in place of a default that a narrower model was measured with, a lower one, to two digits."""
    rate, default = resolved.recipe.train.learning_rate, resolved.recipe.method.defaults.get("train.learning_rate")
    width = getattr(config.get_text_config(), "hidden_size", None) or 0
    taken = default is not None and resolved.origins.get("train.learning_rate") == f"default: {default.source}"
    if not taken or default.width is None or width <= default.width:
        return rate
    return float(f"{rate * (default.width / width) ** WIDTH_EXPONENT:.1e}")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to matrices; not to norms and other vectors, nor to biases and factors (IA3's) of any shape."""
    return parameter.ndim > 1 and "bias" not in name and ".ia3_" not in name


def build(model: nn.Module, train: Train, device: torch.device, lr_of: Callable[[str], float] | None = None) -> torch.optim.Optimizer:
    """The optimizer over what learns in `model`, in groups of equal weight decay and learning rate.

    `lr_of` gives the peak learning rate of a parameter by its name; train.learning_rate if None.
    Each group keeps its peak as `initial_lr`: the loop sets `lr` to that times the schedule's factor.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            peak = lr_of(name) if lr_of else train.learning_rate
            decay = train.weight_decay if decays(name, parameter) else 0.0
            groups.setdefault((peak, decay), []).append(parameter)
    if not groups:
        raise RecipeError("no parameter learns: the method froze all of them, and the task adds no new head")
    return _optimizer(
        train.optimizer,
        [{"params": parameters, "lr": peak, "initial_lr": peak, "weight_decay": decay} for (peak, decay), parameters in groups.items()],
        device,
    )


def _optimizer(kind: str, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    match kind:
        case "adamw":
            return torch.optim.AdamW(groups, betas=ADAM_BETAS, eps=ADAM_EPS, fused=device.type in FUSED_DEVICES)
        case "sgd":
            return torch.optim.SGD(groups, lr=groups[0]["lr"], momentum=SGD_MOMENTUM)
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingDependency(
            f"train.optimizer: {kind} needs bitsandbytes, which cannot be imported here ({error}); "
            "install it with `pip install bitsandbytes`, or use optimizer: adamw"
        ) from error
    match kind:
        case "adamw_8bit":
            return bitsandbytes.optim.AdamW8bit(groups, betas=ADAM_BETAS, eps=ADAM_EPS)
        case "paged_adamw_8bit":
            return bitsandbytes.optim.PagedAdamW8bit(groups, betas=ADAM_BETAS, eps=ADAM_EPS)
        case "lion_8bit":
            return bitsandbytes.optim.Lion8bit(groups, betas=LION_BETAS)
    raise AssertionError(kind)


def schedule(train: Train, num_steps: int) -> Callable[[int], float]:
    """The factor of the peak learning rate at optimizer step i, counted from 0.

    A pure function of the step, so that a resumed run needs no saved state for it.  Equal to
    transformers' schedules, whose first step has the factor 0 when there is a warm-up; only where
    a share of very few steps would leave nothing but warm-up, the last step gets the peak.
    """
    num_warmup = _warmup_steps(train.warmup, num_steps)
    num_decay = math.ceil(WSD_DECAY * num_steps) if train.schedule == "wsd" else num_steps - num_warmup
    shapes: dict[str, Callable[[float], float]] = {
        "linear": lambda done: 1.0 - done,
        "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
        "constant": lambda done: 1.0,
        "wsd": lambda done: 1.0 - done,
    }
    shape = shapes[train.schedule]

    def factor(step: int) -> float:
        if step < num_warmup:
            return step / num_warmup
        done = max(0, step - (num_steps - num_decay)) / num_decay
        return shape(min(done, 1.0))

    return factor


def _warmup_steps(warmup: float, num_steps: int) -> int:
    if warmup < 1:
        return min(math.ceil(warmup * num_steps), num_steps - 1)
    if int(warmup) >= num_steps:
        raise RecipeError(
            f"train.warmup: {int(warmup)} steps of warm-up, but the run has only {num_steps}: the learning rate would "
            "never reach its peak; give fewer steps, or a share below 1 such as 0.1"
        )
    return int(warmup)
