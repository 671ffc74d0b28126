"""Merging: the written model answers as the adapter did, or nothing is written."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from ftkit import merge as merging
from ftkit import reload, verify
from ftkit.combine import combine
from ftkit.errors import RecipeError, VerificationFailed
from ftkit.merge import merge
from ftkit.recipe.spec import TrainedTokenizer
from ftkit.tokenizer import train_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"}

pytestmark = pytest.mark.usefixtures("verify_here")  # test_verify.py starts real processes


@pytest.fixture(scope="module")
def tokenizer():
    spec = TrainedTokenizer(train="data", kind="bpe", vocab_size=300)
    return train_tokenizer(spec, [f"the cat number {i} sat on the mat and saw {i * 7} rats" for i in range(50)])


def llama(vocab_size=300, **config):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=vocab_size, max_position_embeddings=64, **SIZES, **config))


def save_adapter(directory, base, tokenizer, config, auto_class="AutoModelForCausalLM", **kwargs):
    """A base and an adapter on it whose weights are all random, as PEFT writes them."""
    base.save_pretrained(directory / "base")
    tokenizer.save_pretrained(directory / "base")
    model = peft.get_peft_model(getattr(transformers, auto_class).from_pretrained(directory / "base", **kwargs), config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float() + 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(directory / "adapter")
    return directory / "adapter"


def lora(*targets, **config):
    return peft.LoraConfig(r=4, target_modules=list(targets), **({"task_type": "CAUSAL_LM"} | config))


CASES = {  # whether the base shares its two embeddings, and the adapter
    "lora": (True, lora("q_proj", "down_proj")),
    "lora, untied": (False, lora("q_proj", "down_proj")),
    "dora": (True, lora("q_proj", "down_proj", use_dora=True, use_rslora=True)),
    "pissa": (True, lora("q_proj", init_lora_weights="pissa")),
    "embeddings": (True, lora("q_proj", "embed_tokens")),
    "embeddings, untied": (False, lora("q_proj", "embed_tokens")),
    "head": (True, lora("q_proj", "lm_head")),
    "saved embeddings": (True, lora("q_proj", modules_to_save=["embed_tokens"])),
    "both saved": (True, lora("q_proj", modules_to_save=["embed_tokens", "lm_head"])),
    "tokens": (True, lora("q_proj", trainable_token_indices=[5, 6])),
}


@pytest.mark.parametrize("kind", ["roberta", "electra"])
@pytest.mark.parametrize("adapter", ["ia3", "vera"])
def test_heads_of_several_matrices_are_merged_too(kind, adapter, tmp_path, tokenizer):
    """PEFT's own merge_and_unload ends in an AttributeError there."""
    config = {"roberta": transformers.RobertaConfig, "electra": transformers.ElectraConfig}[kind](vocab_size=300, max_position_embeddings=66, **SIZES)
    torch.manual_seed(0)
    base = transformers.AutoModel.from_config(config)
    common = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier"]}
    adapters = {
        "ia3": peft.IA3Config(target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"], **common),
        "vera": peft.VeraConfig(r=8, target_modules=["query", "value"], **common),
    }
    made = save_adapter(tmp_path, base, tokenizer, adapters[adapter], "AutoModelForSequenceClassification")
    result = merge(made, tmp_path / "out")
    assert result["max_difference"] <= result["tolerance"] / 10
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert not any("classifier.modules_to_save" in name or "ia3" in name or "vera" in name for name, _ in merged.named_parameters())


@pytest.mark.parametrize(("tied", "config"), CASES.values(), ids=CASES)
def test_merged_and_adapter_answer_alike(tmp_path, tokenizer, tied, config):
    adapter = save_adapter(tmp_path, llama(tie_word_embeddings=tied), tokenizer, config)
    result = merge(adapter, tmp_path / "out")
    assert result["max_difference"] <= result["tolerance"] / 10
    row = {"input_ids": torch.tensor(tokenizer("the cat sat on the mat")["input_ids"])}
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    untouched = reload.answers(base, [row])
    adapted = reload.answers(peft.PeftModel.from_pretrained(base, adapter).eval(), [row])
    merged = reload.answers(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"), [row])
    assert verify.compare(adapted, merged, 1e-5)[1] == []
    assert verify.compare(untouched, merged, 1e-3)[1] != []
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")("the cat")["input_ids"] == tokenizer("the cat")["input_ids"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_composite_head_of_another_size_than_the_base_has(tmp_path, tokenizer):
    torch.manual_seed(0)
    base = transformers.RobertaForSequenceClassification(transformers.RobertaConfig(vocab_size=300, max_position_embeddings=66, **SIZES))
    config = lora("query", task_type="SEQ_CLS", modules_to_save=["classifier"])
    adapter = save_adapter(tmp_path, base, tokenizer, config, "AutoModelForSequenceClassification", num_labels=5, ignore_mismatched_sizes=True)
    result = merge(adapter, tmp_path / "out")
    assert result["max_difference"] <= result["tolerance"] / 10
    assert transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").classifier.out_proj.out_features == 5


def test_a_run_keeps_its_label_names_and_refuses_another_base(tmp_path, tokenizer):
    config = lora("q_proj", task_type="SEQ_CLS", modules_to_save=["score"])
    names = {0: "no", 1: "maybe", 2: "yes"}
    auto_class = "AutoModelForSequenceClassification"
    save_adapter(tmp_path, llama(), tokenizer, config, auto_class, num_labels=3)
    run = tmp_path / "run"
    (tmp_path / "adapter").rename(tmp_path / "model")
    run.mkdir()
    (tmp_path / "model").rename(run / "model")
    tokenizer.save_pretrained(run / "model")
    kwargs = {"dtype": "float32", "num_labels": 3, "id2label": {str(i): name for i, name in names.items()}}
    artifact = {"loads_with": "peft", "auto_class": auto_class, "base": str(tmp_path / "base"), "revision": None, "load_kwargs": kwargs}
    model = reload.load(run / "model", artifact, "cpu")
    expected = verify.capture(model, tokenizer, merging.sample(tokenizer, 64), run / "model", artifact)
    manifest = {"status": "finished", "artifact": artifact, "verification": verify.check(run / "model", artifact, expected)}
    (run / "manifest.json").write_text(json.dumps(manifest))
    merge(run, tmp_path / "out")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "out").id2label == names

    other = llama()
    with torch.no_grad():
        other.model.embed_tokens.weight[299, 0] += 1
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(RecipeError, match="has changed"):
        merge(run, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("bits", [{**NF4}, {"load_in_8bit": True}], ids=["4-bit", "8-bit"])
def test_a_checkpoint_stored_in_few_bits(tmp_path, tokenizer, bits):
    pytest.importorskip("bitsandbytes")
    llama().save_pretrained(tmp_path / "float")
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", dtype="float32", device_map={"": "cpu"}, quantization_config=transformers.BitsAndBytesConfig(**bits)
    )
    adapter = save_adapter(tmp_path, quantised, tokenizer, lora("q_proj", "down_proj"))
    result = merge(adapter, tmp_path / "out")
    assert result["max_difference"] <= result["tolerance"] / 5
    assert not hasattr(transformers.AutoConfig.from_pretrained(tmp_path / "out"), "quantization_config")
    with pytest.raises(RecipeError, match="stored quantised"):
        merge(adapter, tmp_path / "original", base="original")


def test_a_run_on_a_quantised_base_merges_into_either_base(tmp_path, tokenizer):
    pytest.importorskip("bitsandbytes")
    run = tmp_path / "run"
    run.mkdir()
    save_adapter(tmp_path, llama(), tokenizer, lora("q_proj", "down_proj")).rename(run / "model")
    tokenizer.save_pretrained(run / "model")
    kwargs = {"dtype": "float32", "quantization_config": NF4}
    artifact = {"loads_with": "peft", "auto_class": "AutoModelForCausalLM", "base": str(tmp_path / "base"), "revision": None, "load_kwargs": kwargs}
    (run / "manifest.json").write_text(json.dumps({"status": "finished", "artifact": artifact}))
    notes = []
    stored = merge(run, tmp_path / "stored")
    original = merge(run, tmp_path / "original", base="original", note=notes.append)
    assert stored["difference_to_trained"] <= stored["tolerance"] / 10
    assert original["max_difference"] <= original["tolerance"] / 10
    assert original["difference_to_trained"] > 100 * stored["difference_to_trained"]
    assert any("stored base" in text for text in notes)


def test_another_dtype_is_compared_with_its_own_tolerance(tmp_path, tokenizer):
    adapter = save_adapter(tmp_path, llama(), tokenizer, lora("q_proj"))
    result = merge(adapter, tmp_path / "out", dtype="bfloat16")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert 1e-5 < result["max_difference"] <= result["tolerance"]
    with pytest.raises(RecipeError, match="float8"):
        merge(adapter, tmp_path / "other", dtype="float8")


def test_a_wrong_merge_is_refused_and_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    adapter = save_adapter(tmp_path, llama(), tokenizer, lora("q_proj"))
    monkeypatch.setattr(peft.LoraModel, "merge_and_unload", lambda self, **_: self.unload())
    with pytest.raises(VerificationFailed, match=r"does not answer as .*adapter"):
        merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_wrong_save_is_refused_and_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    adapter = save_adapter(tmp_path, llama(), tokenizer, lora("q_proj"))
    save = transformers.LlamaForCausalLM.save_pretrained

    def save_wrongly(self, directory):
        with torch.no_grad():
            self.model.embed_tokens.weight[299, 0] += 1
            save(self, directory)
            self.model.embed_tokens.weight[299, 0] -= 1

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", save_wrongly)
    with pytest.raises(VerificationFailed, match=r"tensor model\.embed_tokens\.weight differs"):
        merge(adapter, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def change_config(adapter, **values):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda adapter: llama(vocab_size=280).save_pretrained(adapter.parent / "base"), "embed_tokens"),
        (lambda adapter: llama(num_key_value_heads=1).save_pretrained(adapter.parent / "base"), "k_proj"),
        (lambda adapter: change_config(adapter, target_modules=["c_attn"]), "No modules were targeted"),
        (lambda adapter: change_config(adapter, target_modules=["k_proj", "v_proj"]), "the adapter lacks .*v_proj"),
        (lambda adapter: change_config(adapter, base_model_name_or_path="/nowhere/base"), "/nowhere/base is not here"),
        (lambda adapter: change_config(adapter, base_model_name_or_path=None), "names no base model"),
        (lambda adapter: change_config(adapter, task_type=None), "which head"),
        (lambda adapter: change_config(adapter, peft_type="SOMETHING"), "cannot be read"),
        (lambda adapter: (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin"), "pickled"),
        (lambda adapter: (adapter / "adapter_config.json").unlink(), "holds no adapter"),
    ],
    ids=["vocabulary", "shape", "names", "missing", "no-base", "unnamed-base", "head", "kind", "pickle", "no-adapter"],
)
def test_what_does_not_belong_together_is_refused_before_any_weight_is_loaded(tmp_path, tokenizer, monkeypatch, spoil, message):
    adapter = save_adapter(tmp_path, llama(), tokenizer, lora("k_proj", modules_to_save=["embed_tokens"]))
    spoil(adapter)
    monkeypatch.setattr(reload, "load", None)
    with pytest.raises(RecipeError, match=message):
        merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("status", "code", "message"), [("preempted", 75, "continue it with --resume"), ("failed", 9, "gave other outputs")])
def test_a_run_without_a_verified_model_is_refused(tmp_path, tokenizer, status, code, message):
    (tmp_path / "run").mkdir()
    save_adapter(tmp_path, llama(), tokenizer, lora("q_proj")).rename(tmp_path / "run" / "model")
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"status": status, "exit_code": code, "artifact": {}}))
    with pytest.raises(RecipeError, match=message):
        merge(tmp_path / "run", tmp_path / "out")


def test_the_merged_model_ends_where_the_adapter_learned_to(tmp_path, tokenizer):
    adapter = save_adapter(tmp_path, llama(), tokenizer, lora("q_proj"))
    transformers.GenerationConfig(eos_token_id=[2, 7]).save_pretrained(adapter)
    merge(adapter, tmp_path / "out")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, 7]


def test_prompts_cannot_be_merged(tmp_path, tokenizer):
    adapter = save_adapter(tmp_path, llama(), tokenizer, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(RecipeError, match="PROMPT_TUNING adapter cannot be merged"):
        merge(adapter, tmp_path / "out")


def test_a_whole_model_has_nothing_to_merge(tmp_path, tokenizer):
    llama().save_pretrained(tmp_path / "run" / "model")
    with pytest.raises(RecipeError, match="nothing to merge: it holds a whole model"):
        merge(tmp_path / "run" / "model", tmp_path / "out")
    (tmp_path / "run" / "manifest.json").write_text('{"status": "finished"}')
    with pytest.raises(RecipeError, match="nothing to merge: this run saved a whole model"):
        merge(tmp_path / "run", tmp_path / "out")


def test_a_merge_that_dies_leaves_nothing_that_loads(tmp_path, tokenizer, monkeypatch):
    adapter, out = save_adapter(tmp_path, llama(), tokenizer, lora("q_proj")), tmp_path / "out"

    def die(*_):
        assert [path.name for path in out.iterdir()] == [".draft"]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(verify, "check", die)
        with pytest.raises(KeyboardInterrupt):
            merge(adapter, out)
    (out / ".draft").mkdir(exist_ok=True)  # as a kill -9 leaves it
    (out / ".draft" / "model.safetensors").write_text("half")
    merge(adapter, out)
    assert "config.json" in (names := {path.name for path in out.iterdir()})
    assert ".draft" not in names


def test_a_non_empty_output_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not empty"):
        merge(tmp_path / "adapter", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


# --- several adapters -----------------------------------------------------------------------------


def two_adapters(tmp_path, base, tokenizer, config, auto_class="AutoModelForCausalLM", **kwargs):
    """Two adapters on one stored base, with other weights each."""
    made = []
    for seed in (1, 2):
        if seed == 1:
            save_adapter(tmp_path, base, tokenizer, config, auto_class, **kwargs)
            torch.manual_seed(7)
            model = peft.get_peft_model(getattr(transformers, auto_class).from_pretrained(tmp_path / "base", **kwargs), config)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = 0.1 * torch.randn(parameter.shape)
        model.save_pretrained(tmp_path / f"adapter-{seed}")
        made.append(tmp_path / f"adapter-{seed}")
    return made


def state(directory, auto_class="AutoModelForCausalLM"):
    return getattr(transformers, auto_class).from_pretrained(directory).state_dict()


def test_several_adapters_are_a_weighted_sum_of_their_updates(tmp_path, tokenizer):
    adapters = two_adapters(tmp_path, llama(), tokenizer, lora("q_proj", "down_proj"))
    alone = []
    for number, adapter in enumerate(adapters):
        merge(adapter, tmp_path / f"alone-{number}")
        alone.append(state(tmp_path / f"alone-{number}"))
    base = state(tmp_path / "base")
    for number, weights in enumerate(([1.0, 0.0], [0.75, -0.5], None)):
        result = combine(adapters, weights, tmp_path / f"both-{number}")
        first, second = weights or (0.5, 0.5)
        assert result["adapters"] == {str(adapters[0]): first, str(adapters[1]): second}
        assert result["verification"]["max_difference"] <= result["verification"]["tolerance"]
        for name, value in state(tmp_path / f"both-{number}").items():
            expected = base[name] + first * (alone[0][name] - base[name]) + second * (alone[1][name] - base[name])
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_new_heads_become_their_weighted_mean(tmp_path, tokenizer):
    auto = "AutoModelForSequenceClassification"
    config = lora("q_proj", task_type="SEQ_CLS", modules_to_save=["score"])
    adapters = two_adapters(tmp_path, llama().model, tokenizer, config, auto, num_labels=3, pad_token_id=0)
    combine(adapters, [3.0, 1.0], tmp_path / "both")
    heads = [load_file(adapter / "adapter_model.safetensors")["base_model.model.score.weight"] for adapter in adapters]
    torch.testing.assert_close(state(tmp_path / "both", auto)["score.weight"], 0.75 * heads[0] + 0.25 * heads[1], rtol=0, atol=1e-6)
    with pytest.raises(RecipeError, match="sum to 0"):
        combine(adapters, [1.0, -1.0], tmp_path / "nothing")


def test_adapters_that_do_not_go_together_are_refused(tmp_path, tokenizer):
    adapters = two_adapters(tmp_path, llama(), tokenizer, lora("q_proj"))
    with pytest.raises(RecipeError, match="3 weights for 2 adapters"):
        combine(adapters, [1, 2, 3], tmp_path / "out")
    with pytest.raises(RecipeError, match="finite"):
        combine(adapters, [1, float("nan")], tmp_path / "out")
    shutil.copytree(tmp_path / "base", tmp_path / "other")
    config = json.loads((adapters[1] / "adapter_config.json").read_text())
    (adapters[1] / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "other")}))
    with pytest.raises(RecipeError, match=r"do not belong to one base \(base: .*base and .*other\)"):
        combine(adapters, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
