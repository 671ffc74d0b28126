"""Which weights a method picks, by counts known from elsewhere, on models without weights."""

import copy

import pytest
import torch
import transformers

from ftkit.errors import RecipeError
from ftkit.few_bits import num_values
from ftkit.methods.adapter import Adapter
from ftkit.methods.bitfit import BitFit
from ftkit.methods.head import Head
from ftkit.methods.ia3 import IA3
from ftkit.methods.lora import LoRA
from ftkit.methods.modules import (
    choose_targets,
    embedding_of,
    feed_forward_outputs,
    keys_and_values,
    layers,
    linear_modules,
    shortest_endings,
    two_stacks,
)
from ftkit.methods.partial import Partial
from ftkit.methods.prefix import PrefixTuning
from ftkit.methods.prompt import PromptTuning
from ftkit.methods.vera import VeRA
from ftkit.miniature import miniature
from ftkit.model import Base, head_of, parameters_by_group, skeleton
from ftkit.optim import decays
from ftkit.sources import Source
from ftkit.tasks.causal_lm import CausalLM
from ftkit.tasks.text_classification import TextClassification


def base_of(config, task) -> Base:
    """A loaded model as a method sees it, on the meta device; its head is new if the task's is."""
    for key, value in task.config_kwargs().items():
        setattr(config, key, value)
    model = skeleton(config, task)
    head = head_of(model)
    new = {name for name, _ in model.named_parameters() if task.new_head and name.split(".")[0] in head}
    return Base(model, None, Source("somewhere"), task, head, new)


CLASSIFY = TextClassification(labels=["a", "b"])


def trainable(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_lora_on_roberta_counts_as_in_the_paper():
    """12 layers x 2 matrices x 8 x (768 + 768) = 294,912 (github.com/microsoft/LoRA), and the head."""
    base = base_of(transformers.RobertaConfig(), CLASSIFY)
    head = sum(p.numel() for p in base.model.classifier.parameters())
    model = LoRA(r=8, targets=["query", "value"]).apply(base)
    assert trainable(model) - head == 294_912
    assert parameters_by_group(model, base.head)["adapter"] == {"trainable": 294_912, "total": 294_912}
    assert parameters_by_group(model, base.head)["head"] == {"trainable": head, "total": head}


def llama_3_2_3b():
    return transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )


@pytest.mark.parametrize(
    ("method", "count"),
    [
        (LoRA(r=32, targets=["q_proj", "v_proj"]), 9_175_040),
        (LoRA(r=64, targets=["q_proj", "v_proj"]), 18_350_080),
        (LoRA(r=32, targets=["q_proj", "v_proj"], dora=True), 9_289_728),
        (IA3(), 286_720),
        (PromptTuning(num_virtual_tokens=200), 614_400),
        (PrefixTuning(num_virtual_tokens=200), 11_468_800),
    ],
)
def test_adapters_on_llama_count_as_in_pefts_comparison(method, count):
    """github.com/huggingface/peft, method_comparison/MetaMathQA/results."""
    assert trainable(method.apply(base_of(llama_3_2_3b(), CausalLM()))) == count


def test_the_whole_of_llama_3_2_3b_counts_as_published():
    groups = parameters_by_group(base_of(llama_3_2_3b(), CausalLM()).model, ["lm_head"])
    assert sum(group["total"] for group in groups.values()) == 3_212_749_824


def small(kind):
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    match kind:
        case "bert":
            return transformers.BertConfig(**sizes)
        case "distilbert":
            return transformers.DistilBertConfig(dim=32, n_layers=4, n_heads=2, hidden_dim=64)
        case "roberta":
            return transformers.RobertaConfig(**sizes)
        case "electra":
            return transformers.ElectraConfig(**sizes, embedding_size=16)
        case "deberta":
            return transformers.DebertaV2Config(**sizes)
        case "modernbert":
            return transformers.ModernBertConfig(**sizes, vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
        case "gpt2":
            return transformers.GPT2Config(n_embd=32, n_layer=4, n_head=2)
        case "llama":
            return transformers.LlamaConfig(**sizes, tie_word_embeddings=False)
        case "phi3":
            return transformers.Phi3Config(**sizes, vocab_size=100, pad_token_id=0)


KINDS = ["bert", "distilbert", "roberta", "electra", "deberta", "modernbert", "gpt2", "llama", "phi3"]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_found_bottom_first(kind):
    base = base_of(small(kind), CLASSIFY)
    names = layers(base)
    assert len(names) == 4
    assert [name.rpartition(".")[2] for name in names] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_is_every_matrix_of_the_layers_and_nothing_of_the_head(kind):
    base = base_of(small(kind), CLASSIFY)
    names = linear_modules(base)
    prefixes = tuple(f"{name}." for name in layers(base))
    assert names
    assert all(name.startswith(prefixes) or "embed" in name for name in names), names
    matrices = [n for n, p in base.model.named_parameters() if n.startswith(prefixes) and p.ndim == 2 and "rel" not in n]
    assert {f"{name}.weight" for name in names} >= set(matrices)


@pytest.mark.parametrize("kind", KINDS)
def test_endings_name_the_chosen_modules_and_no_other(kind):
    base = base_of(small(kind), CLASSIFY)
    for targets in ("all-linear", "attention"):
        chosen = choose_targets(base, targets)
        endings = shortest_endings(chosen, base.model)
        matched = [name for name, _ in base.model.named_modules() if any(name == e or name.endswith(f".{e}") for e in endings)]
        assert sorted(matched) == sorted(chosen)
        assert len(endings) <= 8


def test_attention_is_not_the_feed_forward():
    chosen = choose_targets(base_of(small("llama"), CausalLM()), "attention")
    assert {name.rpartition(".")[2] for name in chosen} == {"q_proj", "k_proj", "v_proj", "o_proj"}


FEED_FORWARD = {  # the second matrix of a layer
    "bert": "layer.0.output.dense",
    "distilbert": "ffn.lin2",
    "roberta": "layer.0.output.dense",
    "electra": "layer.0.output.dense",
    "deberta": "layer.0.output.dense",
    "modernbert": "mlp.Wo",
    "gpt2": "mlp.c_proj",
    "llama": "down_proj",
    "phi3": "down_proj",
}
KEYS_VALUES = {"distilbert": 2, "gpt2": 1, "modernbert": 1, "phi3": 1}  # modules in a layer; two apart, or one for queries, too


@pytest.mark.parametrize("kind", KINDS)
def test_keys_values_and_inner_activations_are_found_in_the_module_tree(kind):
    base = base_of(small(kind), CLASSIFY)
    assert len(keys_and_values(base)) == 4 * KEYS_VALUES.get(kind, 2)
    found = feed_forward_outputs(base.model)
    assert len(found) == 4
    assert found[0].endswith(FEED_FORWARD[kind])
    model = IA3().apply(base)
    scaled = {name for name, module in model.named_modules() if hasattr(module, "ia3_l")}
    assert len(scaled) == 4 * KEYS_VALUES.get(kind, 2) + 4
    of_inputs = {name for name, module in model.named_modules() if getattr(module, "is_feedforward", False)}
    assert {name.removeprefix("base_model.model.") for name in of_inputs} == set(found)


ATTENTION_OUTPUT = {
    "bert": "attention.output.dense",
    "distilbert": "attention.out_lin",
    "roberta": "attention.output.dense",
    "electra": "attention.output.dense",
    "deberta": "attention.output.dense",
    "modernbert": "attn.Wo",
    "gpt2": "attn.c_proj",
    "llama": "o_proj",
    "phi3": "o_proj",
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_stand_behind_sublayers_and_change_nothing_at_first(kind):
    """Two a layer (arXiv 1902.00751), or one (arXiv 2005.00247); 2 m d + d + m numbers each."""
    torch.manual_seed(0)
    model = skeleton(base_of(small(kind), CLASSIFY).model.config, CLASSIFY).__class__(base_of(small(kind), CLASSIFY).model.config).eval()
    ids = torch.arange(3, 12)[None]
    before = model(input_ids=ids).logits
    for placement, number in (("pfeiffer", 4), ("houlsby", 8)):
        fresh = copy.deepcopy(model)
        base = Base(fresh, None, Source("somewhere"), CLASSIFY, head_of(fresh), set())
        learner = Adapter(placement=placement, reduction=4).apply(base)
        places = [name for name, _ in learner.named_modules() if name.endswith(".bottleneck")]
        endings = {FEED_FORWARD[kind].removeprefix("layer.0."), ATTENTION_OUTPUT[kind]}
        assert len(places) == number
        assert all(any(place.removesuffix(".bottleneck").endswith(ending) for ending in endings) for place in places)
        assert parameters_by_group(learner, base.head)["adapter"]["trainable"] == number * (2 * 8 * 32 + 32 + 8)
        assert torch.equal(learner(input_ids=ids).logits, before)


def test_bitfit_trains_biases_and_refuses_models_without():
    base = base_of(small("bert"), CLASSIFY)
    learning = {name for name, parameter in BitFit().apply(base).named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in base.model.named_parameters() if name.endswith("bias")} | {"classifier.weight"}
    with pytest.raises(RecipeError, match="LlamaForCausalLM has no biases; use method: ia3"):
        BitFit().apply(base_of(small("llama"), CausalLM()))


def test_vera_learns_two_vectors_a_module():
    """r + outputs numbers each (arXiv 2310.11454, table 1)."""
    base = base_of(small("bert"), CLASSIFY)
    model = VeRA(r=8, targets=["query", "value"]).apply(base)
    assert parameters_by_group(model, base.head)["adapter"]["trainable"] == 4 * 2 * (8 + 32)


@pytest.mark.parametrize("kind", KINDS)
def test_head_trains_the_head_alone(kind):
    base = base_of(small(kind), CLASSIFY)
    model = Head().apply(base)
    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == set(base.head)


def test_head_refuses_one_that_is_the_embeddings_too():
    config = small("llama")
    config.tie_word_embeddings = True
    with pytest.raises(RecipeError, match="shares its head 'lm_head' with the input embeddings"):
        Head().apply(base_of(config, CausalLM()))


def test_head_trains_one_of_its_own():
    model = Head().apply(base_of(small("llama"), CausalLM()))
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["lm_head.weight"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "which"), [(Partial(last=2), [2, 3]), (Partial(first=1), [0])])
def test_partial_trains_its_layers_and_the_new_head(kind, method, which):
    base = base_of(small(kind), CLASSIFY)
    names = layers(base)
    model = method.apply(base)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    for number, layer in enumerate(names):
        assert all((f"{layer}.{name}" in learning) == (number in which) for name, _ in model.get_submodule(layer).named_parameters())
    assert {name.split(".")[0] for name in learning} >= set(base.head)
    embeddings = [n for n, _ in model.named_parameters() if "embed" in n or n.split(".")[1] in ("wte", "wpe")]
    assert not learning & set(embeddings)


def test_partial_from_the_top_trains_the_final_norm():
    model = Partial(last=1).apply(base_of(small("llama"), CLASSIFY))
    assert model.model.norm.weight.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_partial_of_all_layers_leaves_the_embeddings_out_or_not(kind):
    without, everything = (Partial(last="all", embeddings=embeddings).apply(base_of(small(kind), CLASSIFY)) for embeddings in (False, True))
    assert all(parameter.requires_grad for parameter in everything.parameters())
    frozen = [name for name, parameter in without.named_parameters() if not parameter.requires_grad]
    assert frozen
    assert all("embed" in name or name.split(".")[1] in ("wte", "wpe") or "rel_" in name for name in frozen), frozen


@pytest.mark.parametrize("kind", KINDS)
def test_discriminative_learning_rates_fall_by_a_factor_a_layer(kind):
    """ULMFiT (arXiv 1801.06146, 3.2): the rate of a layer is that of the next higher one over 2.6."""
    base, method = base_of(small(kind), CLASSIFY), Partial(last="all", embeddings=True, lr_decay=1 / 2.6)
    model = method.apply(base)
    factors = {name: method.lr_factor(base)(name) for name, _ in model.named_parameters()}
    names = layers(base)
    for number, layer in enumerate(names):
        assert list({factors[name] for name in factors if name.startswith(f"{layer}.")}) == [pytest.approx(2.6 ** -(4 - number))]
    assert {factors[name] for name in factors if name.split(".")[0] in base.head} == {1.0}
    lowest = {factors[name] for name in factors if "embeddings" in name or ".wte." in name or "embed_tokens" in name}
    assert list(lowest) == [pytest.approx(2.6**-5)]
    assert {round(factor, 9) for factor in factors.values()} == {round(2.6**-depth, 9) for depth in range(6)}


@pytest.mark.parametrize(("method", "first"), [(Partial(last="all", embeddings=True, unfreeze_every=2), 1), (Partial(first=2, unfreeze_every=2), 3)])
def test_layers_wait_from_the_highest_that_learns(method, first):
    """The head of GPT-2 is its embedding, and with `first` neither learns."""
    base = base_of(small("gpt2"), CausalLM())
    model = method.apply(base)
    waits = method.waits(base)
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    for epoch in range(10):
        now = {name for name in learning if not waits(name, epoch)}
        layers_now = {int(name.split(".")[2]) for name in now if ".h." in name}
        assert layers_now == {number for number in range(4) if first <= 4 - number <= first + epoch // 2 and f"transformer.h.{number}.ln_1.bias" in learning}


@pytest.mark.parametrize("kind", ["bert-decoder-norm", "opt"])
def test_a_norm_within_the_stack_counts_as_above_the_layers(kind):
    if kind == "opt":
        config = transformers.OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32, vocab_size=50)
        base, name = base_of(config, CausalLM()), "model.decoder.final_layer_norm.weight"
    else:
        config = transformers.MegatronBertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50)
        base, name = base_of(config, CLASSIFY), "bert.encoder.ln.weight"
    method = Partial(last=1, lr_decay=0.5)
    assert dict(method.apply(base).named_parameters())[name].requires_grad
    assert method.lr_factor(base)(name) == 0.5


@pytest.mark.parametrize(("kind", "name"), [("gpt2", "transformer.h.3.attn.c_proj.weight"), ("modernbert", "model.layers.3.mlp.Wo.weight")])
def test_what_an_architecture_draws_in_its_own_way_is_drawn_so_again(kind, name):
    """GPT-2 and ModernBERT scale what leads into the residual stream by their depth."""
    torch.manual_seed(0)
    config = base_of(small(kind), CLASSIFY).model.config
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    spread = model.get_parameter(name).std().item()
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # as after loading
    base = Base(model, None, Source("somewhere"), CLASSIFY, head_of(model), set())
    Partial(last=1, reinit=1).apply(base)
    assert model.get_parameter(name).std().item() == pytest.approx(spread, rel=0.15)
    assert spread < 0.015


def test_embeddings_beside_a_pattern_are_refused():
    with pytest.raises(ValueError, match="let the pattern find them"):
        Partial(pattern="bias", embeddings=True)


@pytest.mark.parametrize("targets", ["all-linear", "attention", ["dense"]])
def test_the_factors_of_ia3_where_both_lists_name_the_same_words(targets):
    model = IA3(targets=targets).apply(base_of(small("bert"), CLASSIFY))
    of_inputs = {name for name, module in model.named_modules() if getattr(module, "is_feedforward", False)}
    assert {name.removeprefix("base_model.model.bert.encoder.layer.")[1:] for name in of_inputs} == {".output.dense"}


def test_factors_do_not_decay():
    """They start at 1: decay would lead away from the base."""
    model = IA3().apply(base_of(small("bert"), CLASSIFY))
    assert not any(decays(name, parameter) for name, parameter in model.named_parameters() if "ia3_l" in name)


def test_the_highest_layers_and_the_pooler_start_anew():
    """arXiv 2006.05987; by the architecture's own initialisation, from the run's seed."""
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(small("bert"))
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 0.5)
            parameter._is_hf_initialized = True  # as after loading
        base = Base(model, None, Source("somewhere"), CLASSIFY, head_of(model), {"classifier.weight", "classifier.bias"})
        torch.manual_seed(7)
        Partial(last="all", reinit=2).apply(base)
        kept = {name for name, parameter in model.named_parameters() if bool((parameter == 0.5).all())}
        assert all(("layer.2." in name or "layer.3." in name or "pooler" in name) != (name in kept) for name, _ in model.named_parameters())
        drawn.append(model.bert.encoder.layer[3].output.dense.weight)
        assert drawn[-1].std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(*drawn)
    with pytest.raises(RecipeError, match=r"method.reinit: 5 layers asked for, BertForSequenceClassification has 4"):
        Partial(last="all", reinit=5).apply(base_of(small("bert"), CLASSIFY))
    with pytest.raises(ValueError, match="2 layers would start from random weights and not learn; give last: 2 or more"):
        Partial(last=1, reinit=2)


def test_partial_by_pattern_trains_what_it_finds_and_the_new_head():
    model = Partial(pattern=r"layer\.3\.output").apply(base_of(small("bert"), CLASSIFY))
    learning = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all("layer.3.output" in name or name.startswith("classifier") for name in learning)
    assert any("layer.3.output" in name for name in learning)
    with pytest.raises(RecipeError, match="matches no parameter"):
        Partial(pattern="no_such_thing").apply(base_of(small("bert"), CLASSIFY))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 16), (True, 32 / 16**0.5)])
def test_the_scale_of_updates(rslora, scale):
    """alpha / r, and alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
    model = LoRA(r=16, alpha=32, rslora=rslora, targets=["query"]).apply(base_of(small("bert"), CLASSIFY))
    scales = {module.scaling["default"] for module in model.modules() if hasattr(module, "lora_A")}
    assert scales == {scale}


def updates(model) -> dict[str, tuple[int, float]]:
    """Rank and scale of each module with updates."""
    found = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return {name.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"]) for name, module in found.items()}


def test_ranks_and_scales_by_pattern_and_layers_by_number():
    base = base_of(small("bert"), CLASSIFY)
    method = LoRA(r=4, alpha=8, targets="attention", layers=[1, 3], rank_pattern={r"layer\.3\..*": 16, "query": 2}, alpha_pattern={"query": 6})
    found = updates(method.apply(base))
    prefix = "bert.encoder.layer"
    assert {name.split(".")[3] for name in found} == {"1", "3"}
    assert found[f"{prefix}.1.attention.self.query"] == (2, 3.0)
    assert found[f"{prefix}.1.attention.self.value"] == (4, 2.0)
    assert found[f"{prefix}.3.attention.self.query"] == (16, 6 / 16)
    assert found[f"{prefix}.3.attention.output.dense"] == (16, 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 33}, r"method.r: 33 is more than the modules with updates can have, which is 32 at most"),
        ({"rank_pattern": {"value": 40}}, r"method.rank_pattern: 'value': a rank of 40 is more than the 32 that .*value can have"),
        ({"rank_pattern": {"q_proj": 4}}, r"method.rank_pattern: 'q_proj' matches no module with updates; there are .*query"),
        ({"alpha_pattern": {"(": 4}}, r"method.alpha_pattern: .* is no regular expression"),
        ({"layers": [0, 4]}, r"method.layers: 4, but the 4 layers of BertForSequenceClassification are counted from 0"),
    ],
)
def test_ranks_and_layers_that_cannot_be_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        LoRA(**fields).apply(base_of(small("bert"), CLASSIFY))


def test_a_narrow_module_among_many_takes_no_part_in_the_refusal():
    """The gate of Qwen2-MoE's shared expert has one output: PEFT takes a rank of 8 there, and no harm is done."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
    config = transformers.Qwen2MoeConfig(**sizes, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=2, num_experts_per_tok=1)
    base = base_of(config, CausalLM())
    assert any(name.endswith("shared_expert_gate") for name in updates(LoRA(r=8).apply(base)))
    with pytest.raises(RecipeError, match=r"method.init: olora: .*shared_expert_gate has no more than 1 components"):
        LoRA(r=8, init="olora").apply(base_of(config, CausalLM()))


def test_olora_is_refused_where_weights_are_transposed():
    with pytest.raises(RecipeError, match="olora takes linear modules as they are, and GPT2ForSequenceClassification keeps them transposed"):
        LoRA(init="olora").apply(base_of(small("gpt2"), CLASSIFY))


def test_lora_plus_gives_the_second_matrix_a_rate_of_its_own():
    """arXiv 2402.12354: the matrix that starts at zero learns faster; the new head as the first matrix."""
    method = LoRA(lr_ratio=16)
    base = base_of(small("bert"), CLASSIFY)
    model = method.apply(base)
    factors = {name: method.lr_factor(base)(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[-3] if "lora_" in name else "head" for name, factor in factors.items() if factor == 16} == {"lora_B"}
    assert {factor for name, factor in factors.items() if "lora_B" not in name} == {1.0}


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_decomposed_weights_and_updates_are_the_weights_at_first(init, rslora):
    """Their outputs are those of the base to 1e-4 (arXiv 2404.02948, 2406.01775)."""
    torch.manual_seed(0)
    config = small("bert")
    model = transformers.BertForSequenceClassification(config).eval()
    ids = torch.arange(3, 20)[None]
    before = model(input_ids=ids).logits
    base = Base(model, None, Source("somewhere"), CLASSIFY, head_of(model), {"classifier.weight", "classifier.bias"})
    after = LoRA(init=init, rslora=rslora, r=4, rank_pattern={"key": 2}, dropout=0.0).apply(base).eval()(input_ids=ids).logits
    assert len(base.initial) == 2 * 4 * 6
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_four_bit_weights_count_as_the_values_they_hold():
    functional = pytest.importorskip("bitsandbytes.functional")
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(64, 48, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    packed = layer.weight
    if packed.quant_state is None:  # quantised by the first move to a device
        data, state = functional.quantize_4bit(packed.data)
        packed.data, packed.quant_state = data, state
    assert packed.numel() == 64 * 48 // 2
    assert num_values(packed) == 64 * 48


HEADED = {  # architecture, head -> modules above the stacks, how many stacks
    ("t5", "SequenceClassification"): (["classification_head"], 2),
    ("t5", "TokenClassification"): (["classifier"], 1),
    ("umt5", "TokenClassification"): (["classifier"], 1),  # whose config says two
    ("t5", "QuestionAnswering"): (["qa_outputs"], 2),
    ("t5", "Seq2SeqLM"): (["lm_head"], 2),
    ("bart", "QuestionAnswering"): (["qa_outputs"], 2),
    ("bert", "TokenClassification"): (["classifier"], 1),
    ("albert", "TokenClassification"): (["classifier"], 1),
    ("llama", "SequenceClassification"): (["score"], 1),
    ("gpt2", "QuestionAnswering"): (["qa_outputs"], 1),
}


@pytest.mark.parametrize(("name", "head"), HEADED)
def test_heads_stacks_and_the_embedding_that_a_row_goes_through(name, head, tokenizers):
    config = miniature(transformers.CONFIG_MAPPING[name](decoder_start_token_id=0, pad_token_id=0), 1, tokenizers["ending"])
    model = getattr(transformers, f"AutoModelFor{head}").from_config(config).eval()
    assert (head_of(model), 1 + two_stacks(model)) == HEADED[name, head]
    seen = []
    embedding_of(model).register_forward_hook(lambda module, args, output: seen.append(args[0]))
    ids = torch.tensor([[5, 6, 1]])
    model(input_ids=ids, **({"decoder_input_ids": ids} if head == "Seq2SeqLM" else {}))
    assert torch.equal(seen[0], ids)
