"""Bases in few bits: what a recipe may say, what a weight takes, and biases that learn beside weights that do not."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ftkit import plugins
from ftkit.few_bits import add_biases_apart, share_in_few_bits, steady_quantised
from ftkit.methods.head import Head
from ftkit.methods.ia3 import IA3
from ftkit.methods.qlora import QLoRA
from ftkit.methods.quantised import Quantisable

bnb = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("kind", ["adapter", "bitfit", "head", "ia3", "vera"])
def test_the_base_stays_as_it_is_stored_unless_bits_are_asked_for(kind):
    cls = plugins.find("method", kind)
    plain, four, eight = cls(), cls(bits=4), cls(bits=8)
    assert isinstance(plain, Quantisable)
    assert plain.load_kwargs(["score"], "fp32") == {}
    assert four.load_kwargs(["score"], "fp32") == QLoRA().load_kwargs(["score"], "fp32")
    assert eight.load_kwargs(["score"], "fp32") == {"quantization_config": {"load_in_8bit": True, "llm_int8_skip_modules": ["score", "pooler"]}}
    assert [(method.quant_type, method.double_quant) for method in (plain, four, eight)] == [(None, None), ("nf4", True), (None, None)]
    assert "linear" in four.needs(new_head=True)


def test_what_is_asked_for_is_what_bitsandbytes_is_told():
    found = Head(bits=4, quant_type="fp4", double_quant=False).load_kwargs(["classifier"], "bf16")["quantization_config"]
    assert (found["bnb_4bit_quant_type"], found["bnb_4bit_use_double_quant"], found["bnb_4bit_compute_dtype"]) == ("fp4", False, "bfloat16")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IA3(quant_type="nf4"), "quant_type has no effect without bits: 4"),
        (lambda: IA3(bits=8, double_quant=False), "double_quant has no effect without bits: 4"),
        (lambda: QLoRA(bits=8, quant_type="fp4"), "quant_type has no effect without bits: 4"),
        (lambda: QLoRA(bits=None), "bits"),
        (lambda: IA3(bits=3), "bits"),
    ],
)
def test_settings_without_effect_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def quantised(linear, bits, compute_dtype=torch.float32, double_quant=True):
    """A layer of bitsandbytes with the values of a linear module."""
    kwargs = {"compute_dtype": compute_dtype, "compress_statistics": double_quant, "quant_type": "nf4"}
    layer = bnb.nn.Linear4bit(linear.in_features, linear.out_features, **kwargs) if bits == 4 else bnb.nn.Linear8bitLt(64, 48, has_fp16_weights=False)
    layer.weight = (
        bnb.nn.Params4bit(linear.weight.detach().clone(), requires_grad=False, compress_statistics=double_quant, quant_type="nf4", module=layer)
        if bits == 4
        else bnb.nn.Int8Params(linear.weight.detach().clone(), requires_grad=False)
    )
    layer.bias = nn.Parameter(linear.bias.detach().clone())
    return layer.to("cpu")  # here it is quantised


@pytest.mark.parametrize(("double_quant", "bits"), [(True, 4 + 8 / 64 + 32 / (64 * 256)), (False, 4 + 32 / 64)], ids=["double", "single"])
def test_nf4_takes_4_127_bits_a_weight_and_4_5_without_double_quantisation(double_quant, bits):
    """arXiv 2305.14314, 3: a constant for 64 weights in 8 bits, one for 256 of those in 32, and their offset once."""
    torch.manual_seed(0)
    weight = quantised(nn.Linear(4096, 4096), 4, double_quant=double_quant).weight
    state, count = weight.quant_state, 4096 * 4096
    tensors = [weight.data, state.absmax, *([state.state2.absmax, state.offset] if double_quant else [])]
    found = 8 * sum(tensor.nbytes for tensor in tensors) / count
    assert found == bits + (32 / count if double_quant else 0)
    assert round(found, 3) == (4.127 if double_quant else 4.5)


@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_biases_learn_in_float32_beside_weights_in_few_bits(bits, compute_dtype):
    """By themselves, layers that compute in bfloat16 round their biases and give them gradients that no optimizer takes."""
    torch.manual_seed(0)
    layer = quantised(nn.Linear(64, 48), bits, compute_dtype)
    states = torch.randn(5, 7, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=compute_dtype is torch.bfloat16):
        without = layer(states.to(compute_dtype)).float() - layer.bias.detach().float()
    layer.bias = nn.Parameter(torch.randn(48))
    before = layer.bias.detach().clone()
    steady_quantised(layer)
    add_biases_apart(layer)
    (layer(states.to(compute_dtype)).float() ** 2).sum().backward()
    assert torch.equal(layer.bias, before)
    assert layer.bias.grad.dtype == torch.float32
    expected = (2 * (without + before)).sum((0, 1))
    assert (layer.bias.grad - expected).abs().max() <= (1e-5 if compute_dtype is torch.float32 and bits == 4 else 3e-2) * expected.abs().max()


@pytest.mark.parametrize("apart", [False, True])
def test_a_layer_that_fails_has_its_bias_again(apart):
    """Recomputed layers end early, by an exception, once they have given what is wanted."""
    layer = quantised(nn.Linear(64, 48), 4, torch.bfloat16)
    before = layer.bias.detach().clone()
    steady_quantised(layer)
    if apart:
        add_biases_apart(layer)
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 65))
    assert layer.bias.dtype == torch.float32
    assert torch.equal(layer.bias, before)
    gradients = []
    for recompute in (False, True):
        layer.bias.grad = None
        states = torch.ones(3, 64, requires_grad=True)
        found = checkpoint(layer, states, use_reentrant=False) if recompute else layer(states)
        found.float().square().sum().backward()
        gradients.append(states.grad)
    assert torch.equal(*gradients)
    assert torch.equal(layer.bias, before)


def test_the_share_of_few_bits_counts_values_not_bytes():
    model = nn.Sequential(quantised(nn.Linear(64, 48), 4), nn.Linear(48, 10))
    assert share_in_few_bits(model) == 64 * 48 / (64 * 48 + 48 + 48 * 10 + 10)
