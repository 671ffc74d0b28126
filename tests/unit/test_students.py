"""Students that begin as parts of a stored model: tensor by tensor those of the whole one."""

import copy

import pytest
import torch
import transformers

from ftkit import students
from ftkit.attention import layers_of
from ftkit.errors import RecipeError
from ftkit.recipe.spec import Model

SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48, "vocab_size": 60, "num_hidden_layers": 5}
CONFIGS = {
    "bert": transformers.BertConfig(**SIZES),
    "roberta": transformers.RobertaConfig(**SIZES),
    "distilbert": transformers.DistilBertConfig(dim=32, n_heads=2, hidden_dim=48, n_layers=5, vocab_size=60),
    "electra": transformers.ElectraConfig(**SIZES),
    "modernbert": transformers.ModernBertConfig(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
    "llama": transformers.LlamaConfig(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16, num_key_value_heads=2),
    "gpt2": transformers.GPT2Config(n_embd=32, n_head=2, n_layer=5, vocab_size=60, n_positions=40),
}
DECODERS = ("llama", "qwen3", "gpt2")
KEPT = [0, 4, 2]
IDS = torch.arange(3, 23)[None]


def built(config, auto="AutoModelForMaskedLM"):
    torch.manual_seed(0)
    auto = "AutoModelForCausalLM" if config.model_type in DECODERS else auto
    model = getattr(transformers, auto).from_config(copy.deepcopy(config)).eval()
    for parameter in model.parameters():  # biases and norms begin alike in all layers
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def part(whole, auto="AutoModelForMaskedLM", **asked):
    """A student, and the names of its tensors there -> here."""
    spec = Model(name="teacher", **asked)
    student = built(students.config_of(whole.config, spec), auto)
    return student, students.take(student, whole, spec)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_tensor_is_one_of_the_whole_model(name):
    whole = built(CONFIGS[name])
    student, names = part(whole, layers=KEPT)
    own, stored = student.state_dict(), whole.state_dict()
    assert set(names.values()) == own.keys()
    assert all(torch.equal(own[here], stored[there]) for there, here in names.items())
    for layer, place in zip(layers_of(student), KEPT, strict=True):
        theirs = dict(layers_of(whole)[place].named_parameters())
        assert all(torch.equal(parameter, theirs[key]) for key, parameter in layer.named_parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_all_layers_are_the_whole_model(name):
    whole = built(CONFIGS[name])
    student, _ = part(whole, layers=[0, 1, 2, 3, 4])
    assert torch.equal(student(input_ids=IDS).logits, whole(input_ids=IDS).logits)


@pytest.mark.parametrize("auto", ["AutoModelForMaskedLM", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering"])
def test_a_bert_of_one_text_is_the_distilbert_made_of_it(auto):
    whole = built(CONFIGS["bert"], auto)
    student, names = part(whole, auto, convert="distilbert")
    assert set(names.values()) == student.state_dict().keys()
    for said, expected in zip(student(input_ids=IDS).to_tuple(), whole(input_ids=IDS).to_tuple(), strict=True):
        torch.testing.assert_close(said, expected, rtol=1e-5, atol=1e-5)


def test_a_distilbert_has_some_of_the_layers_of_a_bert():
    whole = built(CONFIGS["bert"])
    student, _ = part(whole, layers=[1, 3], convert="distilbert")
    for place, layer in enumerate([1, 3]):
        ours, theirs = student.distilbert.transformer.layer[place], whole.bert.encoder.layer[layer]
        assert torch.equal(ours.attention.q_lin.weight, theirs.attention.self.query.weight)
        assert torch.equal(ours.ffn.lin2.bias, theirs.output.dense.bias)


@pytest.mark.parametrize(
    ("config", "asked", "reason"),
    [
        (CONFIGS["bert"], {"layers": [0, 5]}, "there is no layer 5: bert has 5, counted from 0"),
        (CONFIGS["roberta"], {"convert": "distilbert"}, "distilbert is made of a BERT, and this is roberta"),
        (transformers.T5Config(), {"layers": [0]}, "has two stacks of layers"),
        (transformers.AlbertConfig(), {"layers": [0, 1]}, "has one layer for all; give model.config: {num_hidden_layers: 2}"),
    ],
)
def test_what_has_no_such_layers_is_refused(config, asked, reason):
    with pytest.raises(RecipeError, match=reason):
        students.config_of(config, Model(name="teacher", **asked))
