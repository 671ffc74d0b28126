"""Feature extraction: only the head learns, on a frozen model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from ftkit.errors import RecipeError
from ftkit.methods import Artifact
from ftkit.methods.full import save_whole
from ftkit.methods.quantised import Quantisable
from ftkit.recipe.spec import Default, option

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from ftkit.model import Base


class Head(Quantisable):
    """Only the head learns; the model below it is frozen and runs without dropout."""

    kind: Literal["head"] = "head"
    reuse: bool = option(True, "compute frozen layers once for each row and keep what they give, not in every epoch again; the result is the same")

    frozen_base: ClassVar[bool] = False  # it stays as it was, but is saved again
    defaults: ClassVar[Mapping[str, Default]] = {
        "train.learning_rate": Default(
            3e-2, "of 3e-2, 1e-1 and 3e-1 (scripts/methods): the best on chats, and near it on cola and sst2; heads of two layers bear no more", width=384
        ),
    }

    def needs(self, new_head: bool) -> set[str]:
        return super().needs(new_head) | (set() if new_head else {"own head"})

    def apply(self, base: Base) -> nn.Module:
        if not base.head:
            raise RecipeError(f"method head: {type(base.model).__name__} has no head for task {base.task.kind}; use method: partial, with last: 1")
        base.freeze()
        shared = {id(parameter) for parameter in base.below_head()}
        for name in base.head:
            for parameter in base.model.get_submodule(name).parameters():
                if id(parameter) in shared:
                    raise RecipeError(
                        f"method head: {type(base.model).__name__} shares its head {name!r} with the input embeddings, "
                        "so the base cannot stay frozen; use method: lora"
                    )
                parameter.requires_grad_(True)
        return base.model

    def save(self, model: nn.Module, base: Base, directory: Path) -> Artifact:
        """A complete model in transformers' format."""
        return save_whole(base, directory)
