"""Partial fine-tuning: some layers learn, the others stay as they were."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

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
    last: int | None = option(None, "the last N layers learn, and the final norm and head above them", ge=1)
    first: int | None = option(None, "the first N layers learn", ge=1)
    pattern: str | None = option(None, "parameters whose name the regular expression finds learn")
    reuse: bool = option(True, "compute frozen layers once for each row and keep what they give, not in every epoch again; the result is the same")

    frozen_base: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Default]] = {
        "train.learning_rate": Default(5e-5, "BERT: 2e-5 to 5e-5 (arXiv 1810.04805 A.3)"),
    }

    @model_validator(mode="after")
    def _one_choice(self) -> Partial:
        if sum(value is not None for value in (self.last, self.first, self.pattern)) != 1:
            raise ValueError("say which part learns: exactly one of last, first and pattern")
        return self

    def apply(self, base: Base) -> nn.Module:
        model = base.model.requires_grad_(False)
        for name in base.new_modules:
            model.get_submodule(name).requires_grad_(True)
        if self.pattern is not None:
            chosen = set(matching_parameters(model, self.pattern))
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad or name in chosen)
            return model
        names = layers(base)
        count = self.last or self.first or 0
        if count > len(names):
            key = "last" if self.last else "first"
            raise RecipeError(f"method.{key}: {count} layers asked for, {type(model).__name__} has {len(names)}")
        chosen_layers = names[-count:] if self.last else names[:count]
        for name in chosen_layers:
            model.get_submodule(name).requires_grad_(True)
        if self.last:
            self._train_above(base, names)
        return model

    def _train_above(self, base: Base, names: list[str]) -> None:
        """What comes after the layers learns too: final norm, pooler, untied head."""
        stack = names[0].rpartition(".")[0].removeprefix(f"{base.model.base_model_prefix}.").split(".")[0]
        seen = False
        for child, module in base.inner().named_children():
            if seen:
                module.requires_grad_(True)
            seen = seen or child == stack
        shared = {id(parameter) for parameter in base.inner().parameters()}
        for name in base.head:
            for parameter in base.model.get_submodule(name).parameters():
                if id(parameter) not in shared:
                    parameter.requires_grad_(True)

    def save(self, model: nn.Module, base: Base, directory: Path) -> Artifact:
        """A complete model in transformers' format."""
        return save_whole(base, directory)
