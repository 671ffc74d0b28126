"""What the tasks share that ask of two segments of text how they belong together, beside which tokens are hidden."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftkit.data.types import Features, Items, Limits, Row, RowError
from ftkit.instead import instead
from ftkit.recipe.spec import Generation, option
from ftkit.tasks import Column, Shape, joint, language_model
from ftkit.tasks.joint import JointMetrics
from ftkit.tasks.masked_text import EXAMPLES, TEXT, MaskedText
from ftkit.tasks.packing import cut, fits, packed
from ftkit.tasks.pairing import LINE, Pairing
from ftkit.tasks.texts import batch_of, fit

if TYPE_CHECKING:
    import torch

    from ftkit.data.features import Corruption, FeatureSet
    from ftkit.data.types import Batch, Scores
    from ftkit.tasks.pairing import Made

TEXT_PAIR = Column("text_pair", "the second text of a question")
HEADS = {"seq_relationship": "seq_relationship_logits", "sop_classifier": "sop_logits"}  # module that tells of two segments -> the output that it gives


class SentencePairs(MaskedText):
    """Documents, lines of which become two segments; some tokens are hidden.  The loss: both means, added."""

    packing: Literal["segment-pair", "sentence-pair"] = option(
        "segment-pair", "an input is as many lines of a document as fit, or two of them", "BERT; both in RoBERTa (arXiv 1907.11692, table 2)"
    )

    shapes: ClassVar[tuple[Shape, ...]] = (Shape(TEXT, asked=(TEXT, TEXT_PAIR)),)
    txt_row: ClassVar[str] = "file"
    auto_class: ClassVar[str] = "AutoModelForPreTraining"
    head: ClassVar[str] = "sentence pairs"
    answers: ClassVar[tuple[str, str]]  # what a pair is that is the text's own, and one that was made
    metric_names: ClassVar[tuple[str, ...]] = joint.NAMES
    main_metric: ClassVar[str] = "loss"

    def examples(self) -> list[dict[str, Any]]:
        return [{"text": "\n".join(EXAMPLES[i : i + 3])} for i in range(len(EXAMPLES) - 2)]

    def lacks(self, model: Any) -> str | None:
        if any(name.rpartition(".")[2] in HEADS for name, _ in model.named_modules()):
            return None
        return "no head that tells of two segments how they belong together; BERT, ALBERT, ERNIE and BigBird have one"

    @abstractmethod
    def _made(self, features: FeatureSet, tokenizer: Any) -> Made:
        """What makes a false pair of two segments and the index of their row."""

    def encode(self, row: Row, tokenizer: Any, limits: Limits) -> list[Features]:
        """As many lines of a document together as fit, or two; each begins with the weight LINE.  What has one token only is left out."""
        frame = self._frame(tokenizer)
        pieces = self._pieces(row, tokenizer)
        for piece in pieces:
            piece.weights[0] *= LINE
        length = limits.max_length - frame.size_of_two
        if not fits(pieces, length, frame.size_of_two, limits):
            return []
        groups = [pieces] if self.packing == "segment-pair" else [pieces[i : i + 2] for i in range(0, len(pieces), 2)]
        parts = (part for group in groups for _, part in packed(((0, part) for piece in group for part in cut(piece, length)), length))
        found = [frame.around(part, two=True) for part in parts if len(part.input_ids) > 1]
        if not found:
            raise RowError("the text is one token, which cannot be cut into two segments")
        return found

    def corruption(self, features: FeatureSet, tokenizer: Any, seed: int) -> Corruption:
        """The second segment of each feature, and its masks."""
        from ftkit.data.features import Corruption

        pairing = Pairing(self._frame(tokenizer), self._masks(tokenizer), self._made(features, tokenizer))
        told = f"half of the pairs of segments are {self.answers[1]}; of the tokens {self.probability:.0%} are hidden at a time, and only these count"
        return Corruption(pairing, seed, self.masking == "dynamic", told)

    def counts(self, batch: Batch) -> torch.Tensor:
        """float64 [2]: the weights of tokens, and those of pairs."""
        import torch

        weights, pairs = batch.weights.double(), batch.targets < 0
        return torch.stack((weights[~pairs].sum(), weights[pairs].sum()))

    def items(self, model: Any, batch: Batch) -> tuple[Items, Items]:
        """The hidden tokens before the output head, and the pairs, of what the pooler gives, before theirs."""
        ran = language_model.run(model, **batch.inputs)
        flat = batch.targets.flatten()[batch.supervised]
        tokens = language_model.items(replace(batch, supervised=batch.supervised[flat >= 0]), *ran, "input_ids")
        places = batch.supervised[flat < 0]
        rows = places // batch.targets.shape[1]
        pairs = Items(
            states=ran.output.pooler_output[rows],
            head=partial(_relation, *ran),
            num_classes=2,
            targets=~batch.targets.flatten()[places],
            weights=batch.weights.flatten()[places],
            rows=batch.row_ids[rows],
            part=joint.QUESTION,
        )
        return tokens, pairs

    def metrics(self, rows: Sequence[Row], features: FeatureSet) -> JointMetrics:
        return JointMetrics()

    def records(self, parts: Iterable[Scores]) -> list[dict[str, Any]]:
        """Of each feature its hidden tokens, what the pair is, and how likely it is to be a made one."""
        masks, pairs = joint.of_masks(parts)
        found = []
        for scores in pairs:
            told = (scores.rows, *joint.answers(scores), joint.probabilities(scores))
            for row, said, true, probability in zip(*(each.tolist() for each in told), strict=True):
                pair = {"label": self.answers[true], "prediction": self.answers[said], "probability": probability}
                found.append({"feature": row} | masks.get(row, {}) | pair)
        return found

    def predict(self, model: Any, tokenizer: Any, rows: list[Row], limits: Limits, generation: Generation) -> list[dict[str, Any]]:
        """`label`: what a pair of texts is, with its probability."""
        import torch

        from ftkit import prompts

        def encode(row: Row) -> list[Features]:
            fitted = fit(tokenizer, [row.values["text"], row.values["text_pair"]], limits)
            assert fitted is not None, "predict does not drop rows"
            return [Features(fitted.input_ids, [~0] + [0] * (len(fitted.input_ids) - 1), [1.0] + [0.0] * (len(fitted.input_ids) - 1), fitted.token_type_ids)]

        with torch.inference_mode(), prompts.given(model, batch_of(rows, encode, tokenizer, model.device)) as batch:
            scores = self.items(model, batch)[joint.QUESTION].scores()
            likely = joint.probabilities(scores).tolist()
        return [{"label": self.answers[made > 0.5], "probability": max(made, 1 - made)} for made in likely]


def _relation(model: Any, below: Any, output: Any, states: torch.Tensor) -> torch.Tensor:
    """What a model says of pairs of which its pooler gave states [m, H]: logits [m, 2]; `output` is one of the module `below` the heads."""
    given = type(output)(**{**output, "last_hidden_state": output.last_hidden_state[:1, :1], "pooler_output": states})
    with instead(below, lambda *args, **kwargs: given):
        said = model(input_ids=states.new_zeros(1, 1).long())
    return next(said[name] for name in HEADS.values() if name in said)
