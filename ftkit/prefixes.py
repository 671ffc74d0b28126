"""Keys and values in front of those of every row, in every attention of a model: what prefix tuning learns.

Prefixes take no positions, and caches of earlier tokens do not hold them: `attention.attend` puts them in front.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ftkit import attention
from ftkit.layout import EXPECTED
from ftkit.methods.modules import two_stacks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STD = 0.02  # of random first values, as of weights: keys that no query prefers, and values that add little
SEEN = "ftkit-seen"  # what transformers calls the attention function that looks at keys and values


class Seen(NamedTuple):
    """An attention module, and the keys and values that it was called with."""

    module: nn.Module
    keys: torch.Tensor  # [1, heads of keys, L, head_dim]
    values: torch.Tensor


class Shared(nn.Module):
    """The part of a reparametrisation that all layers share: [n, width] -> [n, hidden] (arXiv 2101.00190, 4.3)."""

    def __init__(self, length: int, width: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(length, width))
        self.linear = nn.Linear(width, hidden)

    def forward(self) -> torch.Tensor:
        return self.linear(self.weight).tanh()


class Prefix(nn.Module):
    """Keys and values of one attention: learned, or a linear layer's of what all of them share."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, shared: Shared | None = None, owns: bool = False) -> None:
        """keys, values: [heads, n, head_dim], the first ones, or of which only the shapes count; `owns`: the shared part is registered here."""
        super().__init__()
        self._heads = len(keys)
        self._shared = () if shared is None else (shared,)  # in a tuple, so that it is registered once
        if shared is None:
            self.weight = nn.Parameter(torch.stack((keys, values)).detach().float())
            return
        self.projection = nn.Linear(shared.linear.out_features, self._heads * (keys.shape[2] + values.shape[2]))
        self._widths = keys.shape[2], values.shape[2]
        if owns:
            self.shared = shared

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._shared:
            return self.weight[0], self.weight[1]
        with torch.autocast(self.projection.weight.device.type, enabled=False):
            made = self.projection(self._shared[0]())  # [n, heads * (key_dim + value_dim)]
        keys, values = made.unflatten(1, (self._heads, -1)).transpose(0, 1).split(self._widths, 2)
        return keys, values


def add(model: PreTrainedModel, length: int, hidden: int | None = None, ids: Sequence[int] = ()) -> None:
    """Put a prefix of `length` into every attention: those of the tokens `ids`, which are as many, or small random ones.

    `hidden`: they are made by networks of this width, from random numbers.  Raises Unsupported where attention is the model's own.
    """
    found = seen(model, ids)
    attention.use(model)
    width = model.config.get_text_config().hidden_size
    owner, device = found[0].module, found[0].keys.device
    with torch.device("meta" if device.type == "meta" else "cpu"):  # drawn alike wherever the model is
        shared = None if hidden is None else Shared(length, width, hidden)
        for module, keys, values in found:
            first = [states[0].float() if ids else torch.randn(states.shape[1], length, states.shape[3]) * STD for states in (keys, values)]
            module.add_module("prefix", Prefix(first[0], first[1], shared, owns=module is owner).to(device))


@contextmanager
def absent(model: nn.Module) -> Iterator[None]:
    """Herein attention looks at no prefixes."""
    kept = [(module, module._modules.pop("prefix")) for module in list(model.modules()) if isinstance(getattr(module, "prefix", None), Prefix)]
    try:
        yield
    finally:
        for module, prefix in kept:
            module.add_module("prefix", prefix)


@torch.no_grad()
def fold(model: PreTrainedModel) -> None:
    """Keep what reparametrisations give, without them."""
    made = {module: module() for module in model.modules() if isinstance(module, Prefix)}
    for module in list(model.modules()):
        prefix = getattr(module, "prefix", None)
        if isinstance(prefix, Prefix) and prefix._shared:
            module.prefix = Prefix(*made[prefix])  # type: ignore[assignment]


def seen(model: PreTrainedModel, ids: Sequence[int] = ()) -> list[Seen]:
    """Every attention of a model in the order of its calls, with its keys and values of the tokens `ids`, or of any; also of a model without weights.

    Raises Unsupported where attention is the model's own, or wants what `attend` has not.
    """
    if not model._can_set_attn_implementation():
        raise attention.Unsupported("its attention is its own")
    found: dict[nn.Module, Seen] = {}

    def look(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any) -> Any:
        known = {name: kwargs.pop(name, None) for name in ("dropout", "scaling", "is_causal", "position_bias", "sliding_window")}
        attention.check_known({name: setting for name, setting in kwargs.items() if name not in ("segments", "fast_dropout")})
        found.setdefault(module, Seen(module, key, value))
        return sdpa_attention_forward(module, query, key, value, mask, **{**known, "dropout": 0.0})

    AttentionInterface.register(SEEN, look)
    AttentionMaskInterface.register(SEEN, sdpa_mask)
    before, was_training = model.config._attn_implementation, model.training
    tokens = torch.tensor([list(ids) or [0, 0]], device=model.device)
    inputs = {"input_ids": tokens} | ({"decoder_input_ids": tokens} if two_stacks(model) else {})
    model.set_attn_implementation(SEEN)
    model.eval()
    try:
        with torch.no_grad():
            if model.device.type == "meta":
                _run_without_weights(model, inputs)
            else:
                model.base_model(**inputs)
    finally:
        model.set_attn_implementation(before)
        model.train(was_training)
    if not found:
        raise attention.Unsupported("its attention is its own")
    if model.device.type == "meta":  # experts break it off after the first layer
        first = next(iter(found.values()))
        for module in model.base_model.modules():
            if type(module) is type(first.module):
                found.setdefault(module, first._replace(module=module))
    return list(found.values())


def _run_without_weights(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    """Run a model on the meta device as far as it goes; some code needs values, or kernels that do not work there."""
    for mask in ({}, {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device="meta")}):  # the latter is passed on, where others are made
        try:
            model.base_model(**inputs, **mask)
            return
        except attention.Unsupported:
            raise
        except EXPECTED:
            continue
