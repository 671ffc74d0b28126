"""What tasks share that hide tokens of texts and ask which they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import WeakKeyDictionary

from pydantic import model_validator

from ftkit.data.types import Features, Limits, Row, RowError
from ftkit.errors import RecipeError
from ftkit.recipe.spec import Default, Spec, option
from ftkit.tasks import Column, Shape
from ftkit.tasks.packing import Frame, cut, fits, packed

if TYPE_CHECKING:
    from ftkit.data.features import Corruption, FeatureSet
    from ftkit.data.types import Targets
    from ftkit.tasks.masking import Masking

TEXT = Column("text", "plain text", "content", "document", "sentence")

EXAMPLES = (
    "Bees make honey and wax in the old tree.",
    "A week has seven days.",
    "The whale swam far out into the quiet sea.",
    "Ice is frozen water.",
    "Spring follows winter, and the snow melts.",
    "The clock on the tower shows the time.",
    "A baker bakes bread early in the morning.",
    "Rain and snow fall from clouds.",
    "The spider has eight legs and a fine web.",
    "Acorns grow on an oak.",
    "An anchor keeps the boat in its place.",
    "The sun rises over the hills.",
)


class Replacement(Spec):
    """What stands for hidden tokens; the rest of them is seen as it is."""

    mask: float = option(0.8, "share that the mask token stands for", "BERT (arXiv 1810.04805, A.1)", ge=0, le=1)
    random: float = option(0.1, "share that any other token stands for", "BERT (arXiv 1810.04805, A.1)", ge=0, le=1)

    @model_validator(mode="after")
    def _within_one(self) -> Replacement:
        if self.mask + self.random > 1 + 1e-9:
            raise ValueError(f"replace.mask and replace.random are shares of the hidden tokens, and {self.mask:g} + {self.random:g} is more than 1")
        return self


class MaskedText(Spec):
    """Texts of which some tokens are hidden, others in each epoch."""

    kind: str
    probability: float = option(0.15, "share of the tokens that are hidden", "BERT (arXiv 1810.04805, 3.1)", gt=0, lt=1)
    unit: Literal["token", "whole-word", "span"] = option(
        "token", "what is hidden together: a token, a word, or a span of words (SpanBERT, arXiv 1907.10529)", "BERT (arXiv 1810.04805)"
    )
    masking: Literal["dynamic", "static"] = option(
        "dynamic", "other tokens in each epoch, or the same in all; those that are measured are always the same", "RoBERTa (arXiv 1907.11692, 4.1)"
    )
    replace: Replacement = option({}, "what stands for hidden tokens", validate_default=True)

    peft_type: ClassVar[str] = "FEATURE_EXTRACTION"  # PEFT has no name for it; its model of that name hands inputs and outputs on as they are
    targets: ClassVar[Targets] = "classes"
    new_head: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Default]] = {
        "data.max_length": Default(512, "the positions of BERT (arXiv 1810.04805)"),
    }

    def examples(self) -> list[dict[str, Any]]:
        return [{"text": text} for text in EXAMPLES]

    def resolve(self, rows: Iterable[Row]) -> MaskedText:
        return self

    def check(self, tokenizer: Any) -> None:
        """Refuse a tokenizer that cannot hide tokens, or does not tell words where these are wanted."""
        name = tokenizer.name_or_path or "this run"
        if tokenizer.mask_token_id is None:
            raise RecipeError(
                f"task {self.kind}: the tokenizer of {name} has no mask token (mask_token), so nothing can be hidden; "
                "name one that has (model.tokenizer: that of an encoder such as BERT), or train one: {train: data, kind: wordpiece}"
            )
        if self.unit != "token" and not getattr(tokenizer, "is_fast", False):
            raise RecipeError(
                f"task.unit: {self.unit}: the tokenizer of {name} does not say which tokens make up a word; "
                "use unit: token, or a tokenizer that is made by the tokenizers library (a tokenizer.json)"
            )

    def config_kwargs(self) -> dict[str, Any]:
        return {}

    def complete(self, model: Any, tokenizer: Any) -> None:
        """A masked language model needs nothing beside its weights."""

    def _pieces(self, row: Row, tokenizer: Any, lines: bool = True) -> list[Features]:
        """The lines of a row's text, or the text as it is, without special tokens around; those without a token are left out.

        A token that goes on with a word has the target ~token.  Raises RowError where no line has a token.
        """
        text = row.values["text"]
        encoded = tokenizer(text.splitlines() or [""] if lines else [text], add_special_tokens=False, verbose=False)
        special = self._frame(tokenizer).special
        pieces = []
        for number, ids in enumerate(encoded["input_ids"]):
            words = range(len(ids)) if self.unit == "token" else encoded.word_ids(number)
            goes_on = [place > 0 and words[place] == words[place - 1] for place in range(len(ids))]
            targets = [~token if on else token for token, on in zip(ids, goes_on, strict=True)]
            pieces.append(Features(ids, targets, [float(token not in special) for token in ids]))
        if not (found := [piece for piece in pieces if piece.input_ids]):
            raise RowError("the text is empty" if not text.strip() else "the tokenizer makes no token of the text")
        return found

    def _frame(self, tokenizer: Any) -> Frame:
        """Asked once, not for every row."""
        if tokenizer not in self._frames:
            self._frames[tokenizer] = Frame.of(tokenizer)
        return self._frames[tokenizer]

    @cached_property
    def _frames(self) -> WeakKeyDictionary[Any, Frame]:
        return WeakKeyDictionary()

    def _masks(self, tokenizer: Any) -> Masking:
        import numpy as np

        from ftkit.tasks.masking import Masking

        others = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
        return Masking(self.probability, self.unit, self.replace.mask, self.replace.random, tokenizer.mask_token_id, np.array(others))

    def corruption(self, features: FeatureSet, tokenizer: Any, seed: int) -> Corruption:
        """The masks of each feature."""
        from ftkit.data.features import Corruption

        told = f"of the supervised tokens {self.probability:.0%} are hidden at a time, and only these count"
        return Corruption(self._masks(tokenizer), seed, self.masking == "dynamic", told)


class PackedText(MaskedText):
    """Texts laid together as inputs, some tokens of which are hidden."""

    packing: Literal["doc-sentences", "full-sentences", "lines"] = option(
        "doc-sentences",
        "an input is as many whole lines as fit, of one document (a txt file, or a row of other formats) or of several; or lines: a row, a line of a txt file",
        "RoBERTa (arXiv 1907.11692, table 2)",
    )

    shapes: ClassVar[tuple[Shape, ...]] = (Shape(TEXT),)

    @property
    def txt_row(self) -> str:
        return "line" if self.packing == "lines" else "file"

    def encode(self, row: Row, tokenizer: Any, limits: Limits) -> list[Features]:
        """Tokens that may be hidden, which are their own targets, and special ones, which may not; a token that goes on with a word has the target ~token.

        `lines`: a row, cut where it is longer than `max_length`.  `doc-sentences`: the lines of a row, as many together
        as fit.  `full-sentences`: its lines by themselves, for `packed`.  `truncation: drop` and `error` look at rows.
        """
        frame = self._frame(tokenizer)
        pieces = self._pieces(row, tokenizer, lines=self.packing != "lines")
        length = limits.max_length - frame.size
        if not fits(pieces, length, frame.size, limits):
            return []
        parts = [part for piece in pieces for part in cut(piece, length)]
        if self.packing == "full-sentences":
            return parts
        if self.packing == "doc-sentences":
            parts = [part for _, part in packed(((0, part) for part in parts), length)]
        return [frame.around(part) for part in parts]

    def packed(self, features: Iterable[tuple[int, list[Features]]], tokenizer: Any, limits: Limits) -> Iterator[tuple[int, list[Features]]]:
        """Under `full-sentences` inputs of the lines of successive rows; else as they are."""
        if self.packing != "full-sentences":
            yield from features
            return
        frame = self._frame(tokenizer)
        parts = ((row, part) for row, parts in features for part in parts)
        for row, together in packed(parts, limits.max_length - frame.size, tokenizer.sep_token_id):
            yield row, [frame.around(together)]
