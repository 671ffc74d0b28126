"""No padding: the layers of a model see the rows of a batch laid end to end, real tokens only.

`Flat` hooks a model of transformers.  Where its layers begin, the real tokens are gathered; where they end,
they are scattered back, so that embeddings, poolers and heads stay the model's own and tasks see padded
batches as ever.  In between, `attend` lets each row attend to itself alone, and to the prefix of the layer, if it has one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ftkit import plain_attention
from ftkit.methods.modules import two_stacks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftkit.data.types import Segments

NAME = "ftkit"  # what transformers calls `attend`
# Keywords that reach attention functions and change nothing in what they compute.
HARMLESS = {
    "deterministic",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "token_type_ids",
    "use_cache",
}
# Rows from this length on, and the multiple that they are padded to: cuDNN makes a plan for each shape, which takes 0.13 s, so there should be few.
LONG, PLANNED = 2048, 256
PLANNED_COST = 0.6  # of a pair of positions by cuDNN, beside FlashAttention-2's on an H200
PLANNERS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # the first that can


class Unsupported(Exception):
    """The layers of this model are not made for what is tried with them; the message says why, to follow its name and a colon."""


class Flat:
    """A model whose layers run on the real tokens of a batch while `rows` says where these are; as ever otherwise.

    `fast_dropout`, `fast_attention` and `round_batches` are those of recipes.  Raises Unsupported where attention or
    layers are not built as transformers builds most of them.
    """

    def __init__(self, model: PreTrainedModel, fast_dropout: bool = True, fast_attention: bool = True, round_batches: bool = True) -> None:
        if two_stacks(model):
            raise Unsupported("it has two stacks of layers")
        if not model._can_set_attn_implementation():
            raise Unsupported("its attention is its own")
        base = model.base_model
        stack = _stack(base)
        names = inspect.signature(stack.forward).parameters
        if "input_ids" in names and "position_ids" not in names and getattr(model.config, "max_position_embeddings", None):
            raise Unsupported("its positions cannot be given")
        self._gives_positions = "position_ids" in names
        self._segments: Segments | None = None
        self._at_work = False  # inside `rows`
        self._placed: tuple[Segments, torch.Tensor] | None = None  # rows, and where their tokens are side by side
        self.fast_dropout, self.fast_attention, self.round_batches = fast_dropout, fast_attention, round_batches
        self.model, self._before = model, model.config._attn_implementation
        use(model)
        self._hooks = [
            base.register_forward_pre_hook(self._unmask, with_kwargs=True),
            stack.register_forward_pre_hook(self._gather, with_kwargs=True),
            stack.register_forward_hook(self._scatter),
        ]
        self._biased: list[Any] = [module for module in stack.modules() if hasattr(module, "compute_bias")]  # T5's
        for module in self._biased:
            module.compute_bias = partial(self._bias, module.compute_bias)

    @contextmanager
    def rows(self, segments: Segments | None) -> Iterator[None]:
        """What is called herein gets batches whose real tokens are there; None: batches without padding, or any."""
        self._segments, self._at_work = segments, True
        try:
            yield
        finally:
            self._segments, self._at_work = None, False

    def places(self, segments: Segments) -> torch.Tensor:
        """int64 [N]: where the tokens of rows are, once these are side by side in a whole length; worked out once for all layers."""
        if self._placed is None or self._placed[0] is not segments:
            lengths, count = segments.bounds[segments.rows].long().diff(), len(segments.index) - segments.filler
            padding = _whole(max(segments.lengths[segments.rows])) - lengths
            before = (padding.cumsum(0) - padding).repeat_interleave(lengths, output_size=count)
            self._placed = segments, torch.arange(count, device=before.device) + before
        return self._placed[1]

    @contextmanager
    def off(self) -> Iterator[None]:
        """What is called herein computes attention by the model's own code, unfused; with prefixes, which only `attend` knows, row by row."""
        prefixed = any(hasattr(module, "prefix") for module in self.model.modules())
        self.model.set_attn_implementation(NAME if prefixed else "eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation(NAME)

    def remove(self) -> None:
        """Leave the model as it was."""
        for hook in self._hooks:
            hook.remove()
        for module in self._biased:
            del module.compute_bias
        self.model.set_attn_implementation(self._before)

    def _unmask(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Spare the base the making of masks: it passes on one of four dimensions as it is, and `attend` needs none.

        A batch without padding gets one that `_made_mask` knows.
        """
        if self._segments is not None:
            return args, kwargs | {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self._segments.index.device)}
        tokens = next((kwargs[name] for name in ("inputs_embeds", "input_ids") if kwargs.get(name) is not None), None)
        if not self._at_work or tokens is None or kwargs.get("attention_mask") is not None:
            return None
        return args, kwargs | {"attention_mask": torch.ones((), dtype=torch.bool, device=tokens.device).expand(tokens.shape[:2])}

    def _gather(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if (segments := self._segments) is None:
            return (args, kwargs | {"flat": self}) if self._at_work else None

        def gathered(value: Any) -> Any:
            return segments.gather(value) if isinstance(value, torch.Tensor) and value.shape[:2] == segments.shape else value

        kwargs = {name: gathered(value) for name, value in kwargs.items()} | {"segments": segments, "flat": self}
        if self._gives_positions:
            kwargs["position_ids"] = (segments.index % segments.shape[1]).unsqueeze(0)
        return tuple(gathered(value) for value in args), kwargs

    def _bias(self, compute: Callable[..., torch.Tensor], query_length: int, key_length: int, **kwargs: Any) -> torch.Tensor:
        """[1, heads, L, L] of distances within the longest row, not [1, heads, N, N] of those between all tokens."""
        if self._segments is not None:
            query_length = key_length = max(self._segments.lengths)
        return compute(query_length, key_length, **kwargs)

    def _scatter(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if (segments := self._segments) is None:
            return None

        def scattered(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(scattered, value))
            return segments.scatter(value) if isinstance(value, torch.Tensor) and value.shape[:2] == (1, len(segments.index)) else value

        if isinstance(output, torch.Tensor | tuple):
            return scattered(output)
        return type(output)(**{name: scattered(value) for name, value in output.items()})


def use(model: PreTrainedModel) -> None:
    """Let the layers of a model compute attention by `attend`."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _made_mask)
    model.set_attn_implementation(NAME)


def _made_mask(attention_mask: torch.Tensor | None = None, **other: Any) -> torch.Tensor | None:
    """transformers' own for `sdpa`, which is not shown a mask [B, L] that is one element, repeated: nothing is padding there.

    It would look whether all elements are true, and wait for a GPU; without any mask, decoders look at the positions, and wait too.
    """
    if attention_mask is not None and not any(attention_mask.stride()):
        attention_mask = None
    return sdpa_mask(attention_mask=attention_mask, **other)


def _stack(base: nn.Module) -> nn.Module:
    """The module that runs the layers one after the other: the base itself, or its encoder."""
    for module in base.modules():
        if any(isinstance(child, nn.ModuleList) for child in module.children()):
            return module
    raise Unsupported("it has no list of layers")


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that a model runs one after the other, each once; none where that cannot be told."""
    if two_stacks(model):
        return []
    try:
        lists = [child for child in _stack(model.base_model).children() if isinstance(child, nn.ModuleList)]
    except Unsupported:
        return []
    layers = list(lists[0]) if len(lists) == 1 and len(lists[0]) == model.config.get_text_config().num_hidden_layers else []
    return [] if any(hasattr(layer, "backward_pass") for layer in layers) else layers  # those of Reformer hand on two streams of states


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    sliding_window: int | None = None,
    segments: Segments | None = None,
    flat: Flat | None = None,
    **other: Any,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention as transformers' layers call it; of `segments`, each attends to itself alone.

    query, key, value: [1, heads, N, head_dim]; returns [1, N, heads, head_dim].  With segments comes the `flat` they
    are given by; without, it is transformers' own `sdpa`.  Of a module with a `prefix`, every position also attends to
    that: keys and values [heads of keys, n, head_dim] each.  Of one with a `watch`, that is shown what is compared.
    Raises Unsupported for what would change the result and is not implemented.
    """
    prefix = getattr(module, "prefix", None)
    if watch := getattr(module, "watch", None):
        watch(query, key, value)
    if segments is None or flat is None:
        if attention_mask is not None and attention_mask.shape == (1, 1, 1, 1) and key.shape[2] > 1:  # `Flat` is at work
            raise Unsupported("its layers do not pass on to attention which tokens belong together")
        if prefix is not None:
            check_known(other)
            causal = _looks_back(module, is_causal)
            key, value, attention_mask, position_bias = _behind(prefix(), query, key, value, attention_mask, position_bias, causal)
            is_causal = False
        elif flat is not None and attention_mask is None and position_bias is None and not dropout and not torch.compiler.is_compiling():
            rows, length = query.shape[0::2]
            if _looks_back(module, is_causal) and length == key.shape[2] and _plan_pays(query, [length] * rows, flat):
                return _planned(query, key, value, scaling), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, sliding_window=sliding_window, **other
        )
    check_known(other)
    given = None if prefix is None else prefix()
    return _apart(module, query, key, value, dropout, scaling, is_causal, position_bias, sliding_window, segments, flat, given), None


def _looks_back(module: nn.Module, given: bool | None) -> bool:
    """Whether positions look at none after their own: as the layer says in the call, or of itself."""
    return getattr(module, "is_causal", True) if given is None else given


def check_known(other: dict[str, Any]) -> None:
    """Refuse keywords that attention functions get and `attend` does not implement."""
    if unknown := sorted(name for name, setting in other.items() if setting is not None and name not in HARMLESS):
        raise Unsupported(f"its attention wants {', '.join(unknown)}")


def _behind(
    prefix: tuple[torch.Tensor, torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Keys, values, mask and bias with those of a prefix in front, which all positions look at.

    query, key, value: [B, heads, L, head_dim].  Without a mask, positions look at all, or at none after their own if `causal`.
    """
    before = (states.to(key.dtype).expand(len(key), *states.shape) for states in prefix)
    (key, value), n = (torch.cat(pair, 2) for pair in zip(before, (key, value), strict=True)), prefix[0].shape[1]
    if mask is not None:
        mask = F.pad(mask, (n, 0), value=True if mask.dtype is torch.bool else 0)
    elif causal and query.shape[2] > 1:
        length = query.shape[2]
        mask = torch.ones(length, key.shape[2], dtype=torch.bool, device=key.device).tril(key.shape[2] - length)
    return key, value, mask, None if bias is None else F.pad(bias, (n, 0))


@torch.compiler.disable  # lengths differ in each batch: it would be compiled for each
def _apart(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    position_bias: torch.Tensor | None,
    sliding_window: int | None,
    segments: Segments,
    flat: Flat,
    prefix: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """`attend`, of segments."""
    causal = _looks_back(module, is_causal)
    window = _window(module, sliding_window)
    of_kernels = not dropout and position_bias is None and (prefix is None or window is None)  # they know nothing else
    if of_kernels and causal and window is None and prefix is None and _plan_pays(query, segments.lengths[segments.rows], flat):
        places = flat.places(segments)
        query, key, value = (_beside(state, places, segments) for state in (query, key, value))
        real = _planned(query, key, value, scaling).flatten(0, 1).index_select(0, places)
        return F.pad(real, (0, 0, 0, 0, segments.filler, 0)).unsqueeze(0)
    if of_kernels and query.is_cuda and query.dtype != torch.float32:
        return _varlen(query, key, value, segments, scaling, causal, window, prefix)
    on_cpu, given = query.device.type == "cpu", value.dtype
    arithmetic = torch.get_autocast_dtype("cpu") if on_cpu and torch.is_autocast_enabled("cpu") else given
    half = on_cpu and arithmetic != torch.float32
    plain = prefix is None and not query.is_cuda and (flat.fast_dropout if dropout else half)
    if half and not (plain and flat.fast_attention and arithmetic is torch.bfloat16):
        # in half precision, the backward pass of torch's own takes 2 to 5 times as long
        with torch.autocast("cpu", enabled=False):
            wide = (state.float() for state in (query, key, value))
            return _apart(module, *wide, dropout, scaling, is_causal, position_bias, sliding_window, segments, flat, prefix).to(given)
    query, key, value = (state.squeeze(0).transpose(0, 1).to(arithmetic) for state in (query, key, value))  # [N, heads, head_dim]
    if position_bias is not None:  # it ends where rows do; groups may be wider
        more = max(0, max(length for _, length in segments.groups) - position_bias.shape[-1])
        position_bias = F.pad(position_bias, (0, more, 0, more))
    masks: Iterable[torch.Tensor | None] = _masks(segments, window, causal, query.device)
    padding = segments.padding
    if padding:
        query, key, value = (_Padded.apply(state, *padding) for state in (query, key, value))
    if plain:
        lengths = (length for _, length in segments.groups)
        masks = [_band(length, length, causal, query.device) if causal and mask is None else mask for mask, length in zip(masks, lengths, strict=True)]
        output = plain_attention.attend(query, key, value, segments.groups, masks, position_bias, scaling, dropout)
    else:
        outputs = []
        sizes = [count * length for count, length in segments.groups]
        parts = zip(*(state.split(sizes) for state in (query, key, value)), strict=True)
        for group, mask, part in zip(segments.groups, masks, parts, strict=True):
            q, k, v = (state.unflatten(0, group).transpose(1, 2) for state in part)  # [count, heads, length, head_dim]
            bias = None if position_bias is None else position_bias[:, :, : group[1], : group[1]]  # of distances, so the same anywhere
            looks_back = causal
            if prefix is not None:
                k, v, mask, bias = _behind(prefix, q, k, v, mask, bias, causal)
                looks_back = False
            outputs.append(sdpa_attention_forward(module, q, k, v, mask, dropout, scaling, looks_back, bias)[0].flatten(0, 1))
        output = torch.cat(outputs)
    return (_Real.apply(output, *padding) if padding else output).unsqueeze(0).to(given)


class _Padded(torch.autograd.Function):
    """Tokens at their positions among padded ones, [N, ...] -> [S, ...]; at padding are any tokens, which must have no effect.

    Gathered, forward and back: to scatter takes a CPU four times as long.
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, places: torch.Tensor, sources: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        return states.index_select(0, sources)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None, None


class _Real(torch.autograd.Function):
    """The way back, [S, ...] -> [N, ...]: padding gets no gradient."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, places: torch.Tensor, sources: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(sources, empty)
        return states.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        sources, empty = ctx.saved_tensors
        return grad.index_select(0, sources).index_fill_(0, empty, 0), None, None, None


def _masks(segments: Segments, window: int | None, causal: bool, device: torch.device) -> Iterator[torch.Tensor | None]:
    """What the positions of each group look at."""
    lengths = iter(segments.lengths)
    ends = segments.bounds.diff().split([count for count, _ in segments.groups])  # those lengths, on the device
    for (count, length), own in zip(segments.groups, ends, strict=True):
        padded = min(islice(lengths, count)) < length
        yield _mask(own if padded else None, length, window, causal, device)


def _mask(lengths: torch.Tensor | None, longest: int, window: int | None, causal: bool, device: torch.device) -> torch.Tensor | None:
    """bool, [rows, 1, 1, longest] or as it broadcasts: what positions look at in rows of these lengths, padded; None: all, or all before them.

    lengths: int32 [rows]; None where there is no padding.
    """
    band = None if window is None or longest <= window else _band(longest, window, causal, device)
    if causal or lengths is None:  # what looks back only does not see padding, which comes last
        return band
    real = (torch.arange(longest, device=device) < lengths[:, None])[:, None, None]
    if band is None:
        return real
    # padding sees itself where its window has nothing else: a softmax of nothing is NaN
    return real & band | torch.eye(longest, dtype=torch.bool, device=device)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    scaling: float | None,
    causal: bool,
    window: int | None,
    prefix: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """The same by FlashAttention-2 (arXiv 2307.08691) for rows of any length: [1, heads, N, head_dim] -> [1, N, heads, head_dim].

    What torch.nn.attention.varlen calls: that goes through Python twice more, and takes three times as long to start.
    """
    longest, reach = max(segments.lengths), -1 if window is None else window - 1
    query, key, value = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
    bounds, n = segments.bounds, 0
    if prefix is not None:
        n = prefix[0].shape[1]
        key, value = (_in_front(own, states, segments) for own, states in zip(prefix, (key, value), strict=True))
        bounds = bounds + n * torch.arange(len(bounds), device=bounds.device, dtype=bounds.dtype)
    output = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        segments.bounds,
        bounds,
        longest,
        n + longest,
        0.0,  # dropout
        causal and window is None,
        False,
        scale=scaling,
        window_size_left=reach,
        window_size_right=0 if causal else reach,
    )[0]
    return output.unsqueeze(0)


def _plan_pays(query: torch.Tensor, lengths: list[int], flat: Flat) -> bool:
    """Whether rows that look back only attend sooner by cuDNN, side by side and padded to one of few lengths."""
    longest = max(lengths)
    if longest < LONG or not flat.fast_attention or not _has_planner(query):
        return False
    return PLANNED_COST * len(lengths) * _whole(longest) ** 2 <= sum(length**2 for length in lengths)


def _has_planner(query: torch.Tensor) -> bool:
    """Whether cuDNN has its attention for GPUs of this kind, from Hopper on, and for this type."""
    return query.is_cuda and query.dtype != torch.float32 and torch.version.cuda is not None and torch.cuda.get_device_capability(query.device) >= (9, 0)


def _whole(length: int) -> int:
    """The length that rows of this one are padded to."""
    return -(-length // PLANNED) * PLANNED


def _planned(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """Attention by cuDNN of rows that look back only: [B, heads, L, head_dim] -> [B, L, heads, head_dim].

    What is padded behind them nobody sees.
    """
    length = query.shape[2]
    if more := _whole(length) - length:
        query, key, value = (F.pad(states, (0, 0, 0, more)) for states in (query, key, value))
    with sdpa_kernel(PLANNERS, set_priority=True):
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
    return output[:, :, :length].transpose(1, 2)


def _beside(states: torch.Tensor, places: torch.Tensor, segments: Segments) -> torch.Tensor:
    """[1, heads, N, head_dim] -> [rows, heads, L, head_dim], each row padded to the longest, and that to its whole length; without filler."""
    lengths = segments.lengths[segments.rows]
    rows, length = len(lengths), _whole(max(lengths))
    flat = states.squeeze(0).transpose(0, 1)[segments.filler :]
    return flat.new_zeros(rows * length, *flat.shape[1:]).index_copy(0, places, flat).unflatten(0, (rows, length)).transpose(1, 2)


def _in_front(prefix: torch.Tensor, states: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Of every segment its n prefix states, then its own: [heads, n, head_dim], [N, heads, head_dim] -> [N + n * segments, heads, head_dim]."""
    n, count = prefix.shape[1], len(segments.lengths)
    lengths = segments.bounds.long().diff()
    row = torch.arange(count, device=states.device).repeat_interleave(lengths, output_size=len(states))
    places = torch.arange(len(states), device=states.device) + n * (row + 1)
    starts = segments.bounds[:-1].long() + n * torch.arange(count, device=states.device)
    first = (starts[:, None] + torch.arange(n, device=states.device)).flatten()
    joined = states.new_empty(len(states) + n * count, *states.shape[1:])
    before = prefix.to(states.dtype).transpose(0, 1).repeat(count, 1, 1)
    return joined.index_copy(0, places, states).index_copy(0, first, before)


def _band(length: int, window: int, causal: bool, device: torch.device) -> torch.Tensor:
    """bool [length, length]: whether a position looks at another, which must be nearer than `window`."""
    place = torch.arange(length, device=device)
    distance = place[:, None] - place[None, :]
    return (distance < window) & (distance >= 0 if causal else distance > -window)


def _window(module: nn.Module, given: int | None) -> int | None:
    """A layer's sliding window; Unsupported where it looks at less than whole rows in another way."""
    config: Any = getattr(module, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        if given is None and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            raise Unsupported("its layers have a sliding window of which attention is not told")
        return given
    kind = kinds[module.layer_idx] if hasattr(module, "layer_idx") else "unknown layers"
    if kind == "full_attention":
        return None
    if kind != "sliding_attention" or given is None:
        raise Unsupported(f"it has {kind}")
    return given
