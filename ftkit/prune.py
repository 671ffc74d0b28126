"""Structured pruning: the attention heads and feed-forward units that matter least are taken out of each layer.

A config has one number of heads and one width for all layers, so each layer loses as many as the others, its own least
important ones: plain transformers loads the result.  No comparison between layers is made, and importances need no norm.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ftkit.data.batches import by_length, collate
from ftkit.errors import RecipeError
from ftkit.loop import Trainee
from ftkit.methods.modules import ATTENTION, attention_outputs, feed_forward_outputs, linear_below_head, size_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from ftkit.data.features import FeatureSet

# What configs call the width of feed-forward layers.
WIDTHS = ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "hidden_dim", "n_inner", "d_inner")
GATED = 2  # the most blocks that the first matrix of a feed-forward layer gives: values, and what gates them


class Part(NamedTuple):
    """Linear layers that share units: a unit is some outputs of the first ones, and the inputs of the last one that read them."""

    inputs: dict[str, int]  # names, and in how many blocks each gives its outputs: all units are in each block, in the same order
    output: str
    units: int


def feed_forward_parts(model: Any) -> list[Part]:
    """A part for each feed-forward layer, whose units are its hidden numbers."""
    hidden = model.config.get_text_config().hidden_size
    sizes = {name: size_of(model.get_submodule(name)) for name in linear_below_head(model) if not ATTENTION.search(name)}
    parts = []
    for output in feed_forward_outputs(model):
        width = sizes[output][0]
        wide = {name: outputs // width for name, (inputs, outputs) in sizes.items() if inputs == hidden and outputs in (width, GATED * width)}
        parts.append(Part(_nearest(wide, output), output, width))
    if not parts or not all(part.inputs for part in parts):
        raise RecipeError(f"--feed-forward: the feed-forward layers of {type(model).__name__} cannot be told by their shapes, so none can be cut; leave it out")
    return parts


def head_parts(model: Any) -> list[Part]:
    """A part for each attention, whose units are its heads; where several queries share a key, such a group is a unit."""
    heads, groups, size = _heads(model.config.get_text_config())
    sizes = {name: size_of(model.get_submodule(name)) for name in linear_below_head(model) if ATTENTION.search(name)}
    parts = []
    for output in attention_outputs(model):
        states = _nearest({name: 1 for name, (_, outputs) in sizes.items() if name != output and outputs in (heads * size, groups * size)}, output)
        if len(states) == 3 and sizes[output][0] == heads * size:  # queries, keys and values
            parts.append(Part(states, output, groups))
    if not parts or len(parts) != len(attention_outputs(model)):
        raise RecipeError(f"--heads: queries, keys and values of {type(model).__name__} cannot be told by their shapes, so no head can be cut; leave it out")
    return parts


def _heads(config: Any) -> tuple[int, int, int]:
    """Heads, groups of them that share a key and a value, and the size of each."""
    heads = config.num_attention_heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def _nearest(candidates: Mapping[str, int], output: str) -> dict[str, int]:
    """Those in the smallest module around `output` that has any."""
    around = output
    while "." in around:
        around = around.rpartition(".")[0]
        if found := {name: blocks for name, blocks in candidates.items() if name.startswith(f"{around}.")}:
            return found
    return {}


def num_kept(units: int, share: float, option: str) -> int:
    """How many units of a layer stay if this share of them goes; RecipeError where that is none, or all."""
    kept = units - round(share * units)
    if not 0 < kept < units:
        raise RecipeError(f"{option}: {share:g} of {units} leaves {kept}; give a share that leaves at least 1 and takes at least 1")
    return kept


def with_fewer_heads(config: Any, groups: int) -> Any:
    """The config with so many groups of heads of the size that they have."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    heads, groups_before, text.head_dim = _heads(text)
    text.num_attention_heads = heads // groups_before * groups
    if hasattr(text, "num_key_value_heads"):
        text.num_key_value_heads = groups
    return config


def with_narrower_layers(config: Any, width: int) -> Any:
    """The config with feed-forward layers of this width."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name in WIDTHS:
        if hasattr(text, name):
            setattr(text, name, width)
    return config


def check_config(model: Any, config: Any, parts: Sequence[Part], kept: int, option: str) -> None:
    """Refuse what plain transformers would not build, from `config`, with the shapes that cutting `parts` to `kept` units gives."""
    expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    for part in parts:
        for name in (*part.inputs, part.output):
            linear = isinstance(model.get_submodule(name), nn.Linear)
            side = int(linear == (name == part.output))
            expected[f"{name}.weight"][side] = expected[f"{name}.weight"][side] // part.units * kept
            if name != part.output and f"{name}.bias" in expected:
                expected[f"{name}.bias"] = [expected[f"{name}.weight"][side]]
    try:
        with torch.device("meta"):
            built = {name: list(parameter.shape) for name, parameter in type(model)(config).named_parameters()}
    except ValueError:  # heads that do not divide the hidden size
        built = {}
    if not built or any(built[name] != shape for name, shape in expected.items() if name in built):
        why = "the size of a head follows from their number, or more than attention depends on it" if option == "--heads" else "their width is fixed"
        raise RecipeError(f"{option}: no config of {type(model).__name__} means {kept} in each layer and all else as it is ({why}); leave {option} out")


def importance(
    model: Any, parts: Sequence[Part], trainee: Trainee, features: FeatureSet, pad_token_id: int, advance: Callable[[int], None]
) -> list[torch.Tensor]:
    """How much the loss of a row would change without each unit, to first order, summed over the rows: float64 [units] of each part.

    |d loss / d gate| at 1 for a gate on each unit, which is |sum of activation x gradient| over the positions of a row
    (heads: arXiv 1905.10650; units: arXiv 1611.06440).
    """
    found = [torch.zeros(part.units, dtype=torch.float64) for part in parts]
    seen: list[tuple[int, torch.Tensor]] = []

    def watch(number: int) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor]) -> None:
            seen.append((number, args[0]))

        return model.get_submodule(parts[number].output).register_forward_pre_hook(hook)

    handles = [watch(number) for number in range(len(parts))]
    trainee.eval()
    try:
        for indices in by_length(features.lengths, 8):
            batch = collate(features, indices, pad_token_id).to(model.device)
            loss = trainee(batch).sum()
            activations = [activation for _, activation in seen]
            for (number, activation), gradient in zip(seen, torch.autograd.grad(loss, activations), strict=True):
                gates = (activation.detach() * gradient).reshape(len(batch.input_ids), -1, parts[number].units, activation.shape[-1] // parts[number].units)
                found[number] += gates.double().sum((1, 3)).abs().sum(0).cpu()
            seen.clear()
            advance(len(indices))
    finally:
        for handle in handles:
            handle.remove()
    return found


def most_important(values: torch.Tensor, kept: int) -> torch.Tensor:
    """The places of the `kept` largest values in ascending order, int64 [kept]; of equal ones the first."""
    return values.argsort(descending=True, stable=True)[:kept].sort().values


@contextmanager
def zeroed(model: Any, parts: Sequence[Part], kept: Sequence[torch.Tensor]) -> Iterator[None]:
    """For this time, all units but the kept ones are 0."""
    with ExitStack() as stack:
        for part, places in zip(parts, kept, strict=True):
            module = model.get_submodule(part.output)
            mask = torch.zeros(part.units, device=model.device)
            mask[places] = 1
            mask = mask.repeat_interleave(size_of(module)[0] // part.units)
            handle = module.register_forward_pre_hook(lambda _, args, mask=mask: (args[0] * mask,))
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def cut(model: Any, parts: Sequence[Part], kept: Sequence[torch.Tensor], config: Any) -> None:
    """Take all units but the kept ones out, in place."""
    for part, places in zip(parts, kept, strict=True):
        for name, blocks in part.inputs.items():
            _select(model.get_submodule(name), _rows(size_of(model.get_submodule(name))[1], blocks, part.units, places), of_inputs=False)
        output = model.get_submodule(part.output)
        _select(output, _rows(size_of(output)[0], 1, part.units, places), of_inputs=True)
    model.config = config


def _rows(count: int, blocks: int, units: int, places: torch.Tensor) -> torch.Tensor:
    """Which of `count` numbers belong to the units at these places."""
    return torch.arange(count).view(blocks, units, -1)[:, places].flatten()


def _select(layer: Any, rows: torch.Tensor, of_inputs: bool) -> None:
    """Keep some inputs or outputs of a linear layer."""
    linear = isinstance(layer, nn.Linear)
    rows = rows.to(layer.weight.device)
    layer.weight = nn.Parameter(layer.weight.index_select(int(linear == of_inputs), rows), layer.weight.requires_grad)
    if not of_inputs and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[rows], layer.bias.requires_grad)
    setattr(layer, ("in_features" if of_inputs else "out_features") if linear else ("nx" if of_inputs else "nf"), len(rows))
