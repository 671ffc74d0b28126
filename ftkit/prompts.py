"""Virtual tokens in front of every row: what soft prompts are made of.

They have ids of their own, those after the vocabulary, and the input embedding gives what was learned for them.
Everything else in a model sees longer rows: positions, masks, layouts and caches are its own code's.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ftkit.data.batches import segments
from ftkit.methods.modules import embedding_of, two_stacks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedModel

    from ftkit.data.types import Batch

CONFIG = "adapter_config.json"  # PEFT's
IGNORED = -100  # by transformers' losses


class Prompt(nn.Module):
    """What the virtual tokens are embedded as: [n, width], learned, or what an encoder makes of it (arXiv 2103.10385, 3.2)."""

    def __init__(self, length: int, width: int, encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(length, width))
        self.encoder = encoder

    def forward(self) -> torch.Tensor:
        if self.encoder is None:
            return self.weight
        with torch.autocast(self.weight.device.type, enabled=False):
            encoded: torch.Tensor = self.encoder(self.weight)
        return encoded

    @torch.no_grad()
    def fold(self) -> None:
        """Keep what the encoder gives, without the encoder."""
        self.weight = nn.Parameter(self(), requires_grad=self.weight.requires_grad)
        self.encoder = None


class Virtual:
    """A model whose rows begin with virtual tokens; calls and generations that do not give them get them.

    Rows may be padded on either side.  Of a call, outputs at virtual positions are among the others, as in PEFT; what is
    generated has none of them.
    """

    def __init__(self, model: PreTrainedModel, prompt: Prompt) -> None:
        embedding = embedding_of(model)
        self.model = model
        self.prompt, self.vocabulary, self.two_stacks, self._given = prompt, embedding.num_embeddings, two_stacks(model), False
        embedding.add_module("prompt", prompt)
        for module in {embedding, *_embeddings_of_decoder(model)}:
            module.forward = partial(self._embedded, module.forward)
        if model.can_generate():
            self._generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
            model.generate = self._generated  # type: ignore[assignment]
        model.register_forward_pre_hook(self._called, with_kwargs=True)

    @property
    def length(self) -> int:
        return len(self.prompt.weight)

    @contextmanager
    def given(self) -> Iterator[None]:
        """What is called herein gives the virtual tokens itself."""
        before, self._given = self._given, True
        try:
            yield
        finally:
            self._given = before

    def extended(self, batch: Batch) -> Batch:
        """The batch with virtual tokens in front of each row, of which none is supervised."""
        width, n = batch.input_ids.shape[1], self.length

        def longer(values: torch.Tensor, value: int) -> torch.Tensor:
            return F.pad(values, (0, 0) * (values.dim() - 2) + (n, 0), value=value)

        input_ids = longer(batch.input_ids, 0)
        input_ids[:, :n] = self._ids(batch.input_ids.device)
        changed: dict[str, Any] = {"input_ids": input_ids, "attention_mask": longer(batch.attention_mask, 1), "filled": None}
        if batch.token_type_ids is not None:
            changed["token_type_ids"] = longer(batch.token_type_ids, 0)
        if batch.weights.dim() == 2 and not batch.source[0].apart:
            changed |= {"targets": longer(batch.targets, 0), "weights": longer(batch.weights, 0)}
            changed["supervised"] = batch.supervised + n * (batch.supervised // width + 1)
        if batch.segments is not None:
            lengths = np.array(batch.segments.lengths) + n
            changed["segments"] = segments((np.arange(width + n) < lengths[:, None]).astype(np.int64)).to(batch.input_ids.device, non_blocking=True)
        return replace(batch, **changed)

    def _ids(self, device: torch.device) -> torch.Tensor:
        return torch.arange(self.vocabulary, self.vocabulary + self.length, device=device)

    def _embedded(self, embed: Callable[[torch.Tensor], torch.Tensor], input_ids: torch.Tensor) -> torch.Tensor:
        """[B, L] -> [B, L, width], by the embedding's own `embed` but for virtual tokens."""
        virtual = input_ids >= self.vocabulary
        known = embed(input_ids.masked_fill(virtual, 0))
        learned = F.embedding((input_ids - self.vocabulary).clamp(min=0), self.prompt().to(known.dtype))
        return torch.where(virtual.unsqueeze(-1), learned, known)

    def _called(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Put the virtual tokens in front of the rows of a call, where it has no states of earlier ones."""
        if self._given:
            return None
        inputs = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
        earlier = inputs.get("past_key_values")
        _refuse_embeddings(inputs)
        if inputs.get("input_ids") is None or (earlier is not None and earlier.get_seq_length()):
            return None
        if inputs.get("position_ids") is not None:
            raise ValueError("position_ids: positions are counted with the virtual tokens of the prompt; leave them out")
        return (), inputs | self._with_virtual(inputs["input_ids"], inputs)

    def _with_virtual(self, input_ids: torch.Tensor, kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The inputs of rows [B, L] with virtual tokens before the first real one, [B, n + L]."""
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        n, (count, width) = self.length, input_ids.shape
        start = (mask.cumsum(1) == 0).sum(1, keepdim=True)  # [B, 1]: padding on the left
        place = torch.arange(n + width, device=input_ids.device).expand(count, -1)
        virtual = (place >= start) & (place < start + n)
        source = torch.where(place < start, place, (place - n).clamp(min=0))  # where the others come from
        changed = {
            "input_ids": torch.where(virtual, self.vocabulary + place - start, input_ids.gather(1, source)),
            "attention_mask": mask.gather(1, source).masked_fill(virtual, 1),
        }
        if (types := kwargs.get("token_type_ids")) is not None:
            changed["token_type_ids"] = types.gather(1, source).masked_fill(virtual, 0)
        labels = kwargs.get("labels")
        if labels is not None and labels.shape == input_ids.shape and not self.two_stacks:  # of the tokens; a decoder has its own
            changed["labels"] = labels.gather(1, source).masked_fill(virtual, IGNORED)
        return changed

    def _real(self, input_ids: torch.Tensor, kwargs: Mapping[str, Any]) -> torch.Tensor:
        """The mask that `generate` makes of tokens where none is given: of what is no padding, if padding cannot be the end of a text."""
        config = kwargs.get("generation_config") or self.model.generation_config
        pad, end = (kwargs.get(name, getattr(config, name)) for name in ("pad_token_id", "eos_token_id"))
        ends = end if isinstance(end, list) else [end]
        return torch.ones_like(input_ids) if pad is None or pad in ends else (input_ids != pad).long()

    def _penalty_of_real(self, input_ids: torch.Tensor, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """`encoder_repetition_penalty` for the tokens of the vocabulary alone: transformers' own looks up the scores of all tokens of a prompt."""
        from transformers import EncoderRepetitionPenaltyLogitsProcessor, LogitsProcessorList

        config = kwargs.get("generation_config") or self.model.generation_config
        penalty, beams, several = (kwargs.get(name, getattr(config, name)) for name in ("encoder_repetition_penalty", "num_beams", "num_return_sequences"))
        if penalty in (None, 1.0):
            return {}
        expanded: Any = input_ids.repeat_interleave(max(beams or 1, several or 1), 0)
        ours = EncoderRepetitionPenaltyLogitsProcessor(penalty, expanded)
        return {"encoder_repetition_penalty": 1.0, "logits_processor": LogitsProcessorList([*(kwargs.get("logits_processor") or ()), ours])}

    def _generated(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Any:
        """`generate` of the rows with virtual tokens in front."""
        asked = kwargs.get("input_ids", inputs)
        _refuse_embeddings(kwargs)
        if self._given or asked is None:
            return self._generate(inputs, **kwargs)
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = self._real(asked, kwargs)
        if not self.two_stacks:
            kwargs |= {name: kwargs[name] + self.length for name in ("max_length", "min_length") if kwargs.get(name) is not None}
        kwargs |= self._penalty_of_real(asked, kwargs)
        with self.given():
            output: Any = self._generate(**kwargs | self._with_virtual(asked, kwargs))

        def real(ids: torch.Tensor) -> torch.Tensor:
            return ids[ids < self.vocabulary].view(len(ids), -1)

        if isinstance(output, torch.Tensor):
            return real(output)
        output.sequences = real(output.sequences)
        return output


def _refuse_embeddings(inputs: Mapping[str, Any]) -> None:
    if inputs.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds: the virtual tokens of the prompt are put in front of tokens only; give input_ids")


def _embeddings_of_decoder(model: Any) -> list[Any]:
    """The module that embeds the tokens of a second stack: as a classifier, it reads the row once more."""
    return [model.get_decoder().get_input_embeddings()] if two_stacks(model) else []


def add(model: PreTrainedModel, length: int, encoder: nn.Module | None = None) -> Prompt:
    """Let the rows of a model begin with `length` virtual tokens, whose embeddings have no values yet."""
    embedding = embedding_of(model)
    prompt = Prompt(length, embedding.embedding_dim, encoder).to(embedding.weight.device)
    model._ftkit_virtual = Virtual(model, prompt)  # type: ignore[assignment]
    return prompt


def of(model: Any) -> Virtual | None:
    """The virtual tokens of a model, if it has any."""
    outer = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: Virtual | None = getattr(outer, "_ftkit_virtual", None)
    return found


@contextmanager
def given(model: Any, batch: Batch) -> Iterator[Batch]:
    """The batch with the virtual tokens of a model, if it has any, in front of its rows; herein they are given, whichever module is called."""
    virtual = of(model)
    if virtual is None:
        yield batch
        return
    with virtual.given():
        yield virtual.extended(batch)


@contextmanager
def absent(model: Any) -> Iterator[None]:
    """Herein rows begin without the virtual tokens of a model, if it has any."""
    virtual = of(model)
    if virtual is None:
        yield
        return
    virtual.model._ftkit_virtual = None  # type: ignore[assignment]
    try:
        with virtual.given():
            yield
    finally:
        virtual.model._ftkit_virtual = virtual  # type: ignore[assignment]


def is_stored(directory: Path) -> bool:
    """Whether it holds a soft prompt in PEFT's format."""
    try:
        settings = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return settings.get("peft_type") == "PROMPT_TUNING"


def write(model: Any, virtual: Virtual, heads: list[str], settings: dict[str, Any], directory: Path) -> None:
    """The prompt and the heads in PEFT's format; `settings` are those of any adapter's config."""
    from peft import PromptTuningConfig
    from safetensors.torch import save_file

    text = model.config.get_text_config()
    config = PromptTuningConfig(
        num_virtual_tokens=virtual.length,
        token_dim=virtual.prompt.weight.shape[1],
        num_layers=getattr(text, "num_hidden_layers", 1),  # PEFT asks for these two, and needs them for other prompts only
        num_attention_heads=getattr(text, "num_attention_heads", 1),
        num_transformer_submodules=1,
        base_model_name_or_path=model.name_or_path,
        inference_mode=True,
        **settings,
    )
    state = {"prompt_embeddings": virtual.prompt()}
    for head in heads:
        state |= {f"base_model.{head}.{name}": tensor for name, tensor in model.get_submodule(head).state_dict().items()}
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, directory / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(str(directory))


def load(directory: Path, artifact: Mapping[str, Any], device: str) -> Any:
    """The base with a prompt in PEFT's format, in eval mode: unlike PEFT's own, for rows padded on either side, and with their positions."""
    from safetensors.torch import load_file

    from ftkit import reload

    model = reload.load_base(directory, artifact, device)
    state = load_file(directory / "adapter_model.safetensors")
    values = state.pop("prompt_embeddings")
    prompt = add(model, len(values))
    places = model.state_dict(keep_vars=True)
    with torch.no_grad():
        prompt.weight.copy_(values)
        for name, tensor in state.items():
            places[name.removeprefix("base_model.")].copy_(tensor)
    return model.eval()
