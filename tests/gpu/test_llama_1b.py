"""Every method on a Llama of one billion parameters, beside bfloat16 weights and in NF4: memory and speed.  scripts/test-gpu runs these."""

import gc
import json

import pytest
import torch
import transformers

from ftkit import architectures

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LLAMA_1B = {  # Llama 3.2 1B
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
ROWS, WORDS = 64, 300


@pytest.fixture(scope="module")
def base(tokenizers, tmp_path_factory):
    """A directory with random bfloat16 weights, and a tokenizer that knows a small part of the vocabulary."""
    tokenizer = tokenizers["bpe"]
    ids = {key: getattr(tokenizer, key) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_1B, **ids, dtype="bfloat16"))
    directory = tmp_path_factory.mktemp("llama-1b")
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return directory


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Rows of about a thousand tokens."""
    path = tmp_path_factory.mktemp("texts") / "train.jsonl"
    words = ["the", "old", "boats", "near", "our", "quiet", "harbour", "and", "many", "small", "lamps", "under", "two", "ropes"]
    rows = [{"text": " ".join(words[(row * 7 + place * place) % len(words)] for place in range(WORDS - row))} for row in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def table():
    """What the runs took, printed when all are done."""
    found: list[tuple[str, ...]] = []
    yield found
    print(f"\n{torch.cuda.get_device_name()}, Llama of 1B, batches of 8 rows of {WORDS} words at most\n")
    print("| method | weights | trainable | peak memory MB | tokens/s |\n| --- | --- | --- | --- | --- |")
    for row in found:
        print("| " + " | ".join(row) + " |")


# Beside float weights and in 4 bits; a Llama has no biases, and the head of this one is its input embedding.
METHODS = {name: method for name, method in architectures.methods().items() if method.kind not in ("bitfit", "head")}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_on_a_llama_of_1b(name, base, texts, table, recipe, ftkit, tmp_path):
    method = METHODS[name]
    settings = method.model_dump(exclude_defaults=True) | {"kind": method.kind}
    torch.cuda.reset_peak_memory_stats()
    train = {"steps": 12, "precision": "bf16", "log_every": 4, "eval_every": 1000, "save_every": 1000}
    done = ftkit("train", recipe({"name": str(base)}, "text", train, method=settings, data={"train": str(texts), "max_length": 1024}))
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "tokens_per_second" in line]
    assert manifest["layout"] == "flat"
    assert manifest["verification"]["max_difference"] <= manifest["verification"]["tolerance"]
    speed, memory = steps[-1]["tokens_per_second"], steps[-1]["peak_memory_bytes"]
    table.append(
        (
            method.kind,
            "NF4" if getattr(method, "bits", None) else "bfloat16",
            f"{manifest['parameters']['trainable']:,}",
            f"{memory / 1e6:,.0f}",
            f"{speed:,.0f}",
        )
    )
