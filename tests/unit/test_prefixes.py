"""Prefixes are keys and values in front of a row's own, wherever the row lies in a batch."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from pydantic import ValidationError

from ftkit import attention, prefixes, session
from ftkit.data.batches import segments
from ftkit.errors import RecipeError
from ftkit.methods.prefix import PrefixTuning
from ftkit.model import Base, head_of
from ftkit.recipe import read
from ftkit.sources import Source
from ftkit.tasks.causal_lm import CausalLM

N = 3
IDS = torch.tensor([[5, 9, 11, 7, 30, 2]])


@pytest.fixture
def llama(checkpoint):
    """A language model, and the same with a prefix of N, drawn wide so that it matters."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama")).eval()
    prefixed = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama")).eval()
    prefixes.add(prefixed, N)
    torch.manual_seed(0)
    for module in prefixed.modules():
        if isinstance(module, prefixes.Prefix):
            torch.nn.init.normal_(module.weight)
    return plain, prefixed


def test_it_is_pefts_prefix_without_the_shift_of_positions(llama):
    """PEFT gives prefixes as a cache of earlier tokens, which moves positions on: with those of the tokens, both are the same."""
    plain, prefixed = llama
    cache = transformers.DynamicCache()
    for index, layer in enumerate(prefixed.model.layers):
        keys, values = layer.self_attn.prefix()
        cache.update(keys[None], values[None], index)
    positions = torch.arange(IDS.shape[1])[None]
    mask = torch.ones(1, N + IDS.shape[1], dtype=torch.int64)
    expected = plain(input_ids=IDS, past_key_values=cache, position_ids=positions, attention_mask=mask).logits
    torch.testing.assert_close(prefixed(input_ids=IDS).logits, expected)
    assert not torch.allclose(expected, plain(input_ids=IDS).logits, atol=1e-2)


def test_with_a_cache_it_generates_what_it_does_without(llama):
    _, prefixed = llama
    generated = prefixed.generate(input_ids=IDS, max_new_tokens=6, do_sample=False, pad_token_id=0)
    ids = IDS
    for token in generated[0, IDS.shape[1] :]:
        assert prefixed(input_ids=ids).logits[0, -1].argmax() == token
        ids = torch.cat((ids, token.view(1, 1)), 1)


def test_it_may_be_absent(llama):
    plain, prefixed = llama
    expected, names = prefixed(input_ids=IDS).logits, [name for name, _ in prefixed.named_parameters()]
    with prefixes.absent(prefixed):
        torch.testing.assert_close(prefixed(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert torch.equal(prefixed(input_ids=IDS).logits, expected)
    assert [name for name, _ in prefixed.named_parameters()] == names


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(llama, side):
    _, prefixed = llama
    other = torch.tensor([[4, 8, 15]])
    filler = torch.zeros(1, 3, dtype=torch.int64)
    padded = torch.cat((filler, other) if side == "left" else (other, filler), 1)
    mask = torch.cat((torch.ones_like(IDS), (padded != 0).long()))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = prefixed(input_ids=torch.cat((IDS, padded)), attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(together[0], prefixed(input_ids=IDS).logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together[1][mask[1].bool()], prefixed(input_ids=other).logits[0], rtol=1e-4, atol=1e-5)


class Layer(torch.nn.Module):
    """An attention module with a prefix."""

    def __init__(self, causal: bool, heads: int = 2, width: int = 8) -> None:
        super().__init__()
        self.is_causal = causal
        torch.manual_seed(1)
        self.prefix = prefixes.Prefix(torch.randn(heads, N, width), torch.randn(heads, N, width))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_of_segments_it_is_the_formula_for_each_row(causal, window, biased):
    lengths, layer = [5, 4, 2], Layer(causal)
    if window:
        layer.config = transformers.MistralConfig(sliding_window=window)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).numpy().astype("int64")
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 4, sum(lengths), 8)
    key, value = key[:, :2], value[:, :2]
    bias = torch.randn(1, 4, max(lengths), max(lengths)) if biased else None
    layer.num_key_value_groups = 2
    output, _ = attention.attend(
        layer,
        query,
        key,
        value,
        None,
        position_bias=bias,
        sliding_window=window,
        segments=segments(mask),
        flat=SimpleNamespace(fast_dropout=True, fast_attention=True),
    )
    start = 0
    for length in lengths:
        own = slice(start, start + length)
        keys = torch.cat((layer.prefix()[0], key[0, :, own]), 1).repeat_interleave(2, 0)
        values = torch.cat((layer.prefix()[1], value[0, :, own]), 1).repeat_interleave(2, 0)
        scores = query[0, :, own] @ keys.transpose(1, 2) / 8**0.5
        if bias is not None:
            scores[..., N:] += bias[0, :, :length, :length]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        seen = (distance >= 0) if causal else torch.ones(length, length, dtype=torch.bool)
        if window:
            seen &= distance.abs() < window
        scores[..., N:] = scores[..., N:].masked_fill(~seen, float("-inf"))
        torch.testing.assert_close(output[0, own].transpose(0, 1), scores.softmax(-1) @ values)
        start += length


def test_for_kernels_of_any_length_each_segment_begins_with_the_prefix():
    lengths = [2, 3]
    mask = (torch.arange(3) < torch.tensor(lengths)[:, None]).numpy().astype("int64")
    prefix, states = torch.arange(2.0).view(1, 2, 1) - 10, torch.arange(5.0).view(5, 1, 1)
    joined = attention._in_front(prefix, states, segments(mask))
    assert joined.flatten().tolist() == [-10, -9, 0, 1, -10, -9, 2, 3, 4]


def test_keywords_that_attention_lacks_are_refused(llama):
    layer = llama[1].model.layers[0].self_attn
    states = torch.randn(1, 2, 4, 16)
    with pytest.raises(attention.Unsupported, match="its attention wants softcap"):
        attention.attend(layer, states, states, states, None, softcap=30.0)


def base_of(model) -> Base:
    return Base(model, None, Source("somewhere"), CausalLM(), head_of(model))


class TestMethod:
    def test_a_text_gives_its_keys_and_values(self, checkpoint):
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama")).eval()
        base = base_of(model)
        base.tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint("llama"))
        ids = base.tokenizer("boats near the", add_special_tokens=False)["input_ids"]
        cache = model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
        PrefixTuning(init="text", init_text="boats near the", num_virtual_tokens=len(ids)).apply(base)
        for layer, module in zip(cache.layers, model.model.layers, strict=True):
            keys, values = module.self_attn.prefix()
            torch.testing.assert_close(keys, layer.keys[0])
            torch.testing.assert_close(values, layer.values[0])

    def test_a_projection_learns_all_and_is_folded(self, checkpoint):
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama")).eval()
        PrefixTuning(num_virtual_tokens=N, prefix_projection=True, encoder_hidden_size=5).apply(base_of(model))
        before = model(input_ids=IDS).logits
        before.sum().backward()
        learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert all(parameter.grad is not None for parameter in learning.values())
        width, both = 32, 2 * 16  # of states; of the keys and values of the one head that a layer has
        assert sum(map(torch.Tensor.numel, learning.values())) == N * width + (width + 1) * 5 + 2 * (5 + 1) * both
        prefixes.fold(model)
        assert torch.equal(model(input_ids=IDS).logits, before)
        assert [parameter.shape for parameter in model.parameters() if parameter.requires_grad] == [(2, 1, N, 16)] * 2

    def test_recomputed_layers_have_the_same_gradients(self, checkpoint):
        found = []
        for recomputed in (False, True):
            model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama")).train()
            torch.manual_seed(0)
            PrefixTuning(num_virtual_tokens=N, prefix_projection=True).apply(base_of(model))
            if recomputed:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                model.disable_input_require_grads()
            model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
            found.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))

    def test_attention_of_its_own_is_refused(self):
        model = transformers.BloomForCausalLM(transformers.BloomConfig(vocab_size=20, hidden_size=16, n_layer=1, n_head=2))
        with pytest.raises(RecipeError, match="method prefix: BloomForCausalLM: its attention is its own; use method: prompt"):
            PrefixTuning().apply(base_of(model))

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"init": "text"}, "init: text needs init_text"),
            ({"init_text": "boats"}, "init_text has no effect with init: random"),
            ({"init": "text", "init_text": "boats", "prefix_projection": True}, "choose one"),
            ({"encoder_hidden_size": 8}, "encoder_hidden_size has no effect without prefix_projection"),
        ],
    )
    def test_options_without_effect_are_refused(self, settings, message):
        with pytest.raises(ValidationError, match=message):
            PrefixTuning(**settings)

    def test_a_network_that_all_layers_share_is_refused_where_layers_are_gathered_one_by_one(self, tmp_path):
        path = tmp_path / "recipe.yaml"
        path.write_text(
            "{model: gpt2, task: causal-lm, data: {train: t.jsonl}, method: {kind: prefix, prefix_projection: true}, train: {parallel: fsdp}, output: o}"
        )
        with pytest.raises(RecipeError, match=r"method\.prefix_projection: all layers share its network, and train\.parallel: fsdp"):
            session.check_attention(read(path).recipe)
        session.check_attention(read(path, ["method.prefix_projection=false"]).recipe)


def test_looking_at_keys_changes_no_answer(llama):
    plain, _ = llama
    before = plain(input_ids=IDS).logits
    assert [tuple(each.keys.shape) for each in prefixes.seen(plain, IDS[0].tolist())] == [(1, 1, 6, 16)] * 2
    assert torch.equal(plain(input_ids=IDS).logits, before)
    assert plain.config._attn_implementation == "sdpa"
