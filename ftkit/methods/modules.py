"""What a model's module tree tells: its layers, its linear modules, and how a recipe names them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ftkit.errors import RecipeError

if TYPE_CHECKING:
    from torch import nn

    from ftkit.model import Base

ATTENTION = re.compile(r"(attn|attention)(\.|$)", re.IGNORECASE)
# k_proj, key, v_lin, value_proj, ...; and what gives queries, too, at once: c_attn, qkv_proj, query_key_value, Wqkv, query_key
KEY_VALUE = re.compile(r"^(k|v|key|value)(_|$)|^(c_attn|in_proj)$|q_?k_?v|query_key|key_value", re.IGNORECASE)
QUERY = re.compile(r"^q(_|$)|query", re.IGNORECASE)
ADDED = re.compile(r"\.(lora|ia3|vera)_|\.(bottleneck|prompt|prefix)\.|\.trainable_tokens_")


def added(name: str) -> bool:
    """Whether the name of a tensor says that a method put it beside the base."""
    return ADDED.search(name) is not None


def base_prefix(model: Any) -> str:
    """What the names of a base model's parameters begin with; empty where the base model is the model itself."""
    return f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""


def two_stacks(model: Any) -> bool:
    """Whether a decoder reads what an encoder makes of a row; of T5, what tags tokens has the encoder alone."""
    return bool(model.config.is_encoder_decoder) and model.get_decoder() is not model.base_model


def embedding_of(model: Any) -> Any:
    """The module that embeds the tokens of a row: that of the encoder, where this is a model that has one."""
    from transformers import PreTrainedModel

    encoder = model.get_encoder()
    return (encoder if isinstance(encoder, PreTrainedModel) else model).get_input_embeddings()


def layers(base: Base) -> list[str]:
    """Names of the layers of the base model, bottom first: the entries of its longest list of alike modules.

    An encoder-decoder has two such lists: the encoder's layers come first.
    """
    from torch import nn

    lists = [(name, module) for name, module in base.inner().named_modules() if isinstance(module, nn.ModuleList) and len({type(m) for m in module}) == 1]
    # Nested lists (experts in a layer) are longer names: the outermost wins.
    outer = [item for item in lists if not any(item[0].startswith(f"{name}.") for name, _ in lists)]
    if not outer:
        raise RecipeError(f"{type(base.model).__name__} has no list of layers to choose from; name parameters with method.pattern")
    longest = max(len(module) for _, module in outer)
    stacks = [item for item in outer if len(item[1]) == longest or "layer" in item[0].lower() or "block" in item[0].lower()]
    return [f"{base_prefix(base.model)}{name}.{i}" for name, module in stacks for i in range(len(module))]


def linear_modules(base: Base) -> list[str]:
    """Names of the linear modules of the base model, without new modules and poolers."""
    skip = (*base.new_modules, *base.head)
    return [name for name in linear_below_head(base.model) if not any(name == part or name.startswith(f"{part}.") for part in skip)]


def linear_below_head(model: Any) -> list[str]:
    """Names of the linear modules below a model's head (nn.Linear, GPT-2's Conv1D, quantised ones), without poolers."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    prefix = base_prefix(model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return [name for name in linear if name.startswith(prefix) and "pooler" not in name.split(".")]


def keys_and_values(base: Base) -> list[str]:
    """The linear modules that give keys and values of attention, with queries where one matrix gives all."""
    chosen = [name for name in linear_modules(base) if ATTENTION.search(name) and KEY_VALUE.search(name.rpartition(".")[2])]
    if not chosen:
        raise RecipeError(
            f"method.targets: {type(base.model).__name__} has no keys and values that can be told by name; there are {endings(linear_modules(base))}"
        )
    return chosen


def feed_forward_outputs(model: Any) -> list[str]:
    """The linear modules outside of attention that lead from a wider space back to the hidden states: the second ones of feed-forward layers."""
    hidden = model.config.get_text_config().hidden_size
    sizes = {name: size_of(model.get_submodule(name)) for name in linear_below_head(model) if not ATTENTION.search(name)}
    return [name for name, (inputs, outputs) in sizes.items() if inputs > outputs == hidden]


def attention_outputs(model: Any) -> list[str]:
    """The linear modules in which attention ends: those that lead to the hidden states and give no queries, keys or values."""
    hidden = model.config.get_text_config().hidden_size
    found = []
    for name in linear_below_head(model):
        last = name.rpartition(".")[2]
        gives_states = KEY_VALUE.search(last) or QUERY.search(last)
        if ATTENTION.search(name) and not gives_states and size_of(model.get_submodule(name))[1] == hidden:
            found.append(name)
    return found


def choose_targets(base: Base, targets: str | list[str], only_layers: list[int] | None = None, field: str = "targets") -> list[str]:
    """The linear modules that `targets` means: `all-linear`, `attention`, a regex, or a list of name endings; of some layers, or all.

    A target that matches nothing is refused with the names there are; recipes call it `method.<field>`.
    """
    names = linear_modules(base)
    if only_layers is not None:
        known = layers(base)
        if wrong := [number for number in only_layers if number >= len(known)]:
            raise RecipeError(f"method.layers: {wrong[0]}, but the {len(known)} layers of {type(base.model).__name__} are counted from 0")
        names = [name for name in names if any(name.startswith(f"{known[number]}.") for number in only_layers)]
    if targets == "all-linear":
        chosen = set(names)
    elif targets == "attention":
        chosen = {name for name in names if ATTENTION.search(name)}
    elif isinstance(targets, str):
        chosen = {name for name in names if _pattern(f"method.{field}", targets).search(name)}
    else:
        chosen = set()
        for target in targets:
            hits = {name for name in names if name == target or name.endswith(f".{target}")}
            if not hits:
                raise RecipeError(f"method.{field}: {target!r} matches no linear module of {type(base.model).__name__}; there are {endings(names)}")
            chosen |= hits
    if not chosen:
        raise RecipeError(f"method.{field}: {targets!r} matches no linear module of {type(base.model).__name__}; there are {endings(names)}")
    return [name for name in names if name in chosen]


def shortest_endings(chosen: list[str], model: nn.Module) -> list[str]:
    """The fewest words that name exactly the chosen modules: what an adapter's config can carry to other checkpoints."""
    others = [name for name, _ in model.named_modules() if name and name not in set(chosen)]
    endings: set[str] = set()
    for name in chosen:
        if any(name == e or name.endswith(f".{e}") for e in endings):
            continue
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            ending = ".".join(parts[-length:])
            if not any(other == ending or other.endswith(f".{ending}") for other in others):
                break
        endings.add(ending)
    return sorted(endings)


def matching(pattern: str, names: list[str], field: str) -> list[str]:
    """The names that a pattern of PEFT's means: it is a regular expression for their end, from a dot or the beginning."""
    found = _pattern(field, rf"(.*\.)?({pattern})$")
    return [name for name in names if found.match(name)]


def size_of(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear module, quantised or transposed as its weight may be."""
    from transformers.pytorch_utils import Conv1D

    layer: Any = module
    return (layer.nx, layer.nf) if isinstance(module, Conv1D) else (layer.in_features, layer.out_features)


def matching_parameters(model: nn.Module, pattern: str) -> list[str]:
    """Names of the parameters that the regex `pattern` finds; none is refused."""
    found = [name for name, _ in model.named_parameters() if _pattern("method.pattern", pattern).search(name)]
    if not found:
        examples = ", ".join(name for name, _ in list(model.named_parameters())[:3])
        raise RecipeError(f"method.pattern: {pattern!r} matches no parameter of {type(model).__name__} (they are called {examples}, ...)")
    return found


def _pattern(field: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"{field}: {pattern!r} is no regular expression: {error}") from error


def endings(names: list[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names})) or "none"
