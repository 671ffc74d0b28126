"""Bottleneck adapters (arXiv 1902.00751, 2005.00247): small modules between those of a frozen model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftkit.errors import RecipeError
from ftkit.methods import Artifact
from ftkit.methods.modules import attention_outputs, feed_forward_outputs, size_of
from ftkit.methods.quantised import Quantisable
from ftkit.recipe.spec import Default, option

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from ftkit.model import Base


class Adapter(Quantisable):
    """Two narrow linear layers after sublayers learn, and every new head; the base is frozen."""

    kind: Literal["adapter"] = "adapter"
    placement: Literal["houlsby", "pfeiffer"] = option(
        "pfeiffer",
        "houlsby: after attention and after the feed-forward layer (arXiv 1902.00751); pfeiffer: after the feed-forward layer only (arXiv 2005.00247)",
        "half the parameters at about the same score (arXiv 2005.00247)",
    )
    reduction: float = option(16.0, "width of the model over that of an adapter", "arXiv 2005.00247 takes 16", gt=0)
    activation: Literal["relu", "gelu", "silu"] = option("relu", "between the two layers", "arXiv 2005.00247")
    dropout: float = option(0.0, "dropout on the input of the adapter", ge=0, lt=1)

    frozen_base: ClassVar[bool] = True
    reuse: ClassVar[bool] = False
    mergeable: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Default]] = {
        "train.learning_rate": Default(3e-3, "MiniLM on cola and sst2, of 1e-3, 3e-3 and 1e-2 (scripts/methods)", width=384),
    }

    def needs(self, new_head: bool) -> set[str]:
        return super().needs(new_head) | {"linear", "attention output" if self.placement == "houlsby" else "feed-forward"}

    def apply(self, base: Base) -> nn.Module:
        model = base.freeze()
        self.attach(model)
        return model

    def attach(self, model: Any) -> None:
        """Put an adapter behind the last matrix of each sublayer; all of them give what they are given, at first."""
        from ftkit.bottleneck import add

        chosen = feed_forward_outputs(model) + (attention_outputs(model) if self.placement == "houlsby" else [])
        if not chosen:
            raise RecipeError(f"method adapter: {type(model).__name__} has no sublayers that can be told by their modules; use method: lora")
        for name in chosen:
            module = model.get_submodule(name)
            width = size_of(module)[1]
            add(module, width, max(1, round(width / self.reduction)), self.activation, self.dropout, model.dtype, module.weight.device)

    def miniature(self, width: int) -> Adapter:
        return self.model_copy(update={"reduction": min(self.reduction, width / 2)})

    def save(self, model: nn.Module, base: Base, directory: Path) -> Artifact:
        """The adapters, and the new head."""
        return self.save_own(model, base, directory)
