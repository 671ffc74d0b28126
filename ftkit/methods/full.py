"""Full fine-tuning: every weight learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from ftkit.methods import Artifact, MethodSpec
from ftkit.recipe.spec import Default

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from ftkit.model import Base


class Full(MethodSpec):
    """Every weight learns."""

    kind: Literal["full"] = "full"

    frozen_base: ClassVar[bool] = False
    reuse: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Default]] = {
        "train.learning_rate": Default(
            1e-4, "MiniLM on cola and sst2, of 1e-4, 3e-4 and 1e-3 (scripts/methods); BERT-base, 768 wide, took 2e-5 to 5e-5", width=384
        ),
    }

    def needs(self, new_head: bool) -> set[str]:
        return {"float weights"}

    def apply(self, base: Base) -> nn.Module:
        return base.model.requires_grad_(True)

    def save(self, model: nn.Module, base: Base, directory: Path) -> Artifact:
        """A complete model in transformers' format."""
        return save_whole(base, directory)


def save_whole(base: Base, directory: Path) -> Artifact:
    """Write the whole model; plain transformers loads it."""
    from ftkit.model import forget_loading_steps

    forget_loading_steps(base.model)
    base.model.save_pretrained(directory)
    return Artifact("transformers", {"dtype": str(base.model.dtype).removeprefix("torch.")})
