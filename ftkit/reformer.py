"""What runs need of Reformer (arXiv 2001.04451) and its code in transformers 5.23 does not do.

In training mode that code takes rows of exactly as many tokens as there are axial positions, draws new seeds for torch's
generators in every layer, so that no run can be repeated or resumed, and computes gradients by inverting its layers, which
fails where one of them is frozen and gives none at all above frozen embeddings.  Here rows are padded to whole chunks, as
they are in eval mode, and layers are like those of other models, but for their activations, which are computed again in
the backward pass.  In eval mode the model's own code answers, and leaves the generators as they were.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ftkit.architectures import CAUSAL, CLASSIFIER, MASKED
from ftkit.errors import RecipeError

if TYPE_CHECKING:
    from ftkit.tasks import Task

KIND = "reformer"
DECODERS = {  # whether positions may see later ones, by the head, and why not otherwise
    CAUSAL: (True, "positions would see the very tokens that they are to predict"),
    MASKED: (False, "positions would not see what follows a mask"),
    CLASSIFIER: (False, "a row's answer is read at its first token, which would see no other"),
}


def check(config: Any, task: Task) -> None:
    """Refuse settings that the model's own code stops at, and those that a task could not learn with."""
    if config.model_type != KIND:
        return
    if flaw := _flaw(config):
        raise RecipeError(f"model.config.{flaw}")
    is_decoder, reason = DECODERS.get(task.auto_class, (config.is_decoder, ""))
    if config.is_decoder != is_decoder:
        raise RecipeError(f"task {task.kind}: in a {type(config).__name__} as it is, {reason}; set model.config: {{is_decoder: {str(is_decoder).lower()}}}")


def _flaw(config: Any) -> str | None:
    kinds, buckets = list(config.attn_layers), config.num_buckets
    if not kinds or not {"local", "lsh"}.issuperset(kinds):
        return f"attn_layers: {kinds}: each layer is local or lsh"
    if config.num_hidden_layers != len(kinds):
        return f"num_hidden_layers: {config.num_hidden_layers}, but attn_layers has {len(kinds)} entries, one a layer"
    if config.axial_pos_embds and sum(config.axial_pos_embds_dim) != config.hidden_size:
        return f"axial_pos_embds_dim: {list(config.axial_pos_embds_dim)} must add up to hidden_size: {config.hidden_size}"
    if buckets and any(number % 2 for number in ([buckets] if isinstance(buckets, int) else buckets)):
        return f"num_buckets: {buckets}: hashing takes even numbers"
    after = [f"{kind}_num_chunks_after" for kind in dict.fromkeys(kinds) if getattr(config, f"{kind}_num_chunks_after")]
    return f"{after[0]}: a decoder sees no later chunks; set it to 0" if after and config.is_decoder else None


def max_positions(config: Any) -> int:
    """Tokens in a row at most: rows are padded to whole chunks, and padding takes positions, too."""
    positions = config.max_position_embeddings
    if config.axial_pos_embds:
        positions = min(positions, math.prod(config.axial_pos_shape))
    chunk = math.lcm(*_chunk_lengths(config))
    return positions // chunk * chunk or min(positions, *_chunk_lengths(config))


def undecided(config: Any, longest: int, seed: int) -> dict[str, Any]:
    """Settings that a config leaves to the first row, and to chance in each forward pass: their values for rows of up to `longest` tokens."""
    if config.model_type != KIND or "lsh" not in config.attn_layers:
        return {}
    found = {"hash_seed": seed} if config.hash_seed is None else {}
    chunk = math.lcm(*_chunk_lengths(config))
    padded = -(-longest // chunk) * chunk
    if config.num_buckets is None and padded > config.lsh_attn_chunk_length:
        from transformers.models.reformer.modeling_reformer import LSHSelfAttention

        with torch.device("meta"):
            attention = LSHSelfAttention(copy.copy(config))
        attention._set_num_buckets(padded)
        found["num_buckets"] = attention.num_buckets
    return found


def _chunk_lengths(config: Any) -> list[int]:
    return [getattr(config, f"{kind}_attn_chunk_length") for kind in set(config.attn_layers)]


def mend(model: Any) -> None:
    """Let a Reformer, if it is one, train and write text as other models do."""
    if model.config.model_type != KIND:
        return
    from transformers.models.reformer import modeling_reformer as own

    ours: dict[type, Callable[..., Any]] = {
        own.ReformerModel: _padded,
        own.AxialPositionEmbeddings: _positions,
        own.ReformerEncoder: _encoded,
        own.LSHSelfAttention: _hashed,
    }
    for module in model.modules():
        if type(module) in ours:
            module.forward = partial(ours[type(module)], module, module.forward)
        elif isinstance(module, own.ReformerOnlyLMHead):
            _without_gradient(module)
        elif isinstance(module, own.ReformerModelWithLMHead):
            _write_row_by_row(module)


def _padded(model: nn.Module, compute: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The base model: it pads rows, and cuts their states back, unless it is itself in training mode."""
    was_training, model.training = model.training, False
    try:
        return compute(*args, **kwargs)
    finally:
        model.training = was_training


def _positions(module: Any, compute: Callable[..., torch.Tensor], position_ids: torch.Tensor) -> torch.Tensor:
    """[B, L, H] of the positions 0 to L - 1, in training, too: with the dropout that rows of all positions get."""
    if not module.training:
        return compute(position_ids)
    count, length = position_ids.shape
    width = module.axial_pos_shape[1]
    height = -(-length // width)
    encodings = torch.cat([weight[:height].expand(height, width, -1) for weight in module.weights], -1)
    dropped = F.dropout2d(encodings.transpose(0, 1).expand(count, -1, -1, -1), module.dropout)  # [B, width, height, H]
    return dropped.transpose(1, 2).flatten(1, 2)[:, :length]


def _encoded(
    encoder: Any,
    compute: Callable[..., Any],
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    num_hashes: int | None = None,
    **options: Any,
) -> Any:
    """[B, L, H] -> [B, L, 2 H], the two streams of states; by its own code in eval mode, unless gradients are wanted."""
    if not (encoder.training or torch.is_grad_enabled()):
        return compute(hidden_states, attention_mask, num_hashes, **options)
    from transformers.models.reformer.modeling_reformer import ReformerEncoderOutput

    attended = states = hidden_states
    for layer in encoder.layers:
        attended, states = checkpoint(_through, layer, attended, states, attention_mask, num_hashes, use_reentrant=False)
    both = encoder.layer_norm(torch.cat((attended, states), -1))
    return ReformerEncoderOutput(F.dropout(both, encoder.dropout, encoder.training), [], [], None)


def _through(
    layer: Any, attended: torch.Tensor, states: torch.Tensor, attention_mask: torch.Tensor | None, num_hashes: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    attended = attended + layer.attention(states, attention_mask, num_hashes).hidden_states
    return attended, states + layer.feed_forward(attended)


def _hashed(attention: Any, compute: Callable[..., Any], hidden_states: torch.Tensor, **options: Any) -> Any:
    """LSH attention, by other rotations in each training step; in eval mode by those of the config's `hash_seed`, which torch is seeded with."""
    attention.hash_seed = None if attention.training else attention.config.hash_seed
    if attention.training:
        return compute(hidden_states, **options)
    with torch.random.fork_rng([hidden_states.device] if hidden_states.is_cuda else []):
        return compute(hidden_states, **options)


def _without_gradient(head: Any) -> None:
    """The bias of a language model's head, which nothing adds, is no parameter: processes would wait for its gradient."""
    bias = torch.zeros(head.decoder.out_features) if head.bias is None else head.bias.data
    del head.bias
    head.register_buffer("bias", bias)


def _write_row_by_row(model: Any) -> None:
    model.generate = partial(_generated, model.generate)
    model.prepare_inputs_for_generation = _next_inputs


def _generated(compute: Callable[..., torch.Tensor], input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
    """Rows [B, L], padded on the left, and what follows each: one by one, since the model counts padding as text."""
    rows = [compute(input_ids=ids[mask.bool()][None], use_cache=False, **options)[0] for ids, mask in zip(input_ids, attention_mask, strict=True)]
    written = [row[mask.sum() :] for row, mask in zip(rows, attention_mask, strict=True)]
    padded = nn.utils.rnn.pad_sequence(written, batch_first=True, padding_value=options["generation_config"].pad_token_id)
    return torch.cat((input_ids, padded), 1)


def _next_inputs(input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
    """What the model reads to write the next token: all so far, since its cache takes weights as they are stored, without what adapters add."""
    return {"input_ids": input_ids, "use_cache": False, "logits_to_keep": 1}
