"""Configs from recipes: overrides of known settings only, and what a config derives follows them."""

import copy

import pytest
import torch
import transformers

from ftkit import architectures, model
from ftkit.architectures import CAUSAL, FINDER, REWRITER
from ftkit.errors import MissingDependency, RecipeError
from ftkit.methods.full import Full
from ftkit.methods.head import Head
from ftkit.methods.lora import LoRA
from ftkit.miniature import miniature
from ftkit.recipe.spec import Model, Train
from ftkit.session import check_checkpointing
from ftkit.sources import Source, locate
from ftkit.tasks.causal_lm import CausalLM
from ftkit.tasks.question_answering import QuestionAnswering
from ftkit.tasks.text_classification import TextClassification


def from_nothing(**config) -> Model:
    return Model(init="random", config={"model_type": "llama", **config})


def test_derived_settings_follow_those_they_derive_from():
    config = model.load_config(from_nothing(hidden_size=48, num_attention_heads=4), None)
    assert config.num_key_value_heads == 4
    assert config.head_dim == 12


def test_derived_settings_can_be_set():
    assert model.load_config(from_nothing(hidden_size=48, num_attention_heads=4, num_key_value_heads=2), None).num_key_value_heads == 2


def test_a_trained_tokenizer_tells_which_token_separates(tokenizers):
    """BigBird, asked for answers, hides what comes before it; others know of none."""
    tokenizer = tokenizers["wordpiece"]
    assert model.load_config(Model(init="random", config={"model_type": "big_bird"}), None, tokenizer).sep_token_id == tokenizer.sep_token_id
    assert not hasattr(model.load_config(from_nothing(), None, tokenizers["bpe"]), "sep_token_id")


def test_settings_go_by_the_names_that_all_models_share():
    assert model.load_config(Model(init="random", config={"model_type": "gpt2", "hidden_size": 48}), None).n_embd == 48


@pytest.mark.parametrize("config", [{"hiden_size": 48}, {"hidden_size": "large"}, {"hidden_size": 50, "num_attention_heads": 4}])
def test_impossible_settings_are_refused(config):
    with pytest.raises(RecipeError, match=r"hidden.size"):
        model.load_config(from_nothing(**config), None)


def test_an_encoder_that_sees_what_it_is_to_predict_is_refused():
    bert = {"model_type": "bert", "hidden_size": 48, "num_attention_heads": 4}
    with pytest.raises(RecipeError, match="is_decoder: true"):
        model.skeleton(model.load_config(Model(init="random", config=bert), None), CausalLM())
    model.skeleton(model.load_config(Model(init="random", config=bert | {"is_decoder": True}), None), CausalLM())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bart"])
def test_decoders_are_not_refused(model_type):
    model.skeleton(model.load_config(Model(init="random", config={"model_type": model_type}), None), CausalLM())


CPU = torch.device("cpu")


def load(spec: Model, task, method, tokenizer) -> model.Base:
    source = locate(spec)
    return model.load(spec, source, model.load_config(spec, source), tokenizer, task, method, torch.float32, 0, CPU)


@pytest.mark.parametrize("stored", [None, 5])
def test_a_row_is_classified_alike_alone_and_beside_longer_ones(tmp_path, checkpoint, stored):
    """Decoders read their answer at the last token that is no padding: model and tokenizer must mean the same token."""
    config = transformers.AutoConfig.from_pretrained(checkpoint("gpt2"))
    config.pad_token_id = stored
    transformers.AutoModelForCausalLM.from_pretrained(checkpoint("gpt2"), config=config).save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint("gpt2"))
    base = load(Model(name=str(tmp_path)), TextClassification(labels=("a", "b")), LoRA(), tokenizer)
    both = tokenizer(["two old boats", "many quiet gulls near the old nets and ropes"], padding=True, return_tensors="pt")
    alone = tokenizer(["two old boats"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(base.model.eval()(**both).logits[:1], base.model(**alone).logits)
    assert base.load_kwargs["pad_token_id"] == tokenizer.pad_token_id  # plain PEFT users get the same


def test_positions_that_count_from_another_padding_token_are_refused(tokenizers):
    spec = Model(init="random", config={"model_type": "roberta", "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "pad_token_id": 5})
    config = model.load_config(spec, None)
    with pytest.raises(RecipeError, match="do not belong together"):
        model.plan(spec, None, config, tokenizers["bpe"], TextClassification(labels=("a", "b")), Full())


def test_the_embedding_of_a_token_that_also_pads_learns(tmp_path, checkpoint):
    tokenizer = copy.deepcopy(transformers.AutoTokenizer.from_pretrained(checkpoint("llama")))
    tokenizer.pad_token = tokenizer.eos_token
    base = load(Model(name=checkpoint("llama")), CausalLM(), Full(), tokenizer)
    ids = torch.tensor([[tokenizer.eos_token_id, 9, 10]])
    base.model(input_ids=ids, labels=ids).loss.backward()
    assert base.model.get_input_embeddings().weight.grad[tokenizer.eos_token_id].abs().max() > 0


def test_sampling_settings_that_contradict_each_other_can_be_saved(tmp_path, checkpoint):
    stored = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    stored.save_pretrained(tmp_path / "stored")
    (tmp_path / "stored" / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.5, "do_sample": false, "eos_token_id": 3}')
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint("llama"))
    base = load(Model(name=str(tmp_path / "stored")), CausalLM(), Full(), tokenizer)
    base.model.save_pretrained(tmp_path / "saved")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == 3


@pytest.mark.parametrize(("attention", "error"), [("sdpa", RecipeError), ("flash_attention_2", (RecipeError, MissingDependency))])
def test_attention_that_an_architecture_lacks_is_refused_before_weights_are_read(attention, error):
    spec = Model(init="random", config={"model_type": "deberta-v2"}, attention=attention)
    with pytest.raises(error, match=f"model.attention: {attention}"):
        model.skeleton(model.load_config(spec, None), TextClassification(labels=("a", "b")), attention)


def test_checkpointing_that_would_recompute_nothing_is_refused(checkpoint, tokenizers):
    base = load(Model(name=checkpoint("bert")), TextClassification(labels=("a", "b")), Head(), tokenizers["wordpiece"])
    Head().apply(base)
    with pytest.raises(RecipeError, match="no effect"):
        check_checkpointing(base, Train())


def test_checkpointing_that_an_architecture_lacks_is_refused():
    config = transformers.AlbertConfig(hidden_size=32, embedding_size=16, num_attention_heads=2, intermediate_size=32)
    base = model.Base(model.skeleton(config, TextClassification(labels=("a", "b"))), None, None, TextClassification(labels=("a", "b")), ["classifier"])
    with pytest.raises(RecipeError, match="AlbertForSequenceClassification does not support it"):
        check_checkpointing(base, Train())


def test_decoders_are_told_from_encoders_by_what_their_attention_does():
    """GPT-NeoX (Pythia) hides later tokens, though its config says is_decoder: false; XLNet, which says nothing, does not."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    assert not transformers.GPTNeoXConfig().is_decoder
    model.skeleton(transformers.GPTNeoXConfig(**sizes), CausalLM())
    for config, causal in (
        (transformers.XLNetConfig(d_model=32, n_layer=1, n_head=2, d_inner=64, vocab_size=50), False),
        (transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=50), True),
        (transformers.BertConfig(**sizes, is_decoder=True), True),
    ):
        torch.manual_seed(0)
        built = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in built.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        if causal:
            model.check_causal(built, CausalLM())
        else:
            with pytest.raises(RecipeError, match="XLNetLMHeadModel looks at the tokens after each one"):
                model.check_causal(built, CausalLM())


@pytest.mark.parametrize("name", [name for name, has in architectures.TABLE.items() if FINDER in has and has & {CAUSAL, REWRITER} and name != "reformer"])
def test_a_head_that_finds_answers_stands_on_the_layers_of_a_language_model(name, tokenizers, tmp_path):
    """Llama's calls them otherwise than its language model does."""
    tokenizer = tokenizers["ending"]
    config = miniature(model.load_config(Model(init="random", config={"model_type": name}), None, tokenizer), 1, tokenizer)
    writer = transformers.AutoModelForSeq2SeqLM if REWRITER in architectures.TABLE[name] else transformers.AutoModelForCausalLM
    stored = writer.from_config(config)
    stored.save_pretrained(tmp_path)
    arguments = Model(name=str(tmp_path)), Source(str(tmp_path)), config, tokenizer, QuestionAnswering(), Full(), torch.float32, 0, torch.device("cpu")
    loaded = model.load(*arguments)
    assert {parameter.partition(".")[0] for parameter in loaded.new} == set(loaded.head)
    below = dict(stored.base_model.named_parameters())
    found = dict(loaded.model.base_model.named_parameters())
    assert len(below.keys() & found.keys()) > 5
    assert all(torch.equal(found[key], below[key]) for key in below.keys() & found.keys())
