"""Replaced-token detection: a generator fills masks, and the model tells which tokens it did not get right (ELECTRA, arXiv 2003.10555)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftkit.data.types import Features, Items, Limits, Row
from ftkit.errors import RecipeError
from ftkit.recipe.spec import Generation, option
from ftkit.tasks import joint, language_model
from ftkit.tasks.joint import JointMetrics
from ftkit.tasks.masked_text import PackedText, Replacement
from ftkit.tasks.texts import batch_of, fit

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from ftkit.data.features import Corruption, Example, FeatureSet
    from ftkit.data.types import Batch, Scores
    from ftkit.tasks.masking import Masking

DRAWS = 2**31  # numbers that a token of the generator is drawn by


class ReplacedTokenDetection(PackedText):
    """Which tokens of a text a smaller masked language model put in the places of hidden ones: as ELECTRA was pre-trained."""

    kind: Literal["replaced-token-detection"] = "replaced-token-detection"
    replace: Replacement = option(
        {"mask": 0.85, "random": 0.0}, "what the generator sees in place of hidden tokens", "ELECTRA's pretrain_helpers.py", validate_default=True
    )
    generator: str | None = option(None, "a masked language model with the same tokens: a hub id or a directory; null: a small one with random weights")
    generator_size: float = option(
        0.25, "heads and widths of a random generator, as a share of the model's", "ELECTRA-small (arXiv 2003.10555, 3.2)", gt=0, le=1
    )
    share_embeddings: bool = option(True, "both have the same embeddings, which learn from both losses", "ELECTRA (arXiv 2003.10555, 3.2)")
    discriminator_weight: float = option(50.0, "of the loss of detection beside that of the generator", "ELECTRA (arXiv 2003.10555, appendix A)", gt=0)

    auto_class: ClassVar[str] = "AutoModelForPreTraining"
    head: ClassVar[str] = "replaced tokens"
    companion: ClassVar[str] = "generator"
    metric_names: ClassVar[tuple[str, ...]] = joint.NAMES
    main_metric: ClassVar[str] = "loss"

    def lacks(self, model: Any) -> str | None:
        if hasattr(model, "discriminator_predictions"):
            return None
        return "no head that tells replaced tokens; ELECTRA has one"

    def beside(self, model: Any) -> nn.Module:
        """The generator, which learns with the model."""
        import transformers

        config = model.config
        if self.generator is None:
            small = copy.deepcopy(config)
            small.num_attention_heads = max(1, round(config.num_attention_heads * self.generator_size))
            small.hidden_size = config.hidden_size // config.num_attention_heads * small.num_attention_heads
            small.intermediate_size = max(1, round(config.intermediate_size * self.generator_size))
            made: Any = transformers.AutoModelForMaskedLM.from_config(small)
        else:
            made = self._stored(self.generator)
            if made.config.vocab_size != config.vocab_size:
                raise RecipeError(
                    f"task.generator: {self.generator} has {made.config.vocab_size} tokens and the model {config.vocab_size}; "
                    "what it writes means nothing to the model: name one with the same tokenizer"
                )
        if self.share_embeddings:
            self._share(model.base_model.embeddings, made.base_model.embeddings)
            made.tie_weights()
        return made

    def _stored(self, name: str) -> nn.Module:
        """The named generator; of a run, the model, or the generator beside it."""
        import transformers

        from ftkit import rundir
        from ftkit.sources import Source, hub_errors

        run = Path(name) / "model"
        if rundir.is_run(name):
            rundir.finished(Path(name))
            name = str(run / self.companion if (run / self.companion).is_dir() else run)
        elif not Path(name).is_dir() and (name.startswith((".", "~", "/")) or name.count("/") > 1):
            raise RecipeError(f"task.generator: there is no directory {name}")
        with hub_errors(Source(name)):
            found: nn.Module = transformers.AutoModelForMaskedLM.from_pretrained(name, use_safetensors=True)
        return found

    def _share(self, ours: nn.Module, theirs: nn.Module) -> None:
        known = dict(ours.named_parameters())
        for name, parameter in list(theirs.named_parameters()):
            own = known.get(name)
            if own is None or own.shape != parameter.shape:
                size = "something else" if own is None else list(own.shape)
                raise RecipeError(
                    f"task.share_embeddings: {name} is {list(parameter.shape)} in the generator and {size} in the model; set share_embeddings: false"
                )
            owner, _, last = name.rpartition(".")
            setattr(theirs.get_submodule(owner), last, own)

    def write_beside(self, beside: Any, directory: Path) -> dict[str, Any] | None:
        beside.save_pretrained(directory / self.companion)
        return {"directory": self.companion, "auto_class": "AutoModelForMaskedLM", "load_kwargs": {"dtype": "float32"}}

    def read_beside(self, model: Any, directory: Path) -> nn.Module:
        """The generator of a run; it has embeddings of its own, which are the same."""
        return self._stored(str(directory / self.companion))

    def encode(self, row: Row, tokenizer: Any, limits: Limits) -> list[Features]:
        """As those of a masked language model; a target is a token, and a number that the generator draws by, which `corruption` gives."""
        return [_with_draws(each) for each in super().encode(row, tokenizer, limits)]

    def packed(self, features: Iterable[tuple[int, list[Features]]], tokenizer: Any, limits: Limits) -> Iterator[tuple[int, list[Features]]]:
        if self.packing != "full-sentences":
            yield from features
            return
        plain = ((row, [replace(each, targets=each.targets[::2]) for each in parts]) for row, parts in features)
        for row, parts in super().packed(plain, tokenizer, limits):
            yield row, [_with_draws(each) for each in parts]

    def corruption(self, features: FeatureSet, tokenizer: Any, seed: int) -> Corruption:
        """The masks of each feature, and what the generator draws by."""
        return replace(super().corruption(features, tokenizer, seed), change=Drawing(self._masks(tokenizer)))

    def counts(self, batch: Batch) -> torch.Tensor:
        """float64 [2]: the hidden tokens, and all tokens of the rows that have any."""
        import torch

        return torch.stack((batch.weights.double().sum(), _real(batch).double().sum()))

    def prior(self, beside: Any, batch: Batch) -> tuple[Batch, Items]:
        """The batch with the generator's tokens in the places of hidden ones, whose targets say which are not the text's; and the generator's own items."""
        import torch

        tokens, draws = batch.targets.unbind(-1)
        items = language_model.of_one_stack(replace(batch, targets=tokens), beside, **batch.inputs)
        places, true = batch.supervised, tokens.flatten()[batch.supervised]
        with torch.no_grad():
            written = _drawn(items, draws.flatten()[places])
        input_ids = batch.input_ids.flatten().index_copy(0, places, written).view_as(batch.input_ids)
        replaced = torch.zeros_like(batch.weights).flatten().index_copy(0, places, (written != true).float()).view_as(batch.weights)
        everywhere = torch.arange(input_ids.numel(), device=input_ids.device) if batch.segments is None else batch.segments.index
        return replace(batch, input_ids=input_ids, targets=replaced, weights=_real(batch), supervised=everywhere), items

    def items(self, model: Any, batch: Batch) -> Items:
        """All real tokens, before the head that tells whether they were replaced."""
        ran = language_model.run(model, **batch.inputs)
        return Items(
            states=ran.output.last_hidden_state.flatten(0, 1)[batch.supervised],
            head=partial(_told, *ran),
            num_classes=1,
            targets=batch.targets.flatten()[batch.supervised, None].float(),
            weights=batch.weights.flatten()[batch.supervised],
            rows=batch.row_ids[batch.supervised // batch.targets.shape[1]],
            kind="labels",
            part=joint.QUESTION,
            share=self.discriminator_weight,
        )

    def metrics(self, rows: Sequence[Row], features: FeatureSet) -> JointMetrics:
        return JointMetrics(self.discriminator_weight)

    def records(self, parts: Iterable[Scores]) -> list[dict[str, Any]]:
        """Of each feature its hidden tokens, and how many were replaced, found to be, and taken for it wrongly."""
        masks, questions = joint.of_masks(parts)
        found: dict[int, dict[str, int]] = {}
        for scores in questions:
            said, true = joint.answers(scores)
            for row, one, other in zip(scores.rows.tolist(), said.tolist(), true.tolist(), strict=True):
                counts = found.setdefault(row, {"replaced": 0, "found": 0, "false_alarms": 0})
                for name, add in zip(counts, (other, one and other, one and not other), strict=True):
                    counts[name] += add
        return [{"feature": row} | masks.get(row, {}) | counts for row, counts in found.items()]

    def predict(self, model: Any, tokenizer: Any, rows: list[Row], limits: Limits, generation: Generation) -> list[dict[str, Any]]:
        """`tokens` of a text, special ones among them, and the `probabilities` that they were replaced.

        Of a text that is too long the beginning is read: `truncated` says how many tokens were not.
        """
        import torch

        from ftkit import prompts

        fitted = []

        def encode(row: Row) -> list[Features]:
            found = fit(tokenizer, [row.values["text"]], limits)
            assert found is not None, "predict does not drop rows"
            fitted.append(found)
            return [Features(found.input_ids, [0.0] * len(found.input_ids), [1.0] * len(found.input_ids), found.token_type_ids)]

        with torch.inference_mode(), prompts.given(model, batch_of(rows, encode, tokenizer, model.device)) as batch:
            scores = self.items(model, batch).scores()
        answers = []
        for row, text in enumerate(fitted):
            likely = joint.probabilities(scores)[scores.rows == row].tolist()
            answer = {"tokens": tokenizer.convert_ids_to_tokens(text.input_ids), "probabilities": likely}
            answers.append(answer | ({"truncated": text.truncated} if text.truncated else {}))
        return answers


@dataclass(frozen=True)
class Drawing:
    """Masks, and beside each target a number below DRAWS that the generator's token there is drawn by."""

    masks: Masking

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        import numpy as np

        hidden = self.masks(example | {"targets": example["targets"][::2]}, rng)
        draws = rng.integers(DRAWS, size=len(hidden["targets"]), dtype=np.int32)
        return hidden | {"targets": np.stack((hidden["targets"], draws), 1).ravel()}


def _with_draws(features: Features) -> Features:
    """With room for a number beside each target."""
    return replace(features, targets=[number for token in features.targets for number in (token, 0)])


def _real(batch: Batch) -> torch.Tensor:
    """float32 [B, L]: 1 for the tokens of rows in which something is hidden."""
    return batch.attention_mask * (batch.weights > 0).any(1, keepdim=True).float()


def _drawn(items: Items, draws: torch.Tensor) -> torch.Tensor:
    """int64 [n]: tokens of the generator's distributions, each where the sum over the tokens before it passes what was drawn."""
    import torch

    from ftkit import chunks

    found, start = [], 0
    for scores in chunks.scores(items):
        sums = scores.logits.double().softmax(-1).cumsum(-1)
        level = draws[start : start + len(sums), None].double() / DRAWS * sums[:, -1:]
        found.append(torch.searchsorted(sums, level, right=True).squeeze(-1).clamp(max=sums.shape[-1] - 1))
        start += len(sums)
    return torch.cat(found)


def _told(model: Any, below: Any, output: Any, states: torch.Tensor) -> torch.Tensor:
    """Logits [m, 1] of states [m, H]."""
    return language_model.logits(model, below, output, "input_ids", states).unsqueeze(-1)
