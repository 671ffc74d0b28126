"""Every built-in method keeps the contract on every architecture, and methods with the usual mistakes do not."""

import csv
import json
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import torch

from ftkit import device, model, plugins
from ftkit.data.types import Row
from ftkit.errors import RecipeError, VerificationFailed
from ftkit.few_bits import steady_quantised
from ftkit.methods.adapter import Adapter
from ftkit.methods.bitfit import BitFit
from ftkit.methods.full import Full
from ftkit.methods.head import Head
from ftkit.methods.ia3 import IA3
from ftkit.methods.lora import LoRA
from ftkit.methods.p_tuning import PTuning
from ftkit.methods.partial import Partial
from ftkit.methods.prefix import PrefixTuning
from ftkit.methods.prompt import PromptTuning
from ftkit.methods.qlora import QLoRA
from ftkit.methods.vera import VeRA
from ftkit.recipe.spec import Model
from ftkit.sources import locate
from ftkit.tasks.causal_lm import CausalLM
from ftkit.tasks.text_classification import TextClassification
from ftkit.testing import check_method

HEADS = ("classifier", "pre_classifier", "score", "lm_head", "cls", "classification_head")
METHODS = {
    "full": Full(),
    "head": Head(),
    "partial-last": Partial(last=1),
    "partial-first": Partial(first=1),
    "partial-pattern": Partial(pattern=r"(bias|norm|ln_).*$"),
    "lora": LoRA(),
    "qlora-4": QLoRA(),
    "ia3": IA3(),
    "vera": VeRA(r=16),
    "bitfit": BitFit(),
    "adapter": Adapter(reduction=4),
    "prompt": PromptTuning(num_virtual_tokens=4),
    "p-tuning": PTuning(num_virtual_tokens=4),
    "prefix": PrefixTuning(num_virtual_tokens=4),
}
VARIANTS = {
    "adapter-houlsby": Adapter(placement="houlsby", reduction=8, activation="gelu", dropout=0.1),
    "prompt-random": PromptTuning(num_virtual_tokens=6, init="random"),
    "p-tuning-lstm": PTuning(num_virtual_tokens=4, encoder="lstm", encoder_hidden_size=16),
    "prefix-projection": PrefixTuning(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16),
    "partial-reinit": Partial(last="all", reinit=1, lr_decay=0.5),
    "lora-attention": LoRA(targets="attention", dropout=0.0),
    "dora": LoRA(dora=True),
    "rslora": LoRA(rslora=True, r=4),
    "pissa": LoRA(init="pissa", dropout=0.0),
    "pissa-patterns": LoRA(init="pissa", dropout=0.0, r=4, rank_pattern={"(query|c_attn|q_proj)": 2}, alpha_pattern={"(value|c_proj|v_proj)": 4}),
    "lora+": LoRA(lr_ratio=4, layers=[1], rslora=True),
    "qlora-fp4": QLoRA(quant_type="fp4", double_quant=False),
    "qlora-8": QLoRA(bits=8),
    "head-4": Head(bits=4),
    "ia3-4": IA3(bits=4),
    "ia3-8": IA3(bits=8),
    "vera-4": VeRA(r=16, bits=4),
    "adapter-4": Adapter(reduction=4, bits=4),
    "bitfit-4": BitFit(bits=4),
    "bitfit-8": BitFit(bits=8),
}
ALL = METHODS | VARIANTS
LAYERS = {"bert": "bert.encoder.layer.", "distilbert": "distilbert.transformer.layer.", "llama": "model.layers.", "gpt2": "transformer.h."}


def test_every_built_in_method_is_here():
    assert {method.kind for method in ALL.values()} == set(plugins.BUILTIN["method"])


def rows(path: Path, count: int) -> list[Row]:
    with path.open(encoding="utf-8") as file:
        values = list(csv.DictReader(file)) if path.suffix == ".csv" else [json.loads(line) for line in file]
    return [Row(row, str(path), number) for number, row in enumerate(values[:count], 1)]


def base_of(checkpoint: str, task):
    """A factory of bases as a run loads them."""
    spec = Model(name=checkpoint)
    source = locate(spec)
    tokenizer = model.load_tokenizer(spec, source, None, ())

    def load(method):
        base = model.load(spec, source, model.load_config(spec, source), tokenizer, task, method, torch.float32, 0, device.pick())
        steady_quantised(base.model)
        return base

    return load


def intended(name: str, architecture: str, new_head: bool):
    """Says of a parameter's name whether it is meant to learn, written down apart from the methods' own code."""
    layer = LAYERS.get(architecture)

    def of_head(parameter: str) -> bool:
        return parameter.startswith(HEADS)

    match name.removesuffix("-4").removesuffix("-8"):
        case "full":
            return lambda parameter: True
        case "head":
            return of_head
        case "partial-first":
            return lambda parameter: parameter.startswith(f"{layer}0.") or (new_head and of_head(parameter))
        case "partial-reinit":
            return lambda parameter: not any(part in parameter for part in ("embeddings", "embed_tokens", "wte", "wpe"))
        case "partial-last":
            below = ("embeddings", "embed_tokens", "wte", "wpe", f"{layer}0.")
            return lambda parameter: not any(part in parameter for part in below)
        case "partial-pattern":
            return lambda parameter: "bias" in parameter or "norm" in parameter or "ln_" in parameter or (new_head and of_head(parameter))
        case "bitfit":
            return lambda parameter: parameter.endswith("bias") or (new_head and of_head(parameter))
        case "adapter" | "adapter-houlsby":
            return lambda parameter: ".bottleneck." in parameter or (new_head and of_head(parameter))
        case "prompt" | "prompt-random" | "p-tuning" | "p-tuning-lstm":
            return lambda parameter: ".prompt." in parameter or (new_head and of_head(parameter))
        case "prefix" | "prefix-projection":
            return lambda parameter: ".prefix." in parameter or (new_head and of_head(parameter))
        case "ia3":
            return lambda parameter: "ia3_l" in parameter or "modules_to_save" in parameter
        case "vera":
            return lambda parameter: "vera_lambda_" in parameter or "modules_to_save" in parameter
    return lambda parameter: "lora_" in parameter or "modules_to_save" in parameter


IN_CLASSIFICATION = [(name, architecture) for architecture in LAYERS for name in (ALL if architecture in ("bert", "gpt2") else METHODS)]
IN_CLASSIFICATION.remove(("bitfit", "llama"))  # has no biases
OF_TWO_STACKS = ("full", "head", "lora", "ia3", "vera", "adapter", "prompt", "p-tuning", "prefix")
IN_CLASSIFICATION += [(name, architecture) for architecture in ("t5", "bart") for name in OF_TWO_STACKS]
ALL["olora"] = LoRA(init="olora", dropout=0.0, r=4)  # not for the transposed weights of GPT-2
IN_CLASSIFICATION.append(("olora", "bert"))
IN_LANGUAGE_MODELLING = [
    *((name, "llama") for name in ALL if not name.startswith("bitfit")),
    ("bitfit", "gpt2"),
    ("bitfit-4", "gpt2"),
    ("full", "gpt2"),
    ("partial-last", "gpt2"),
    ("lora", "gpt2"),
    ("qlora-4", "gpt2"),
]


@pytest.mark.parametrize(("name", "architecture"), IN_CLASSIFICATION)
def test_a_method_keeps_the_contract_in_classification(name, architecture, data, checkpoint, tmp_path, verify_here):
    examples = rows(data.single / "train.csv", 6)
    base = base_of(checkpoint(architecture), TextClassification().resolve(examples))
    steps = 80 if name.startswith("bitfit") else 40  # on random weights, biases alone learn slowly
    check_method(ALL[name], base, examples, tmp_path, intended(name, architecture, new_head=True), steps)


@pytest.mark.parametrize(("name", "architecture"), IN_LANGUAGE_MODELLING)
def test_a_method_keeps_the_contract_in_language_modelling(name, architecture, data, checkpoint, tmp_path, verify_here):
    examples = rows(data.prompts / "train.jsonl", 4)
    check_method(ALL[name], base_of(checkpoint(architecture), CausalLM()), examples, tmp_path, intended(name, architecture, new_head=False))


def test_a_head_that_is_the_embeddings_cannot_learn_alone(data, checkpoint):
    base = base_of(checkpoint("gpt2"), CausalLM())(Head())
    with pytest.raises(RecipeError, match="use method: lora"):
        Head().apply(base)


class Forgetful(Full):
    """Leaves a new head frozen."""

    kind: Literal["forgetful"] = "forgetful"

    def apply(self, base):
        base.model.requires_grad_(False)
        base.model.bert.pooler.requires_grad_(True)
        return base.model


class Greedy(Head):
    """Says that the base is frozen and trains it."""

    kind: Literal["greedy"] = "greedy"
    frozen_base: ClassVar[bool] = True

    def apply(self, base):
        return base.model.requires_grad_(True)


class Sloppy(Head):
    """Changes a frozen weight while it learns."""

    kind: Literal["sloppy"] = "sloppy"

    def apply(self, base):
        model = super().apply(base)
        frozen = model.bert.pooler.dense.bias

        def hook(*_):
            frozen.data.add_(1)

        model.register_forward_hook(hook)
        return model


class Idle(Head):
    """Trains what has no part in the loss."""

    kind: Literal["idle"] = "idle"

    def apply(self, base):
        model = super().apply(base)
        model.register_parameter("idle", torch.nn.Parameter(torch.zeros(1)))
        return model


class Amnesic(Head):
    """Saves other weights than those that learned."""

    kind: Literal["amnesic"] = "amnesic"

    def save(self, model, base, directory):
        with torch.no_grad():
            model.classifier.bias.add_(1)
        artifact = super().save(model, base, directory)
        with torch.no_grad():
            model.classifier.bias.sub_(1)
        return artifact


@pytest.mark.parametrize(
    ("method", "error", "told"),
    [
        (Forgetful(), AssertionError, "classifier starts from random weights"),
        (Greedy(), AssertionError, "says frozen_base"),
        (Sloppy(), AssertionError, "frozen weights changed while training: .'bert.pooler.dense.bias'"),
        (Idle(), AssertionError, "get no gradient: .'idle'"),
        (Amnesic(), VerificationFailed, "classifier.bias differs"),
    ],
    ids=["forgetful", "greedy", "sloppy", "idle", "amnesic"],
)
def test_a_broken_method_is_told_what_to_change(method, error, told, data, checkpoint, tmp_path, verify_here):
    examples = rows(data.single / "train.csv", 6)
    with pytest.raises(error, match=told):
        check_method(method, base_of(checkpoint("bert"), TextClassification().resolve(examples)), examples, tmp_path)
