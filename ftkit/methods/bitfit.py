"""BitFit (arXiv 2106.10199): only biases learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from ftkit.errors import RecipeError
from ftkit.methods import Artifact
from ftkit.methods.quantised import Quantisable
from ftkit.recipe.spec import Default

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from ftkit.model import Base


class BitFit(Quantisable):
    """Every bias learns, and every new head; all other weights are frozen."""

    kind: Literal["bitfit"] = "bitfit"

    frozen_base: ClassVar[bool] = False
    reuse: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Default]] = {
        "train.learning_rate": Default(
            3e-3, "MiniLM on cola and sst2, of 1e-3, 3e-3 and 1e-2 (scripts/methods); BERT-base took 1e-4 to 1e-3 (arXiv 2106.10199)", width=384
        ),
    }

    def needs(self, new_head: bool) -> set[str]:
        return super().needs(new_head) | {"biases"}

    def apply(self, base: Base) -> nn.Module:
        model = base.freeze()
        new = tuple(f"{name}." for name in base.new_modules)
        biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias") and not name.startswith(new)]
        below = {id(parameter) for parameter in base.below_head()}
        if not any(id(parameter) in below for parameter in biases):  # a head may have one
            raise RecipeError(f"method bitfit: {type(model).__name__} has no biases; use method: ia3, which learns about as little")
        for parameter in biases:
            parameter.requires_grad_(True)
        self.attach(model)
        return model

    def attach(self, model: nn.Module) -> None:
        """Biases are there; modules in few bits do not let them learn by themselves."""
        from ftkit.few_bits import add_biases_apart

        add_biases_apart(model)

    def save(self, model: nn.Module, base: Base, directory: Path) -> Artifact:
        """The biases, and the new head."""
        return self.save_own(model, base, directory)
