"""Linear layers in 8 bits against the sums that they stand for."""

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from ftkit import int8
from ftkit.compress import alike


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_the_product_of_rounded_numbers(bias):
    torch.manual_seed(0)
    layer, inputs = nn.Linear(16, 8, bias=bias), torch.randn(3, 5, 16)
    scales = layer.weight.abs().amax(1, keepdim=True) / 127
    rounded = (layer.weight / scales).round() * scales
    step = (inputs.max() - inputs.min()) / (255 if torch.cpu._is_vnni_supported() else 127)  # torch rounds all inputs of a call to steps of one width
    found = int8.Int8Linear(layer)(inputs)
    assert found.shape == (3, 5, 8)
    error = step / 2 * rounded.abs().sum(1)
    assert ((found - nn.functional.linear(inputs, rounded, layer.bias)).abs() <= error * 1.05).all()
    assert (found - layer(inputs)).abs().max() > 0


def test_a_transposed_layer_is_the_same():
    torch.manual_seed(0)
    layer, transposed = nn.Linear(16, 8), Conv1D(8, 16)
    transposed.weight.data, transposed.bias.data = layer.weight.data.T.contiguous(), layer.bias.data
    inputs = torch.randn(3, 16)
    assert torch.equal(int8.Int8Linear(layer)(inputs), int8.Int8Linear(transposed)(inputs))


def test_a_layer_of_zeros():
    layer = nn.Linear(4, 2)
    layer.weight.data.zero_()
    torch.testing.assert_close(int8.Int8Linear(layer)(torch.randn(3, 4)), layer.bias.expand(3, 2))


def test_the_head_stays_in_float():
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64)
    model = transformers.BertForSequenceClassification(config).eval()
    before = sum(parameter.numel() for parameter in model.parameters())
    int8.quantise(model)
    assert isinstance(model.bert.encoder.layer[1].output.dense, int8.Int8Linear)
    assert isinstance(model.classifier, nn.Linear)
    weights, outputs = 2 * (4 * 32 * 32 + 2 * 32 * 64), 2 * (4 * 32 + 64 + 32)
    assert int8.num_bytes(model) == (before - weights - outputs) * 4 + weights + outputs * 8
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 2)


def test_the_head_of_a_model_without_a_base_stays_in_float():
    config = transformers.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=64, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids = torch.tensor([[5, 6, 1]])
    before = model(input_ids=ids, decoder_input_ids=ids).logits
    int8.quantise(model)
    assert isinstance(model.lm_head, nn.Linear)
    assert isinstance(model.decoder.block[0].layer[2].DenseReluDense.wo, int8.Int8Linear)
    found = model(input_ids=ids, decoder_input_ids=ids).logits
    assert 0 < (found - before).norm() < 0.1 * before.norm()


def test_how_alike_answers_are():
    one = {"row 0: logits": torch.tensor([[3.0, 0.0]]), "row 1: logits": torch.tensor([[0.0, 4.0]])}
    other = {"row 0: logits": torch.tensor([[3.0, 0.0]]), "row 1: logits": torch.tensor([[4.0, 4.0]])}
    assert alike(one, one) == {"error": 0, "agreement": 1}
    assert alike(one, other) == {"error": 0.8, "agreement": 0.5}
    states = {"row 0: last_hidden_state": torch.ones(1, 2, 3)}
    assert alike(states, states) == {"error": 0}
