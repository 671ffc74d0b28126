"""(IA)^3 (arXiv 2205.05638): learned factors on keys, values and inner activations of feed-forward layers, through PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftkit.errors import RecipeError
from ftkit.methods import Artifact
from ftkit.methods.lora import peft_settings, save_adapter
from ftkit.methods.modules import choose_targets, endings, feed_forward_outputs, keys_and_values, shortest_endings
from ftkit.methods.quantised import Quantisable
from ftkit.recipe.spec import Default, option

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from ftkit.model import Base


class IA3(Quantisable):
    """Factors on keys, values and inner activations of feed-forward layers learn, and every new head; the base is frozen."""

    kind: Literal["ia3"] = "ia3"
    targets: str | list[str] = option(
        "keys-values",
        "modules whose outputs are scaled: keys-values, all-linear, attention, a regular expression, or a list of name endings",
        "keys and values (arXiv 2205.05638, 3.3)",
    )
    feedforward: str | list[str] | None = option(
        "inner",
        "modules whose inputs are scaled: inner (the second matrix of feed-forward layers), a regular expression, or a list of name endings; none if empty",
        "inner activations (arXiv 2205.05638, 3.3)",
    )
    reuse: bool = option(True, "compute layers below the first one with factors once for each row, not in every epoch again; the result is the same")

    frozen_base: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Default]] = {
        "train.learning_rate": Default(
            1.5e-2, "MiniLM on cola and sst2, of 1.5e-2, 5e-2 and 1.5e-1 (scripts/methods); one 3072 wide took 5e-3 (peft's method_comparison)", width=384
        ),
    }

    def needs(self, new_head: bool) -> set[str]:
        chosen = {"keys, values": self.targets == "keys-values", "feed-forward": self.feedforward == "inner"}
        return super().needs(new_head) | {"linear", *(trait for trait, needed in chosen.items() if needed)}

    def apply(self, base: Base) -> nn.Module:
        from peft import IA3Config, get_peft_model

        scaled_inputs = self._feed_forward(base)
        chosen = keys_and_values(base) if self.targets == "keys-values" else choose_targets(base, self.targets)
        scaled_outputs = [name for name in chosen if name not in scaled_inputs]
        outputs, inputs = shortest_endings(scaled_outputs, base.model), shortest_endings(scaled_inputs, base.model)
        config = IA3Config(
            target_modules=sorted({*outputs, *inputs}),
            feedforward_modules=inputs,  # PEFT wants the same words for them
            **peft_settings(base, chosen),
        )
        return get_peft_model(base.model, config)

    def _feed_forward(self, base: Base) -> list[str]:
        if self.feedforward is None:
            return []
        if self.feedforward != "inner":
            return choose_targets(base, self.feedforward, field="feedforward")
        if found := feed_forward_outputs(base.model):
            return found
        names = endings(choose_targets(base, "all-linear"))
        raise RecipeError(f"method.feedforward: {type(base.model).__name__} has no feed-forward layer that can be told; name its second matrix, of {names}")

    def save(self, model: Any, base: Base, directory: Path) -> Artifact:
        """PEFT's format."""
        return save_adapter(model, base, directory)
