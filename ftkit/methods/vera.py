"""VeRA (arXiv 2310.11454): updates through two random, frozen matrices that all layers share, of which only scales learn, through PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftkit.methods import Artifact
from ftkit.methods.lora import peft_settings, save_adapter
from ftkit.methods.modules import choose_targets, shortest_endings
from ftkit.methods.quantised import Quantisable
from ftkit.recipe.spec import Default, option

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from ftkit.model import Base


class VeRA(Quantisable):
    """Two vectors beside each linear module learn, and every new head; the base and the random matrices between them are frozen."""

    kind: Literal["vera"] = "vera"
    r: int = option(256, "rank of the shared matrices", "VeRA takes 256 to 1024 (arXiv 2310.11454, A)", ge=1)
    dropout: float = option(0.0, "dropout on the input of the updates", "VeRA (arXiv 2310.11454, A)", ge=0, lt=1)
    d_initial: float = option(0.1, "first value of the vector between the matrices", "VeRA (arXiv 2310.11454, 4.5)")
    targets: str | list[str] = option(
        "all-linear",
        "modules to update: all-linear, attention, a regular expression, or a list of name endings",
        "all linear layers in the instruction tuning of VeRA (arXiv 2310.11454, 4.3)",
    )
    save_projection: bool = option(True, "write the random matrices too; false: they are drawn again from a seed, which other versions may do otherwise")
    reuse: bool = option(True, "compute layers below the first one with updates once for each row, not in every epoch again; the result is the same")

    frozen_base: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Default]] = {
        "train.learning_rate": Default(
            3e-2, "MiniLM on cola and sst2, of 3e-2, 1e-1 and 3e-1 (scripts/methods); a Llama 4096 wide took 4e-3 (arXiv 2310.11454)", width=384
        ),
    }

    def needs(self, new_head: bool) -> set[str]:
        return super().needs(new_head) | {"linear"}

    def apply(self, base: Base) -> nn.Module:
        from peft import VeraConfig, get_peft_model

        chosen = choose_targets(base, self.targets)
        config = VeraConfig(
            r=self.r,
            vera_dropout=self.dropout,
            d_initial=self.d_initial,
            save_projection=self.save_projection,
            target_modules=shortest_endings(chosen, base.model),
            **peft_settings(base, chosen),
        )
        return get_peft_model(base.model, config)

    def save(self, model: Any, base: Base, directory: Path) -> Artifact:
        """PEFT's format."""
        return save_adapter(model, base, directory)
