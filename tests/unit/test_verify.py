"""Verification: an honest save passes at no difference, and any one changed element anywhere is seen."""

import json
import subprocess
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ftkit import reload, verify
from ftkit.errors import OutOfMemory, VerificationFailed
from ftkit.recipe.spec import TrainedTokenizer
from ftkit.tokenizer import train_tokenizer

CAUSAL = {"loads_with": "transformers", "auto_class": "AutoModelForCausalLM", "base": None, "revision": None, "load_kwargs": {"dtype": "float32"}}
LABELS = {"num_labels": 3, "id2label": {"0": "no", "1": "maybe", "2": "yes"}}


@pytest.fixture(scope="module")
def tokenizer():
    spec = TrainedTokenizer(train="data", kind="bpe", vocab_size=300)
    return train_tokenizer(spec, [f"the cat number {i} sat on the mat and saw {i * 7} rats" for i in range(50)])


def llama_config(tokenizer, **extra):
    return transformers.LlamaConfig(
        vocab_size=len(tokenizer) + 4,  # rows that no token ever reads
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **extra,
    )


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(llama_config(tokenizer, tie_word_embeddings=True)).eval()


def rows(tokenizer, count=3):
    return [{"input_ids": torch.tensor(tokenizer(f"{'the cat ' * (i + 1)}sat")["input_ids"])} for i in range(count)]


@pytest.fixture
def saved(tmp_path, model, tokenizer):
    """A directory as a run writes it, and what a fresh load of it must give."""
    directory = tmp_path / "model"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory, verify.capture(model, tokenizer, rows(tokenizer), directory, CAUSAL)


def test_an_honest_save_gives_the_same_outputs_in_a_fresh_process(saved):
    directory, expected = saved
    before = sorted(directory.iterdir())
    result = verify.check(directory, CAUSAL, expected)
    assert result["max_difference"] <= result["tolerance"] / 100
    assert result["rows"] == 3
    assert sorted(directory.iterdir()) == before


def test_what_an_architecture_keeps_in_float32_is_so_in_float16(tmp_path, tokenizer):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "whole")
    artifact = CAUSAL | {"auto_class": "AutoModelForSeq2SeqLM", "load_kwargs": {"dtype": "float16"}}
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "whole", dtype=torch.float16)
    model.save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    expected = verify.capture(model, tokenizer, rows(tokenizer), tmp_path / "half", artifact)
    assert {parameter.dtype for name, parameter in model.named_parameters() if ".wo." in name} == {torch.float32}
    assert verify.check(tmp_path / "half", artifact, expected)["max_difference"] == 0


def test_an_adapter_with_a_float32_head_on_a_bfloat16_base_passes(tmp_path, tokenizer):
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(llama_config(tokenizer)).save_pretrained(tmp_path / "base")
    kwargs = {"dtype": "bfloat16", **LABELS}
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=torch.bfloat16, num_labels=3)
    base.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    artifact = {
        "loads_with": "peft",
        "auto_class": "AutoModelForSequenceClassification",
        "base": str(tmp_path / "base"),
        "revision": None,
        "load_kwargs": kwargs,
    }
    expected = verify.capture(model, tokenizer, rows(tokenizer), tmp_path / "model", artifact)
    result = verify.check(tmp_path / "model", artifact, expected)
    assert result["max_difference"] <= result["tolerance"] / 100


def test_a_quantised_base_is_quantised_alike_in_a_fresh_process(tmp_path, model, tokenizer, verify_here):
    pytest.importorskip("bitsandbytes")
    model.save_pretrained(tmp_path / "base")
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"}
    artifact = CAUSAL | {"loads_with": "peft", "base": str(tmp_path / "base"), "load_kwargs": {"dtype": "float32", "quantization_config": settings}}
    base = reload.load_base(tmp_path / "model", artifact, "cpu")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    expected = verify.capture(adapted, tokenizer, rows(tokenizer), tmp_path / "model", artifact)
    assert verify.check(tmp_path / "model", artifact, expected)["max_difference"] == 0


def change_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def change_tensor(path, name, index):
    tensors = load_file(path)
    tensors[name].view(-1)[index] += 1e-3
    save_file(tensors, path, {"format": "pt"})


CHANGES = {
    "model.safetensors": lambda path: change_tensor(path, "model.layers.1.mlp.down_proj.weight", 5),
    "config.json": lambda path: change_json(path, lambda value: value.update(rms_norm_eps=1.1e-6)),
    "generation_config.json": lambda path: change_json(path, lambda value: value.update(eos_token_id=7)),
    "tokenizer.json": lambda path: change_json(path, lambda value: value["model"]["merges"].pop(0)),
    "tokenizer_config.json": lambda path: change_json(path, lambda value: value.update(model_max_length=17)),
    "chat_template.jinja": lambda path: path.write_text(path.read_text() + " "),
}


def test_there_is_a_change_for_every_saved_file(saved):
    directory, expected = saved
    assert set(expected.files) == set(CHANGES) == {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("name", CHANGES)
def test_one_changed_element_in_any_file_is_seen(saved, verify_here, name):
    directory, expected = saved
    CHANGES[name](directory / name)
    with pytest.raises(VerificationFailed, match=name) as raised:
        verify.check(directory, CAUSAL, expected)
    assert raised.value.code == 9
    assert not (directory / verify.WORKPLACE).exists()


def test_one_changed_element_of_an_adapter_is_seen(tmp_path, model, tokenizer, verify_here):
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    directory = tmp_path / "model"
    adapted.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    artifact = CAUSAL | {"loads_with": "peft", "base": str(tmp_path / "base")}
    expected = verify.capture(adapted, tokenizer, rows(tokenizer), directory, artifact)
    verify.check(directory, artifact, expected)
    config = (directory / "adapter_config.json").read_text()
    change_json(directory / "adapter_config.json", lambda value: value.update(lora_alpha=9))
    with pytest.raises(VerificationFailed, match="adapter_config"):
        verify.check(directory, artifact, expected)
    (directory / "adapter_config.json").write_text(config)
    # While lora_B is zero, lora_A changes no output: only its digest tells.
    change_tensor(directory / "adapter_model.safetensors", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", 3)
    with pytest.raises(VerificationFailed, match=r"tensor .*layers\.0\.self_attn\.q_proj\.lora_A\.default\.weight differs"):
        verify.check(directory, artifact, expected)


def written_so(directory, expected):
    """The files are digested again, as if the save itself had gone wrong."""
    expected.files = verify.file_digests(directory)
    return expected


def test_a_wrongly_saved_tensor_is_named_even_where_no_output_depends_on_it(saved, verify_here):
    directory, expected = saved
    change_tensor(directory / "model.safetensors", "model.embed_tokens.weight", -1)
    with pytest.raises(VerificationFailed, match=r"tensor model\.embed_tokens\.weight differs"):
        verify.check(directory, CAUSAL, written_so(directory, expected))


def test_a_wrongly_saved_weight_tells_rows_and_size_of_the_difference(saved, verify_here):
    directory, expected = saved
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationFailed, match=r"row 0: logits differ by 0\.\d+, more than"):
        verify.check(directory, CAUSAL, written_so(directory, expected))


def test_a_wrongly_saved_tokenizer_or_label_is_seen(saved, verify_here):
    directory, expected = saved
    CHANGES["tokenizer.json"](directory / "tokenizer.json")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    change_json(directory / "config.json", lambda value: value.update(id2label={"0": "other", "1": "names"}))
    with pytest.raises(VerificationFailed) as raised:
        verify.check(directory, CAUSAL, written_so(directory, expected))
    for part in ("token ids", "chat template", "labels"):
        assert f"the {part} differ" in str(raised.value)


def test_a_model_that_does_not_load_fails_with_the_reason(saved, verify_here):
    directory, expected = saved
    (directory / "config.json").unlink()
    with pytest.raises(VerificationFailed, match=r"cannot be loaded: .*config"):
        verify.check(directory, CAUSAL, expected)


def test_a_killed_process_is_a_lack_of_memory(saved, monkeypatch):
    directory, expected = saved
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-9, stderr=""))
    with pytest.raises(OutOfMemory):
        verify.check(directory, CAUSAL, expected)
    assert not (directory / verify.WORKPLACE).exists()


def test_not_a_number_is_a_difference():
    value = {"row 0: logits": torch.zeros(1, 2)}
    assert verify.compare(value, {"row 0: logits": torch.tensor([[0.0, float("nan")]])}, 1.0)[1]
    assert verify.compare(value, {}, 1.0)[1]
    assert verify.compare(value, value, 0.0) == (0.0, [])


class Lengths:
    """Features as `choose` sees them: 40 rows of 1 to 40 tokens, the label changes every 20 rows."""

    lengths = np.arange(40, 0, -1)

    def get(self, index):
        ids = np.arange(self.lengths[index], dtype=np.int32)
        return {"input_ids": ids, "token_type_ids": None, "targets": np.array([index // 20]), "texts": np.array([len(ids)])}


def test_chosen_rows_are_short_to_long_with_all_targets():
    chosen = verify.choose(Lengths(), 8)
    lengths = [len(row["input_ids"]) for row in chosen]
    assert len(chosen) == 8
    assert lengths == sorted(lengths)
    assert lengths[0] <= 5
    assert lengths[-1] > 35
