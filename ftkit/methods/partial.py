"""Partial fine-tuning: some layers learn, the others stay as they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ftkit.errors import RecipeError
from ftkit.methods import Artifact, MethodSpec
from ftkit.methods.full import save_whole
from ftkit.methods.modules import layers, matching_parameters
from ftkit.recipe.spec import Default, option

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from ftkit.model import Base


class Partial(MethodSpec):
    """Some layers learn, and every new head; the rest is frozen."""

    kind: Literal["partial"] = "partial"
    last: Annotated[int, Field(ge=1)] | Literal["all"] | None = option(
        None, "the last N layers, or all, learn, and the final norm and head above them; a decoder's layers come after its encoder's"
    )
    first: int | None = option(None, "the first N layers learn", ge=1)
    pattern: str | None = option(None, "parameters whose name the regular expression finds learn")
    embeddings: bool = option(False, "the embeddings learn, too")
    lr_decay: float = option(
        1.0, "learning rate of a layer over that of the next higher one, the head being the highest; ULMFiT takes 1 / 2.6 (arXiv 1801.06146)", gt=0, le=1
    )
    unfreeze_every: int | None = option(
        None, "epochs after which the next lower layer begins to learn, the head being the first; ULMFiT takes 1 (arXiv 1801.06146); at once if empty", ge=1
    )
    reinit: int = option(0, "so many of the highest layers, and a pooler, start anew from random weights (arXiv 2006.05987)", ge=0)
    reuse: bool = option(True, "compute frozen layers once for each row and keep what they give, not in every epoch again; the result is the same")

    example: ClassVar[Mapping[str, Any]] = {"last": 1}
    frozen_base: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Default]] = {
        "train.learning_rate": Default(3e-4, "MiniLM on cola and sst2, of 3e-4, 1e-3 and 3e-3 (scripts/methods)", width=384),
    }

    @model_validator(mode="after")
    def _one_choice(self) -> Partial:
        if sum(value is not None for value in (self.last, self.first, self.pattern)) != 1:
            raise ValueError("say which part learns: exactly one of last, first and pattern")
        if self.pattern is not None and self.embeddings:
            raise ValueError("embeddings goes with first and last; let the pattern find them")
        if self.reinit and (self.last is None or (self.last != "all" and self.reinit > self.last)):
            raise ValueError(f"reinit: {self.reinit} layers would start from random weights and not learn; give last: {self.reinit} or more")
        return self

    def needs(self, new_head: bool) -> set[str]:
        return set() if self.pattern is not None else {"layers", "float weights"}

    def lr_factor(self, base: Base) -> Callable[[str], float]:
        if self.lr_decay == 1:
            return super().lr_factor(base)
        depths = _depths(base)
        return lambda name: self.lr_decay ** depths[name]

    def waits(self, base: Base) -> Callable[[str, int], bool]:
        every = self.unfreeze_every
        if every is None:
            return super().waits(base)
        depths = _depths(base)
        first = min(depths[name] for name, parameter in base.model.named_parameters() if parameter.requires_grad)  # a head may be frozen, or tied
        return lambda name, epoch: depths[name] - first > epoch // every

    def apply(self, base: Base) -> nn.Module:
        model = base.freeze()
        if self.reinit:
            self._start_anew(base)
        if self.pattern is not None:
            chosen = set(matching_parameters(model, self.pattern))
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad or name in chosen)
            return model
        names = layers(base)
        count = len(names) if self.last == "all" else self.last or self.first or 0
        if count > len(names):
            key = "last" if self.last else "first"
            raise RecipeError(f"method.{key}: {count} layers asked for, {type(model).__name__} has {len(names)}")
        chosen_layers = names[-count:] if self.last else names[:count]
        for name in chosen_layers:
            model.get_submodule(name).requires_grad_(True)
        if self.last:
            self._train_above(base, count)
        if self.embeddings:
            depths = _depths(base)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad or depths[name] > len(names))
        return model

    def _train_above(self, base: Base, count: int) -> None:
        """What comes after the last layers learns too: final norm, pooler, untied head."""
        depths = _depths(base)
        layer = tuple(f"{name}." for name in layers(base))
        shared = {id(parameter) for parameter in base.below_head()}
        for name, parameter in base.model.named_parameters():
            above = 1 <= depths[name] <= count and not name.startswith(layer)
            if above or (depths[name] == 0 and id(parameter) not in shared):
                parameter.requires_grad_(True)

    def _start_anew(self, base: Base) -> None:
        """Draw the weights of the highest layers again, and of a pooler, as the architecture's own code draws them."""
        names = layers(base)
        if self.reinit > len(names):
            raise RecipeError(f"method.reinit: {self.reinit} layers asked for, {type(base.model).__name__} has {len(names)}")
        for name in [*names[-self.reinit :], *(name for name, _ in base.model.named_modules() if name.rpartition(".")[2] == "pooler")]:
            module = base.model.get_submodule(name)
            tensor: Any
            for tensor in module.parameters():
                tensor._is_hf_initialized = False  # else transformers leaves what was loaded alone
            module.apply(base.model._init_weights)  # inner modules first: outer ones may draw their weights in another way

    def save(self, model: nn.Module, base: Base, directory: Path) -> Artifact:
        """A complete model in transformers' format."""
        return save_whole(base, directory)


def _depths(base: Base) -> dict[str, int]:
    """Steps down from the head, 0, to each parameter: 1 for the highest layer and what is above it, and so on, to what is below all layers."""
    names = layers(base)
    layer = {f"{name}.": len(names) - number for number, name in enumerate(names)}
    highest = {name.rpartition(".")[0]: depth for name, depth in zip(names, layer.values(), strict=True)}  # of each list of layers: two in an encoder-decoder
    above: dict[str, int] = {}  # prefixes of what is defined after a list, or after what it is in
    for stack, depth in highest.items():
        path = stack.split(".")
        for length in range(1, len(path)):
            parent = ".".join(path[:length])
            children = [child for child, _ in base.model.get_submodule(parent).named_children()]
            later = children[children.index(path[length]) + 1 :]
            # OPT defines its final norm first, BART the norm of its embeddings last
            after = [child for child in children if (child in later or "final" in child) and not child.endswith("norm_embedding")]
            above |= {f"{parent}.{child}.": depth for child in after if not any(f"{other}.".startswith(f"{parent}.{child}.") for other in highest)}
    heads, inside = tuple(f"{head}." for head in base.head), layer | above
    found = {}
    for name, _ in base.model.named_parameters():
        depth = next((depth for prefix, depth in inside.items() if name.startswith(prefix)), len(names) + 1)
        found[name] = 0 if name.startswith(heads) else depth
    return found
