"""First values that are those of a text, for methods that learn virtual tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Self

from pydantic import Field, model_validator

from ftkit.errors import RecipeError
from ftkit.methods import MethodSpec
from ftkit.recipe.spec import option

if TYPE_CHECKING:
    from ftkit.model import Base


class Worded(MethodSpec):
    """A method whose virtual tokens can begin as tokens of the vocabulary: `init: text`."""

    num_virtual_tokens: int
    init: str
    init_text: Annotated[str, Field(min_length=1)] | None = option(None, "with init: text, the text that is begun from, repeated or cut to the virtual tokens")

    @model_validator(mode="after")
    def _text_has_an_effect(self) -> Self:
        if (self.init == "text") != (self.init_text is not None):
            raise ValueError("init: text needs init_text" if self.init_text is None else f"init_text has no effect with init: {self.init}; set init: text")
        return self

    def text_ids(self, base: Base) -> list[int]:
        """A token for each virtual one; none without a text, and a text that makes none is refused, where a tokenizer is at hand."""
        if self.init_text is None:
            return []
        ids: list[int] = base.tokenizer(self.init_text, add_special_tokens=False)["input_ids"] if base.tokenizer else [0]
        if not ids:
            raise RecipeError("method.init_text: the tokenizer makes no token of it")
        return [ids[i % len(ids)] for i in range(self.num_virtual_tokens)]
