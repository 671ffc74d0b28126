"""What tasks share whose models write tokens: hidden states before the output head, what the head makes of them, metrics, generation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from ftkit.data.types import Items
from ftkit.errors import RecipeError
from ftkit.instead import instead

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ftkit.data.types import Batch, Scores
    from ftkit.recipe.spec import Generation
    from ftkit.tasks.streaming import Kept


class LanguageModelMetrics:
    """Token-weighted loss, perplexity and token accuracy."""

    NAMES = ("loss", "perplexity", "token_accuracy")

    def __init__(self) -> None:
        import torch

        self.kept: dict[str, Kept] = {}
        self.sums: dict[str, torch.Tensor] = {name: torch.zeros((), dtype=torch.float64) for name in ("loss", "correct", "count")}

    def update(self, scores: Scores) -> None:
        losses, correct = _judged(scores)
        weights = scores.weights.double()
        self.sums["loss"] += (losses.double() * weights).sum().cpu()
        self.sums["correct"] += (correct.double() * weights).sum().cpu()
        self.sums["count"] += weights.sum().cpu()

    def compute(self) -> dict[str, float]:
        """Not a number where nothing was supervised: `loss_count` is 0 then.

        A perplexity beyond the largest float, of a loss above 709, is given as that float: JSON has no infinity.
        """
        count = self.sums["count"]
        loss = self.sums["loss"] / count
        accuracy = self.sums["correct"] / count
        perplexity = min(loss.exp().item(), sys.float_info.max)
        return {"loss": loss.item(), "perplexity": perplexity, "token_accuracy": accuracy.item(), "loss_count": count.item()}

    def details(self) -> dict[str, Any]:
        """Nothing more."""
        return {}


def records(parts: Iterable[Scores]) -> list[dict[str, Any]]:
    """Mean loss of each feature's supervised tokens, and how many they are."""
    found: dict[int, list[float]] = {}
    for scores in parts:
        losses, _ = _judged(scores)
        for row, loss in zip(scores.rows.tolist(), losses.tolist(), strict=True):
            found.setdefault(row, []).append(loss)
    return [{"feature": row, "loss": sum(values) / len(values), "tokens": len(values)} for row, values in found.items()]


def _judged(scores: Scores) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss (float32 [n]) of each position, and whether its likeliest token is the right one (bool [n])."""
    from torch.nn import functional as F

    losses = F.cross_entropy(scores.logits.float(), scores.targets, reduction="none")
    return losses, scores.logits.argmax(-1) == scores.targets


# --- the modules below the output head ------------------------------------------------------------------------------


class _Reached(Exception):
    """A module that is looked for was called."""

    def __init__(self, module: Any, given: dict[str, Any]) -> None:
        self.module, self.given = module, given


def _reached(module: Any, *args: Any, **kwargs: Any) -> Any:
    raise _Reached(module, kwargs)


def trunk(model: Any) -> Any:
    """The module below the output head: that which the language model calls for hidden states.

    The base model as a rule; OPT's calls the decoder within it.  Raises RecipeError where it is neither.
    """
    import torch

    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with ExitStack() as stack, torch.no_grad():
        for module in filter(None, (model.base_model, getattr(model.base_model, "decoder", None))):
            stack.enter_context(instead(module, partial(_reached, module)))
        try:
            model(input_ids=token, use_cache=False)
        except _Reached as first:
            return first.module
    raise RecipeError(f"{type(model).__name__} does not call its base model for hidden states, so its output head cannot be told from it")


class Ran(NamedTuple):
    """A model, the module below its output head, and what that gave."""

    model: Any
    below: Any
    output: Any


def run(model: Any, **inputs: Any) -> Ran:
    """A model, PEFT's or plain, that has one stack of layers, of `inputs`, up to its output head."""
    outer = model.get_base_model() if hasattr(model, "get_base_model") else model
    if outer not in _trunks:
        _trunks[outer] = trunk(outer)
    return Ran(outer, _trunks[outer], _trunks[outer](**inputs))


def of_one_stack(batch: Batch, model: Any, **inputs: Any) -> Items:
    """The n supervised positions of a batch before the output head of a model, PEFT's or plain, that has one stack of layers."""
    return items(batch, *run(model, **inputs), "input_ids")


_trunks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # of the models that were asked


def items(batch: Batch, model: Any, below: Any, output: Any, tokens: str, **inputs: Any) -> Items:
    """The n supervised positions of a batch before the output head of a language model: it never sees the others.

    `output` is one of the module `below` the head; the model takes `tokens` and `inputs`.
    """
    states = output.last_hidden_state.flatten(0, 1)[batch.supervised]
    rows = batch.supervised // batch.targets.shape[1]
    head = partial(logits, model, below, output, tokens, **inputs)
    if model not in _layers:
        _layers[model] = _layer_of_rows(model, head, states)
    return Items(
        states=states,
        head=head,
        num_classes=model.config.get_text_config().vocab_size,
        targets=batch.targets.flatten()[batch.supervised],
        weights=batch.weights.flatten()[batch.supervised],
        rows=batch.row_ids[rows],
        layer=_layers[model],
        written=None if batch.written is None else batch.written[rows],
    )


def logits(model: Any, below: Any, output: Any, tokens: str, states: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """What a language model makes of hidden states [m, H]: logits [m, V], scaled and capped as its own code does it.

    `output` is one of the module `below` the head; the model takes `tokens`, of which only the number matters then, and `inputs`.
    """
    given = type(output)(**{**output, "last_hidden_state": states.unsqueeze(0)})
    with instead(below, lambda *args, **kwargs: given):
        said = model(**{tokens: states.new_zeros(1, len(states)).long()}, **inputs, use_cache=False)
    found: torch.Tensor = said.prediction_logits if "prediction_logits" in said else said.logits  # beside those of another head
    return found.squeeze(0)


_layers: WeakKeyDictionary[Any, nn.Linear | None] = WeakKeyDictionary()  # of the models that were looked through


def _layer_of_rows(model: Any, head: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor) -> nn.Linear | None:
    """The layer of the head whose rows are tokens, if the model makes each logit of what the layer gives for one row.

    As it does for one position like `states` [n, H].
    """
    import torch
    from torch import nn
    from torch.nn import functional

    layer = model.get_output_embeddings()
    if type(layer) is not nn.Linear or "forward" in vars(layer) or type(layer.weight) is not nn.Parameter:  # of PEFT, or sharded
        return None
    one = torch.linspace(-1, 1, states.shape[-1], dtype=layer.weight.dtype, device=states.device)[None]
    with torch.no_grad(), torch.autocast(states.device.type, enabled=False):
        whole = head(one)
        if whole.shape[-1] != layer.out_features:
            return None
        half = slice(0, layer.out_features // 2)
        try:
            with instead(layer, lambda x: functional.linear(x, layer.weight[half], None if layer.bias is None else layer.bias[half])):
                some = head(one)
        except RuntimeError:  # added to, or multiplied by, what has a number for each token
            return None
    same = some.shape[-1] == half.stop and torch.allclose(some, whole[:, half], rtol=1e-3, atol=1e-3 * whole.abs().max().item())
    return layer if same else None


class Stacks(NamedTuple):
    """The two stacks of an encoder-decoder."""

    encoder: Any
    decoder: Any


def stacks(model: Any) -> Stacks:
    """Those that the model runs one after the other; RecipeError where it does more with their states than hand them on."""
    import torch
    from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

    found = Stacks(model.get_encoder(), model.get_decoder())
    states = torch.zeros(1, 1, model.config.get_text_config().hidden_size, dtype=model.dtype, device=model.device)
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with instead(found.encoder, lambda *args, **kwargs: BaseModelOutput(states)), instead(found.decoder, partial(_reached, None)), torch.no_grad():
        try:
            model(input_ids=token, decoder_input_ids=token, use_cache=False)
        except _Reached as decoder:
            if decoder.given.get("encoder_hidden_states") is not states:
                name = type(model).__name__
                raise RecipeError(f"{name} does not hand the states of its encoder to its decoder as they are; it cannot be fine-tuned here") from None
    try:
        with torch.no_grad():
            given = BaseModelOutputWithPastAndCrossAttentions(states)
            logits(model, found.decoder, given, "decoder_input_ids", states[0], encoder_outputs=BaseModelOutput(states))
    except (AttributeError, IndexError, TypeError) as error:
        raise RecipeError(f"{type(model).__name__} makes its logits of more than the states of its decoder; it cannot be fine-tuned here") from error
    return found


def decoder_inputs(model: Any, targets: torch.Tensor) -> torch.Tensor:
    """What a decoder reads that is to write `targets`, int64 [B, T]: those before each, as the model's own code shifts them."""
    import torch

    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels=targets)
    first = torch.full_like(targets[:, :1], model.config.decoder_start_token_id)
    return torch.cat((first, targets[:, :-1]), 1)


# --- generation -----------------------------------------------------------------------------------------------------


# What undoes the settings of a model's own that change what it says: samples are of its distribution then, as in training.
UNCHANGED: Mapping[str, Any] = MappingProxyType(
    {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "min_new_tokens": 0}
)


def generate(model: Any, config: Any, **given: Any) -> torch.Tensor:
    """What a model's own `generate` writes, int64; by layers as they are not compiled: each length of a cache would be compiled anew, until torch gives up."""
    import torch

    uncompiled = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()  # whose import takes a second
    with uncompiled:
        return model.generate(generation_config=config, **given)


def generation_config(generation: Generation, stops: list[int], pad: int, **others: Any) -> Any:
    """The recipe's settings, and `others`, as transformers takes them; the model's own hold for the rest."""
    from transformers import GenerationConfig

    sampled = generation.temperature > 0
    return GenerationConfig(
        max_new_tokens=generation.max_new_tokens,
        num_beams=generation.num_beams,
        do_sample=sampled,
        **({"temperature": generation.temperature, "top_p": generation.top_p, "top_k": 0} if sampled else {}),
        eos_token_id=stops,
        pad_token_id=pad,
        use_cache=True,
        **others,
    )
