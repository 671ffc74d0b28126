"""Configs from recipes: overrides of known settings only, and what a config derives follows them."""

import pytest

from ftkit import model
from ftkit.errors import RecipeError
from ftkit.recipe.spec import Model
from ftkit.tasks.causal_lm import CausalLM


def from_nothing(**config) -> Model:
    return Model(init="random", config={"model_type": "llama", **config})


def test_derived_settings_follow_those_they_derive_from():
    config = model.load_config(from_nothing(hidden_size=48, num_attention_heads=4), None)
    assert config.num_key_value_heads == 4
    assert config.head_dim == 12


def test_derived_settings_can_be_set():
    assert model.load_config(from_nothing(hidden_size=48, num_attention_heads=4, num_key_value_heads=2), None).num_key_value_heads == 2


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
