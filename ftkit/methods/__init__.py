"""Methods: which weights learn.  One file a kind; `Method` is the contract they all fulfil."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

from ftkit.recipe.spec import Spec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import nn

    from ftkit.model import Base
    from ftkit.recipe.spec import Default


class Artifact(NamedTuple):
    """How a fresh process loads `model/`: the library, and the exact keyword arguments."""

    loads_with: str  # transformers | peft | sentence-transformers | ftkit
    load_kwargs: dict[str, Any]


class Method(Protocol):
    """How the base is loaded, what is frozen or injected, how the result is saved and merged."""

    kind: str
    mergeable: ClassVar[bool]  # what it learned can become part of the base's own weights
    frozen_base: ClassVar[bool]  # the base stays as it was and is not saved again
    converts: bool  # what is saved has other tensors than what learned: only what the model says can be compared
    positions: int  # of the model's, which it takes for itself in every row
    reuse: bool  # layers below the first one that learns are computed once for each row, not in every epoch
    example: ClassVar[Mapping[str, Any]]  # what a recipe must give it, by example
    defaults: ClassVar[Mapping[str, Default]]  # dotted recipe key -> value and source

    def needs(self, new_head: bool) -> set[str]:
        """What an architecture must have, in words of `architectures.TRAITS`, where the task brings a new head or not."""
        ...

    def load_kwargs(self, head: list[str], precision: str) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`; `head` names modules that must stay unquantised, `precision` is the recipe's."""
        ...

    def apply(self, base: Base) -> nn.Module:
        """The model that trains: everything frozen but what this method and a new head train."""
        ...

    def lr_factor(self, base: Base) -> Callable[[str], float]:
        """What train.learning_rate is multiplied by for a parameter, by its name in the model that `apply` made of the base."""
        ...

    def waits(self, base: Base) -> Callable[[str, int], bool]:
        """Whether a parameter that learns in the end, by its name there, does not learn yet in an epoch, counted from 0."""
        ...

    def miniature(self, width: int) -> Method:
        """The same for `--smoke`, whose model has no matrix narrower than `width`."""
        ...

    def attach(self, model: nn.Module) -> None:
        """Put the modules that `apply` added into a model that has none yet; called for what `ftkit` loads only."""
        ...

    def stored(self) -> Method:
        """The settings that `attach` needs for what was saved, where `ftkit` loads it."""
        ...

    def save(self, model: nn.Module, base: Base, directory: Path) -> Artifact:
        """Write weights that load without ftkit wherever that can be; safetensors and JSON only."""
        ...


class MethodSpec(Spec):
    """A method whose base is loaded as it is stored, and of which everything learns at one rate."""

    kind: str
    mergeable: ClassVar[bool] = True
    converts: ClassVar[bool] = False
    positions: ClassVar[int] = 0
    example: ClassVar[Mapping[str, Any]] = {}

    def needs(self, new_head: bool) -> set[str]:
        return set()

    def load_kwargs(self, head: list[str], precision: str) -> dict[str, Any]:
        return {}

    def lr_factor(self, base: Base) -> Callable[[str], float]:
        return lambda name: 1.0

    def waits(self, base: Base) -> Callable[[str, int], bool]:
        return lambda name, epoch: False

    def miniature(self, width: int) -> Self:
        return self

    def attach(self, model: nn.Module) -> None:
        raise AssertionError(f"{self.kind} is loaded by another library")

    def stored(self) -> MethodSpec:
        return self

    def save_own(self, model: nn.Module, base: Base, directory: Path) -> Artifact:
        """What learned, in ftkit's own format, for methods whose `attach` puts it back."""
        from ftkit.adapters import write_weights

        write_weights(model, directory)
        return Artifact("ftkit", {"dtype": str(base.model.dtype).removeprefix("torch."), **base.load_kwargs})
