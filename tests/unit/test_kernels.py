"""Liger's kernels: when they are taken, what is asked of them, and that the model gets its own modules back.

The package needs Triton, so a stand-in takes its place here; tests/gpu has the real one.
"""

import importlib.machinery
import sys
from types import ModuleType

import pytest
import torch
import transformers
from transformers.models.llama import modeling_llama

from ftkit import kernels
from ftkit.errors import MissingDependency, RecipeError
from ftkit.report import Reporter

CUDA = torch.device("cuda")
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}


@pytest.fixture
def asked(monkeypatch):
    """A stand-in for the package; the settings that it is called with."""
    found: dict = {}

    def patch(model, **settings):
        found.update(settings)
        if not hasattr(model.base_model, "norm"):
            return  # as Liger does for what it does not know
        norm = model.model.norm
        norm.offset = 0.0
        norm.__dict__["forward"] = lambda states: 2 * states
        modeling_llama.apply_rotary_pos_emb = patch

    module = ModuleType("liger_kernel.transformers.monkey_patch")
    module._apply_liger_kernel_to_instance = patch
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": patch}
    for name in ("triton", "liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **changes))


def test_the_model_and_its_architecture_are_put_back(asked):
    model, rotary = llama(), modeling_llama.apply_rotary_pos_emb
    before = [dict(vars(module)) for module in model.modules()]
    with Reporter(None, quiet=True) as report:
        liger = kernels.choose("auto", model, CUDA, report)
        assert any("Liger's kernels" in note for note in report.notes)
    assert torch.equal(model.model.norm(torch.ones(2)), torch.full((2,), 2.0))
    assert modeling_llama.apply_rotary_pos_emb is not rotary
    liger.remove()
    assert [dict(vars(module)) for module in model.modules()] == before
    assert modeling_llama.apply_rotary_pos_emb is rotary


@pytest.mark.parametrize(("activation", "swiglu", "geglu"), [("silu", True, False), ("relu", False, False), ("gelu_pytorch_tanh", False, True)])
def test_gated_layers_only_of_the_activation_that_the_kernels_compute(activation, swiglu, geglu, asked):
    kernels.Liger(llama(hidden_act=activation)).remove()
    assert (asked["swiglu"], asked["geglu"]) == (swiglu, geglu)
    assert not asked["cross_entropy"]
    assert not asked["fused_linear_cross_entropy"]


def test_auto_takes_them_where_they_are(asked):
    bert = transformers.BertModel(transformers.BertConfig(**SIZES))
    with Reporter(None, quiet=True) as report:
        assert kernels.choose(False, llama(), CUDA, report) is None
        assert kernels.choose("auto", llama(), torch.device("cpu"), report) is None
        assert kernels.choose("auto", bert, CUDA, report) is None
        with pytest.raises(RecipeError, match="no kernels for BertModel: its modules are none of those"):
            kernels.choose(True, bert, CUDA, report)


def test_what_liger_changes_before_it_gives_up_is_put_back(asked, monkeypatch):
    """As its 0.8.5 does for Gemma 3 under a classifier (TypeError) and for GLM 4 with rotary positions (NotImplementedError)."""
    package = sys.modules["liger_kernel.transformers.monkey_patch"]
    patch, tried = package._apply_liger_kernel_to_instance, []

    def giving_up(model, rope, **settings):
        tried.append(rope)
        patch(model, **settings)
        if rope or len(tried) > 2:
            raise NotImplementedError("no rotary positions here")

    package._apply_liger_kernel_to_instance = giving_up
    model, rotary = llama(), modeling_llama.apply_rotary_pos_emb
    kernels.Liger(model).remove()
    assert tried == [True, False]
    before = [dict(vars(module)) for module in model.modules()]
    with Reporter(None, quiet=True) as report:
        assert kernels.choose("auto", model, CUDA, report) is None
        with pytest.raises(RecipeError, match="no kernels for LlamaForCausalLM: no rotary positions here"):
            kernels.choose(True, model, CUDA, report)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert modeling_llama.apply_rotary_pos_emb is rotary


def test_what_is_asked_for_and_missing_is_refused(recipe, ftkit, monkeypatch):
    done = ftkit("train", recipe("llama", "prompts", {"liger": True}))
    assert (done.code, "train.liger: true needs a GPU" in done.err) == (4, True)
    assert ftkit("check", recipe("llama", "prompts", {"liger": True})).code == 4
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install 'ftkit\[liger\]'"):
        kernels.check(True, CUDA)
    with Reporter(None, quiet=True) as report:
        assert kernels.choose("auto", llama(), CUDA, report) is None
