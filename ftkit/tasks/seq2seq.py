"""Sequence to sequence: a text is rewritten by an encoder-decoder, as T5, mT5 or BART."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import WeakKeyDictionary

from ftkit.data.types import Features, Limits, Row, RowError
from ftkit.errors import RecipeError
from ftkit.recipe.spec import Default, Generation, Spec, option
from ftkit.tasks import Column, Shape, language_model, text_metrics
from ftkit.tasks.language_model import LanguageModelMetrics, Stacks

if TYPE_CHECKING:
    from ftkit.data.features import FeatureSet
    from ftkit.data.types import Batch, Items, Scores, Targets

SOURCE = Column("source", "the text that is given", "document", "article", "dialogue", "src", "input", "en")
TARGET = Column("target", "what is to be written", "summary", "highlights", "tgt", "output", "ko", "de", "fr", "es", "zh", "ja")

EXAMPLES = (  # facts, and a sentence that tells them
    ("animal[owl], home[tower], food[mice]", "The owl lives in a tower and eats mice."),
    ("animal[bee], home[hive], food[nectar]", "The bee lives in a hive and drinks nectar."),
    ("animal[fox], home[den]", "The fox lives in a den."),
    ("animal[whale], home[sea], food[krill]", "The whale lives in the sea and eats krill."),
    ("animal[mole], home[garden], food[worms]", "The mole lives in a garden and eats worms."),
    ("animal[stork], home[chimney], food[frogs]", "The stork lives on a chimney and eats frogs."),
    ("animal[cat], home[barn]", "The cat lives in a barn."),
    ("animal[goat], home[hill], food[grass]", "The goat lives on a hill and eats grass."),
    ("animal[spider], home[web], food[flies]", "The spider lives in a web and eats flies."),
    ("animal[bear], home[cave], food[berries]", "The bear lives in a cave and eats berries."),
    ("animal[heron], home[pond]", "The heron lives by a pond."),
    ("animal[squirrel], home[oak], food[acorns]", "The squirrel lives in an oak and eats acorns."),
)
GENERATED_ROWS = 16  # rows generated together: the cache of keys and values grows with them


class Seq2Seq(Spec):
    """What another text makes of a text: a translation, a summary, a sentence that tells facts."""

    kind: Literal["seq2seq"] = "seq2seq"
    max_target_length: int = option(
        128, "tokens in a target at most, its end included; a longer one is cut on the right, dropped or refused", "transformers' run_summarization.py", ge=2
    )
    prefix: str = option("", "text before each source, such as `summarize: ` (arXiv 1910.10683); it counts into data.max_length")

    shapes: ClassVar[tuple[Shape, ...]] = (Shape(SOURCE, TARGET),)
    txt_row: ClassVar[str] = "line"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    peft_type: ClassVar[str] = "SEQ_2_SEQ_LM"
    targets: ClassVar[Targets] = "classes"
    new_head: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Default]] = {
        "data.max_length": Default(512, "T5 (arXiv 1910.10683, 3.1.2)"),
    }
    metric_names: ClassVar[tuple[str, ...]] = (*LanguageModelMetrics.NAMES, *text_metrics.PACKAGES)
    written: ClassVar[Mapping[str, str | None]] = text_metrics.PACKAGES
    main_metric: ClassVar[str] = "loss"

    def examples(self) -> list[dict[str, Any]]:
        """Facts and sentences."""
        return [{"source": source, "target": target} for source, target in EXAMPLES]

    def resolve(self, rows: Iterable[Row]) -> Seq2Seq:
        return self

    def check(self, tokenizer: Any) -> None:
        """Refuse a tokenizer without a way to say that a text ends, and one that must be told languages."""
        name = tokenizer.name_or_path or "this run"
        if tokenizer.eos_token_id is None:
            raise RecipeError(f"task {self.kind}: the tokenizer of {name} has no end-of-text token (eos_token), so the model could never learn to stop")
        if hasattr(tokenizer, "tgt_lang"):
            raise RecipeError(
                f"task {self.kind}: the tokenizer of {name} writes a token for the language of each text, and recipes have no words for languages yet; "
                "use a model without: T5, mT5, BART, Marian"
            )

    def config_kwargs(self) -> dict[str, Any]:
        return {}

    def encode(self, row: Row, tokenizer: Any, limits: Limits) -> list[Features]:
        """The source as the encoder reads it, and apart from it the target with its end, all of which is learned."""
        source, target = self._source(row, tokenizer), _ended(tokenizer(text_target=row.values["target"], verbose=False)["input_ids"], tokenizer)
        excess, target_excess = max(0, len(source) - limits.max_length), max(0, len(target) - self.max_target_length)
        if (excess or target_excess) and limits.truncation == "drop":
            return []
        if target_excess and limits.truncation == "error":
            raise RowError(f"a target of {len(target)} tokens, more than task.max_target_length: {self.max_target_length}")
        if target_excess:
            target = _ended(target[: self.max_target_length - 1], tokenizer)
        source = self._fitted(row, source, tokenizer, limits)
        return [Features(source, target, [1.0] * len(target), truncated=excess + target_excess, apart=True)]

    def _source(self, row: Row, tokenizer: Any) -> list[int]:
        """All tokens of the source."""
        ids = tokenizer(self.prefix + row.values["source"], verbose=False)["input_ids"]
        if not ids:
            raise RowError("the source has no tokens")
        return ids

    def _fitted(self, row: Row, ids: list[int], tokenizer: Any, limits: Limits) -> list[int]:
        """What is left of a source in `max_length` tokens, its special tokens kept."""
        if len(ids) <= limits.max_length:
            return ids
        if limits.truncation == "error":
            raise RowError(f"a source of {len(ids)} tokens, more than data.max_length: {limits.max_length}")
        side, tokenizer.truncation_side = tokenizer.truncation_side, limits.truncation
        cut = tokenizer(self.prefix + row.values["source"], truncation=True, max_length=limits.max_length)
        tokenizer.truncation_side = side
        return cut["input_ids"]

    def items(self, model: Any, batch: Batch) -> Items:
        """The n tokens of all targets before the output head: it never sees padding."""
        outer = model.get_base_model() if hasattr(model, "get_base_model") else model
        if outer not in self._stacks:
            self._stacks[outer] = language_model.stacks(outer)
        encoder, decoder = self._stacks[outer]
        mask = None if batch.segments is None else batch.attention_mask
        read = encoder(input_ids=batch.input_ids, attention_mask=mask, return_dict=True)
        output = decoder(
            input_ids=language_model.decoder_inputs(outer, batch.targets),
            encoder_hidden_states=read.last_hidden_state,
            encoder_attention_mask=mask,
            use_cache=False,
            return_dict=True,
        )
        return language_model.items(batch, outer, decoder, output, "decoder_input_ids", encoder_outputs=read)

    @cached_property
    def _stacks(self) -> WeakKeyDictionary[Any, Stacks]:
        return WeakKeyDictionary()

    def complete(self, model: Any, tokenizer: Any) -> None:
        """Generation begins and ends as training did, whatever reads the saved model."""
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id

    def metrics(self, rows: Sequence[Row], features: FeatureSet) -> LanguageModelMetrics:
        return LanguageModelMetrics()

    def records(self, parts: Iterable[Scores]) -> list[dict[str, Any]]:
        """Mean loss of each target's tokens, and how many they are."""
        return language_model.records(parts)

    def judge(self, answers: Sequence[Mapping[str, Any]], rows: Sequence[Row], names: Collection[str]) -> dict[str, float]:
        """Metrics of what `predict` said to rows with targets."""
        return text_metrics.measured(answers, [self.reference(row) for row in rows], names)

    def reference(self, row: Row) -> str:
        """What the model should write."""
        return row.values["target"]

    def asked(self, row: Row) -> str:
        """What it is made of."""
        return row.values["source"]

    def predict(self, model: Any, tokenizer: Any, rows: list[Row], limits: Limits, generation: Generation) -> list[dict[str, Any]]:
        """Targets: `text`, and whether it `finished` by itself.

        `truncated` says how many tokens of a source that is too long were not read; `max_new_tokens`, how many could be
        written where the model has positions for fewer than eval.generation.max_new_tokens.
        """
        import torch

        from ftkit.model import max_positions

        allowed = min(generation.max_new_tokens, max_positions(model.config) or generation.max_new_tokens)
        sources, answers = [], list[dict[str, Any]]()
        for row in rows:
            with row.named():
                whole = self._source(row, tokenizer)
                sources.append(self._fitted(row, whole, tokenizer, limits))
            lost = len(whole) - len(sources[-1])
            answers.append(({"truncated": lost} if lost else {}) | ({"max_new_tokens": allowed} if allowed < generation.max_new_tokens else {}))
        order = sorted(range(len(rows)), key=lambda i: len(sources[i]))
        was_training = model.training
        model.eval()
        for start in range(0, len(order), GENERATED_ROWS):
            chosen = order[start : start + GENERATED_ROWS]
            with torch.inference_mode():
                generated = _generate(model, [sources[i] for i in chosen], tokenizer, generation.model_copy(update={"max_new_tokens": allowed}))
            for i, ids in zip(chosen, generated, strict=True):
                end = next((place for place, token in enumerate(ids) if token == tokenizer.eos_token_id), None)
                forced = end == allowed - 1 and model.generation_config.forced_eos_token_id is not None  # BART's last token, whatever comes before
                answers[i] = {"text": tokenizer.decode(ids[:end], skip_special_tokens=True), "finished": end is not None and not forced} | answers[i]
        model.train(was_training)
        return answers


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    return ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]


def _generate(model: Any, sources: list[list[int]], tokenizer: Any, generation: Generation) -> list[list[int]]:
    """The tokens that the model writes for each source, its end included, padding after it."""
    import torch

    length = max(len(source) for source in sources)
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([source + [pad] * (length - len(source)) for source in sources], device=model.device)
    mask = torch.tensor([[1] * len(source) + [0] * (length - len(source)) for source in sources], device=model.device)
    config = language_model.generation_config(generation, [tokenizer.eos_token_id], pad)
    return language_model.generate(model, config, input_ids=input_ids, attention_mask=mask)[:, 1:].tolist()
