"""Prefix tuning (arXiv 2101.00190, and 2110.07602 for encoders): learned keys and values in every attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from ftkit.errors import RecipeError
from ftkit.methods import Artifact, MethodSpec
from ftkit.methods.modules import layers
from ftkit.methods.quantised import Quantisable
from ftkit.methods.worded import Worded
from ftkit.recipe.spec import Default, option

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from ftkit.model import Base


class PrefixTuning(Quantisable, Worded):
    """Keys and values in front of those of every row learn, in every layer, and every new head; the base is frozen."""

    kind: Literal["prefix"] = "prefix"
    num_virtual_tokens: int = option(20, "keys and values in each layer; they take no positions of the model", "classification (arXiv 2110.07602, B)", ge=1)
    prefix_projection: bool = option(False, "learn through a network, which is dropped afterwards (arXiv 2101.00190, 4.3)")
    encoder_hidden_size: int | None = option(None, "width of that network; 512 if empty, as in arXiv 2101.00190", ge=1)
    init: Literal["random", "text"] = option(
        "random", "first values: small random ones, or text: the keys and values of the tokens of init_text (arXiv 2101.00190, 7.4)"
    )

    mergeable: ClassVar[bool] = False
    frozen_base: ClassVar[bool] = True
    reuse: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Default]] = {
        "train.learning_rate": Default(1e-1, "MiniLM on cola and sst2, of 1e-2, 3e-2 and 1e-1 (scripts/methods)"),
    }

    @model_validator(mode="after")
    def _no_option_without_effect(self) -> PrefixTuning:
        if self.init == "text" and self.prefix_projection:
            raise ValueError("init: text gives the prefix itself, and prefix_projection makes it by a network; choose one")
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError("encoder_hidden_size has no effect without prefix_projection: true")
        return self

    def needs(self, new_head: bool) -> set[str]:
        return super().needs(new_head) | {"attention interface"}

    def apply(self, base: Base) -> nn.Module:
        from ftkit import prefixes
        from ftkit.model import max_positions

        ids = self.text_ids(base)
        limit = max_positions(base.model.config)
        if ids and limit is not None and self.num_virtual_tokens > limit:
            raise RecipeError(
                f"method.init: text: the model has {limit} positions, and no keys and values of the {self.num_virtual_tokens} tokens that "
                "method.num_virtual_tokens asks for; lower it, or use init: random"
            )
        model = base.freeze()
        self._add(model, (self.encoder_hidden_size or 512) if self.prefix_projection else None, ids)
        prefixed = [name for name, module in model.named_modules() if isinstance(module, prefixes.Prefix)]
        for layer in layers(base):
            if not any(name.startswith(f"{layer}.") for name in prefixed):
                raise RecipeError(f"method prefix: {type(model).__name__}: the attention of {layer} is its own; use method: prompt")
        return model

    def attach(self, model: Any) -> None:
        """Put a prefix into every attention, without values yet."""
        from ftkit import prefixes

        self._add(model, None, [])
        for module in model.modules():
            if isinstance(module, prefixes.Prefix):
                module.to(model.dtype)

    def _add(self, model: Any, hidden: int | None, ids: list[int]) -> None:
        from ftkit import prefixes
        from ftkit.attention import Unsupported

        try:
            prefixes.add(model, self.num_virtual_tokens, hidden, ids)
        except Unsupported as error:
            raise RecipeError(f"method prefix: {type(model).__name__}: {error}; use method: prompt") from error

    def miniature(self, width: int) -> Self:
        update: dict[str, Any] = {"num_virtual_tokens": min(self.num_virtual_tokens, 8)}
        if self.encoder_hidden_size is not None:
            update["encoder_hidden_size"] = min(self.encoder_hidden_size, width)
        return self.model_copy(update=update)

    def stored(self) -> MethodSpec:
        """As plain keys and values: whatever made them is not needed any more."""
        return PrefixTuning(num_virtual_tokens=self.num_virtual_tokens)

    def save(self, model: Any, base: Base, directory: Path) -> Artifact:
        """Keys and values, and the new head: PEFT's prefixes would move the positions of all tokens."""
        from ftkit import prefixes

        prefixes.fold(model)
        return self.save_own(model, base, directory)
