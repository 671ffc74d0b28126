"""Knowledge distillation (arXiv 1503.02531): the student should say what a trained teacher says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ftkit.errors import RecipeError
from ftkit.recipe.spec import Name, Spec, option

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ftkit.data.types import Batch, Limits, Scores
    from ftkit.intermediate import Inside
    from ftkit.tasks import Task

PRESETS = {"distilbert": {"alpha": 2 / 7, "cosine": 1 / 7, "temperature": 2.0}}  # its sum of 5, 2 and 1, divided by 7


class Distill(Spec):
    """Scores of a teacher: alpha times the loss on the data's own targets, and (1 - alpha) T^2 times the divergence from softened scores."""

    kind: Literal["distill"] = "distill"
    teacher: Name = option(..., "run directory of the trained teacher, of the same task; for language models also a directory or a hub id")
    teacher_revision: str | None = option(None, "commit, tag or branch of a teacher on the hub; the run's recipe names the commit")
    teacher_bits: Literal[4, 8] | None = option(None, "bits a weight of the teacher's linear modules; as they are stored if empty")
    alpha: float = option(0.1, "share of the loss on the data's own targets", "the considerably lower weight of arXiv 1503.02531, 2.2", ge=0, le=1)
    temperature: float = option(2.0, "what the scores of both are divided by; 1 in evaluation", "DistilBERT's train.py, within 1503.02531's 1 to 20", gt=0)
    divergence: Literal["forward", "reverse", "jensen-shannon"] = option(
        "forward", "KL(teacher || student); reverse: KL(student || teacher) (arXiv 2306.08543); jensen-shannon: of both from their mean (2306.13649)"
    )
    beta: float = option(
        0.5, "of jensen-shannon, the teacher's share of the mean that both are compared with: near 0 it is forward", "GKD, 2306.13649", gt=0, lt=1
    )
    on_policy: float = option(
        0.0, "share of rows, others in each epoch, whose answers the student writes itself and learns what the teacher says of them (GKD's lambda)", ge=0, le=1
    )
    max_new_tokens: int = option(128, "of such an answer, at most", "TRL's GKDConfig", ge=1)
    cache: bool = option(True, "ask the teacher once for all training rows and keep its answers for later epochs and runs; false: in each step")
    top_k: int = option(64, "of many classes, such as a vocabulary, the cache has the scores of so many, and what is left for the others", ge=1)
    cache_states: bool = option(
        False, "keep in the cache the states that hidden, cosine and embeddings compare, too: as many numbers a token as the teacher is wide"
    )
    hidden: float = option(0.0, "weight of the squared difference of states after each layer (TinyBERT, arXiv 1909.10351)", ge=0)
    cosine: float = option(0.0, "weight of 1 - cosine of the last states (DistilBERT, arXiv 1910.01108)", ge=0)
    embeddings: float = option(0.0, "weight of the squared difference of what comes into the first layer (TinyBERT)", ge=0)
    attention: float = option(0.0, "weight of the squared difference of attention before its softmax, head by head (TinyBERT)", ge=0)
    relations: float = option(0.0, "weight of the divergence of relations among queries, keys and values of the last layer (MiniLM v2, 2012.15828)", ge=0)
    relation_heads: int = option(12, "into how many heads these are cut; more are better, as far as widths allow", "MiniLM v2 took 12 to 64", ge=1)
    layer_map: Literal["uniform", "last"] | list[Annotated[int, Field(ge=0)]] = option(
        "uniform", "which of the teacher's layers each of the student's is to be like: spread evenly, the highest, or a list counted from 0", "TinyBERT"
    )
    preset: Literal["distilbert"] | None = option(None, "weights that were published: DistilBERT's 5 soft, 2 hard and 1 cosine, at temperature 2")
    in_chunks: bool = option(True, "in training, output heads and loss for some of the supervised items at a time, where they are many")

    label_smoothing: ClassVar[None] = None
    companion: ClassVar[str] = "projection"

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, given: Any) -> Any:
        return PRESETS.get(str(given.get("preset")), {}) | given if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _something(self) -> Distill:
        if self.divergence != "jensen-shannon" and self.beta != 0.5:
            raise ValueError(f"beta has no effect with divergence: {self.divergence}; leave it out, or set divergence: jensen-shannon")
        if self.layer_map != "uniform" and not (self.hidden or self.attention or self.cosine or self.relations):
            raise ValueError("layer_map has no effect without hidden, cosine, attention or relations; leave it out")
        if not self.on_policy and self.max_new_tokens != 128:
            raise ValueError("max_new_tokens has no effect without on_policy; leave it out, or set on_policy: 0.5")
        if self.on_policy and self.alpha == 1:
            raise ValueError("alpha: 1 asks no teacher, and what on_policy lets the student write is learned from a teacher alone; leave on_policy out")
        if self.on_policy and self.cache_states:
            raise ValueError("cache_states has no effect with on_policy, for answers that change; leave it out")
        if self.cache_states and not (self.cache and (self.hidden or self.cosine or self.embeddings)):
            raise ValueError("cache_states has no effect without cache, and hidden, cosine or embeddings; leave it out")
        if self.cache_states and (self.attention or self.relations):
            raise ValueError("cache_states: attention and relations compare queries and keys, which are not kept; leave it out")
        return self

    @property
    def looks_inside(self) -> bool:
        """Whether layers are compared, and not scores alone."""
        return any((self.hidden, self.cosine, self.embeddings, self.attention, self.relations))

    @property
    def watches_attention(self) -> bool:
        """Whether queries, keys and values are compared, beside states."""
        return bool(self.attention or self.relations)

    def check(self, task: Task, tokenizer: Any, limits: Limits) -> None:
        from ftkit import teachers

        if self.on_policy and not hasattr(task, "continuations"):
            raise RecipeError(f"objective.on_policy: students of causal-lm write answers, those of {task.kind} do not; leave it out")
        teachers.check(self, task, tokenizer, limits)

    def pinned(self) -> Distill:
        """With the very commit of a teacher on the hub, whose branches move."""
        from ftkit.teacher_models import Stored, find

        origin = find(self)
        return self.model_copy(update={"teacher_revision": origin.commit()}) if isinstance(origin, Stored) else self

    def beside(self, model: Any) -> nn.ModuleDict | None:
        """Linear maps that make the student's states as wide as the teacher's, where they are compared and are not (TinyBERT, eq. 8).

        Raises RecipeError where layers have nothing that could be compared.
        """
        import torch
        from torch import nn

        from ftkit.teacher_models import find

        if not self.looks_inside:
            return None
        own, theirs = (config.get_text_config() for config in (model.config, find(self).config()))
        self._check_layers(own, theirs)
        if own.hidden_size == theirs.hidden_size:
            return None
        names = [name for name, weight in (("states", self.hidden or self.cosine), ("embeddings", self.embeddings)) if weight]
        with torch.device("meta" if model.device.type == "meta" else "cpu"):
            return nn.ModuleDict({name: nn.Linear(own.hidden_size, theirs.hidden_size, bias=False) for name in names}) if names else None

    def _check_layers(self, own: Any, theirs: Any) -> None:
        """Refuse, by the configs of both, what cannot be compared."""
        from ftkit.intermediate import layer_map

        try:
            layer_map(self.layer_map, own.num_hidden_layers, theirs.num_hidden_layers)
        except ValueError as error:
            raise RecipeError(f"objective.layer_map: {error}") from None
        heads = own.num_attention_heads, theirs.num_attention_heads
        if self.attention and heads[0] != heads[1]:
            raise RecipeError(
                f"objective.attention: the student has {heads[0]} heads in a layer, the teacher {heads[1]}; use relations, which need no equal heads"
            )
        if self.relations and (bad := [width for width in (_narrowest(own), _narrowest(theirs)) if width % self.relation_heads]):
            raise RecipeError(
                f"objective.relation_heads: {bad[0]} numbers, as wide as keys are, cannot be cut into {self.relation_heads} heads; give a divisor"
            )

    def compared(self, student: int, teacher: int) -> list[int]:
        """Which of a teacher's states, 0 what comes into its first layer, are compared with those of a student of so many layers, in ascending order."""
        from ftkit.intermediate import layer_map

        places = layer_map(self.layer_map, student, teacher)
        states = [1 + place for place in places] if self.hidden else [1 + places[-1]] if self.cosine else []
        return sorted({*states, *([0] if self.embeddings else [])})

    def difference(self, student: Inside, teacher: Inside, batch: Batch, widen: Any = None) -> torch.Tensor:
        """The SUM over the N real tokens of how far the layers are from each other, float32; `widen` is what `beside` gave."""
        from ftkit import intermediate

        places = intermediate.layer_map(self.layer_map, len(student.states) - 1, len(teacher.states) - 1)
        lengths, causal = intermediate.lengths_of(batch), student.causal

        def wide(states: torch.Tensor, name: str) -> torch.Tensor:
            return widen[name](states) if widen is not None else states

        found = []
        if self.hidden:
            pairs = [(wide(student.states[1 + own], "states"), teacher.states[1 + place]) for own, place in enumerate(places)]
            found += [self.hidden / len(pairs) * intermediate.squared(*pair) for pair in pairs]
        if self.cosine:
            found.append(self.cosine * intermediate.angle(wide(student.states[-1], "states"), teacher.states[1 + places[-1]]))
        if self.embeddings:
            found.append(self.embeddings * intermediate.squared(wide(student.states[0], "embeddings"), teacher.states[0]))
        if self.attention:
            layers = [(student.compared[own], teacher.compared[place]) for own, place in enumerate(places)]
            found += [self.attention / len(layers) * intermediate.maps(*layer, lengths, causal) for layer in layers]
        if self.relations:
            kinds = zip(student.compared[-1], teacher.compared[places[-1]], strict=True)
            found += [self.relations / 3 * intermediate.relations(*kind, lengths, self.relation_heads, causal) for kind in kinds]
        return (sum(found) * intermediate.token_weights(batch)).sum()

    def loss(self, scores: Scores) -> torch.Tensor:
        """Weighted sum over the n supervised items, in float32; what the student wrote itself is no target, and only compared."""
        from ftkit.divergences import divergence
        from ftkit.objectives import losses

        if len(scores.targets) == 0:  # keep the graph, so that every process has gradients to add up
            return scores.logits.float().sum()
        assert scores.teacher is not None
        student, teacher = _of_same_classes(scores.logits, scores.teacher)
        soft = self.temperature**2 * divergence(student, teacher, self.temperature, self.divergence, scores.kind == "labels", self.beta)
        hard = losses(scores)
        if scores.written is not None:
            hard = hard.masked_fill(scores.written, 0)
        return ((self.alpha * hard + (1 - self.alpha) * soft) * scores.weights).sum()


def _of_same_classes(*logits: torch.Tensor) -> list[torch.Tensor]:
    """Those that all have: models of one tokenizer may be filled up to round numbers of tokens that do not exist."""
    count = min(each.shape[-1] for each in logits)
    return [each[..., :count] for each in logits]


def _narrowest(config: Any) -> int:
    """Numbers that the keys of a layer are, which may be fewer than its queries."""
    heads = config.num_attention_heads
    return int((getattr(config, "num_key_value_heads", None) or heads) * (getattr(config, "head_dim", None) or config.hidden_size // heads))
