"""P-tuning (arXiv 2103.10385): a soft prompt that a small network makes of learned embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import model_validator

from ftkit.methods.modules import embedding_of
from ftkit.methods.prompt import SoftPrompt
from ftkit.recipe.spec import Default, option

if TYPE_CHECKING:
    from torch import nn

    from ftkit.model import Base


class PTuning(SoftPrompt):
    """A soft prompt learns through an encoder that is dropped afterwards, and every new head; the base is frozen."""

    kind: Literal["p-tuning"] = "p-tuning"
    encoder: Literal["mlp", "lstm"] = option(
        "mlp",
        "what makes the prompt: mlp, three linear layers; lstm, a bidirectional LSTM of two layers and an MLP (arXiv 2103.10385, 3.2)",
        "PEFT's PromptEncoderConfig",
    )
    encoder_hidden_size: int | None = option(None, "width of the encoder; that of the embeddings if empty", ge=1)
    encoder_dropout: float = option(0.0, "dropout between the layers of the LSTM", ge=0, lt=1)

    defaults: ClassVar[Mapping[str, Default]] = {
        "train.learning_rate": Default(1e-2, "MiniLM on cola and sst2, of 3e-3, 1e-2 and 3e-2 (scripts/methods)"),
    }

    @model_validator(mode="after")
    def _dropout_between_layers(self) -> PTuning:
        if self.encoder == "mlp" and self.encoder_dropout:
            raise ValueError("encoder_dropout has no effect with encoder: mlp; set encoder: lstm")
        return self

    def apply(self, base: Base) -> nn.Module:
        import torch

        from ftkit import prompts
        from ftkit.reparametrised import LSTM, MLP

        model = self._freeze(base)
        width = embedding_of(model).embedding_dim
        hidden = self.encoder_hidden_size or width
        with torch.device("meta" if model.device.type == "meta" else "cpu"):  # drawn alike wherever the model is
            encoder = MLP(width, hidden) if self.encoder == "mlp" else LSTM(width, hidden, self.encoder_dropout)
            values = torch.randn(self.num_virtual_tokens, width)
        prompt = prompts.add(model, self.num_virtual_tokens, encoder)
        with torch.no_grad():
            prompt.weight.copy_(values)
        return model

    def miniature(self, width: int) -> Self:
        small = super().miniature(width)
        return small if small.encoder_hidden_size is None else small.model_copy(update={"encoder_hidden_size": min(small.encoder_hidden_size, width)})
