"""QLoRA (arXiv 2305.14314): LoRA beside a base stored in 4 or 8 bits."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ftkit.methods.lora import LoRA
from ftkit.methods.quantised import Quantisable
from ftkit.recipe.spec import option


class QLoRA(Quantisable, LoRA):
    """LoRA on a base whose linear modules are stored in 4 or 8 bits."""

    kind: Literal["qlora"] = "qlora"  # type: ignore[assignment]
    bits: Literal[4, 8] = option(4, "bits a weight of the base's linear modules, which are frozen", "QLoRA (arXiv 2305.14314)")

    @model_validator(mode="after")
    def _float_weights(self) -> QLoRA:
        if self.init != "default":
            raise ValueError(f"init: {self.init} needs float weights; a quantised base takes init: default")
        return self
