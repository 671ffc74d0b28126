"""Prompt tuning (arXiv 2104.08691): embeddings of virtual tokens in front of every row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from ftkit.errors import RecipeError
from ftkit.methods import Artifact, MethodSpec
from ftkit.methods.lora import adapter_settings
from ftkit.methods.modules import embedding_of, two_stacks
from ftkit.methods.quantised import Quantisable
from ftkit.methods.worded import Worded
from ftkit.recipe.spec import Default, option

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from ftkit.model import Base

COMMON = 5000  # first tokens of a vocabulary, among which its commonest are (arXiv 2104.08691, 3)
SPREAD = 0.5  # of uniform first values (arXiv 2104.08691, 3)


class SoftPrompt(Quantisable):
    """Virtual tokens in front of every row learn, and every new head; the base is frozen."""

    num_virtual_tokens: int = option(20, "virtual tokens; they take positions of the model", "more gain little (arXiv 2104.08691, 3.2)", ge=1)

    mergeable: ClassVar[bool] = False
    frozen_base: ClassVar[bool] = True
    reuse: ClassVar[bool] = False
    converts: ClassVar[bool] = True

    @property
    def positions(self) -> int:  # type: ignore[override]
        return self.num_virtual_tokens

    def miniature(self, width: int) -> Self:
        return self.model_copy(update={"num_virtual_tokens": min(self.num_virtual_tokens, 8)})

    def _freeze(self, base: Base) -> Any:
        """The base, frozen; refused where its head would take virtual tokens for what they are not."""
        if hasattr(base.model, "prepare_question_mask"):  # BigBird's: where no answer is, it is said at position 0, which the prompt would have
            raise RecipeError(
                f"method {self.kind}: {type(base.model).__name__} takes all before the first separator for the question, virtual tokens, too, "
                "and could no longer say that there is no answer; use method: lora"
            )
        return base.freeze()

    def attach(self, model: Any) -> None:
        """Let rows begin with virtual tokens."""
        from ftkit import prompts

        prompts.add(model, self.num_virtual_tokens).to(model.dtype)

    def stored(self) -> MethodSpec:
        """As a plain prompt: whatever made it is not needed any more."""
        return PromptTuning(num_virtual_tokens=self.num_virtual_tokens)

    def save(self, model: nn.Module, base: Base, directory: Path) -> Artifact:
        """PEFT's format, where PEFT can give a model embeddings in place of tokens, for this task; ftkit's elsewhere."""
        from ftkit import prompts

        virtual = prompts.of(model)
        assert virtual is not None
        virtual.prompt.fold()
        if base.task.peft_type is None or (two_stacks(base.model) and base.task.peft_type != "SEQ_2_SEQ_LM"):
            return self.save_own(model, base, directory)
        prompts.write(base.model, virtual, base.new_modules, adapter_settings(base), directory)
        return Artifact("peft", {"dtype": str(base.model.dtype).removeprefix("torch."), **base.load_kwargs})


class PromptTuning(SoftPrompt, Worded):
    """Embeddings of virtual tokens in front of every row learn, and every new head; the base is frozen."""

    kind: Literal["prompt"] = "prompt"
    init: Literal["random", "vocabulary", "text", "labels"] = option(
        "vocabulary",
        "first values: random; vocabulary: of tokens drawn from the commonest ones; text: of the tokens of init_text; "
        "labels: of the names of the classes, then as vocabulary",
        "better than random (arXiv 2104.08691, 3.2)",
    )

    defaults: ClassVar[Mapping[str, Default]] = {
        "train.learning_rate": Default(3e-1, "MiniLM on cola and sst2, of 3e-2, 1e-1 and 3e-1 (scripts/methods), and T5 of every size (arXiv 2104.08691)"),
    }

    def apply(self, base: Base) -> nn.Module:
        import torch

        from ftkit import prompts

        labels = self._labels(base) if self.init == "labels" else []
        text = self.text_ids(base)
        values = None if base.model.device.type == "meta" else self._values(base, labels, text)
        model = self._freeze(base)
        prompt = prompts.add(model, self.num_virtual_tokens)
        if values is not None:
            with torch.no_grad():
                prompt.weight.copy_(values)
        return model

    def miniature(self, width: int) -> Self:
        return self if self.init == "labels" else super().miniature(width)  # which are as many as ever

    def _labels(self, base: Base) -> list[str]:
        """The names of the task's classes; refused where there are none, or more than virtual tokens."""
        names = list(base.task.config_kwargs().get("id2label", {}).values())
        if not names:
            raise RecipeError(f"method.init: labels: task {base.task.kind} has no classes; use init: vocabulary, or init: text")
        if len(names) > self.num_virtual_tokens:
            raise RecipeError(f"method.init: labels: there are {len(names)}, more than method.num_virtual_tokens: {self.num_virtual_tokens}; raise it")
        return names

    def _values(self, base: Base, labels: list[str], text: list[int]) -> torch.Tensor:
        """float32 [n, width]: what the virtual tokens are embedded as, at first."""
        import torch

        embedding, n = embedding_of(base.model), self.num_virtual_tokens
        if self.init == "random":
            return torch.empty(n, embedding.embedding_dim).uniform_(-SPREAD, SPREAD)

        def embedded(ids: list[int]) -> torch.Tensor:
            with torch.no_grad():
                return embedding(torch.tensor(ids, device=embedding.weight.device)).float().cpu()

        if text:
            return embedded(text)
        common = _common_tokens(base.tokenizer)
        drawn = embedded([common[i] for i in torch.randint(len(common), (n,)).tolist()])
        for place, name in enumerate(labels):
            if ids := base.tokenizer(name, add_special_tokens=False)["input_ids"]:
                drawn[place] = embedded(ids).mean(0)  # as for classes of several tokens in arXiv 2104.08691, 3
        return drawn


def _common_tokens(tokenizer: Any) -> list[int]:
    """Ids of words, or beginnings of them, that come first in the vocabulary; of all tokens, where it has no such words."""
    ids = range(min(len(tokenizer), COMMON))
    words = [i for i, token in enumerate(tokenizer.convert_ids_to_tokens(list(ids))) if sum(map(str.isalpha, token)) > 1 and not token.startswith("[")]
    special = set(tokenizer.all_special_ids)
    return [i for i in words if i not in special] or list(ids)
