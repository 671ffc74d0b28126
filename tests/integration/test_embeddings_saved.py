"""What a run of embeddings leaves is read by its files alone: a model of transformers, and JSON that says how its states are pooled."""

import json

import pytest
import torch
import transformers

TEXTS = ["roses and tulips", "two nets near the quiet tide of the harbour", "bread"]
MODES = {"pooling_mode_mean_tokens", "pooling_mode_cls_token", "pooling_mode_lasttoken"}
RUNS = {  # model, settings of the task, method
    "mean": ("bert", {}, "full"),
    "cls, normalized": ("distilbert", {"pooling": "cls", "normalize": True}, "lora"),
    "last, normalized": ("gpt2", {"pooling": "last", "normalize": True}, "bitfit"),
}


def read(directory, texts):
    """[n, H], text by text."""
    steps = json.loads((directory / "modules.json").read_text())
    settings = json.loads((directory / steps[1]["path"] / "config.json").read_text())
    model, tokenizer = (auto.from_pretrained(directory) for auto in (transformers.AutoModel, transformers.AutoTokenizer))
    (mode,) = (name for name, on in settings.items() if on is True)
    assert mode in MODES
    found = []
    for text in texts:
        with torch.no_grad():
            states = model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        assert settings["word_embedding_dimension"] == states.shape[1]
        found.append(states.mean(0) if "mean" in mode else states[0 if "cls" in mode else -1])
    kinds = [step["type"].rpartition(".")[2] for step in steps]
    assert kinds in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
    return torch.nn.functional.normalize(torch.stack(found), dim=-1) if "Normalize" in kinds else torch.stack(found)


@pytest.mark.parametrize("name", RUNS)
def test_its_files_tell_how_embeddings_are_made(name, ftkit, recipe, tmp_path, verify_here):
    model, settings, method = RUNS[name]
    done = ftkit("train", recipe(model, "matched", {"steps": 2}, task={"kind": "sentence-embedding"} | settings, method=method))
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["layout"] == "flat"
    said = ftkit("predict", tmp_path / "run", *TEXTS)
    assert said.code == 0, said.err
    embeddings = torch.tensor([json.loads(line)["embedding"] for line in said.out.splitlines()])
    directory = tmp_path / "run" / "model"
    if method != "full":
        done = ftkit("merge-adapter", tmp_path / "run", "-o", tmp_path / "merged")
        assert done.code == 0, done.err
        directory = tmp_path / "merged"
    torch.testing.assert_close(read(directory, TEXTS), embeddings, rtol=1e-4, atol=1e-5)


def test_predict_takes_texts_and_pairs_of_a_file(ftkit, recipe, tmp_path, verify_here):
    assert ftkit("train", recipe("bert", "matched", {"steps": 2})).code == 0
    for name, lines, keys in (
        ("texts.csv", "anchor\nroses\nold boats\n", {"row", "embedding"}),
        ("pairs.csv", "anchor,positive\nroses,tulips\n", {"row", "similarity"}),
    ):
        (tmp_path / name).write_text(lines)
        done = ftkit("predict", tmp_path / "run", "--file", tmp_path / name)
        assert done.code == 0, done.err
        assert all(json.loads(line).keys() == keys for line in done.out.splitlines())
        assert len(done.out.splitlines()) == len(lines.splitlines()) - 1


def test_parts_of_a_batch_are_told(ftkit, recipe, verify_here):
    done = ftkit("train", recipe("bert", "matched", {"steps": 2, "accumulate": 2}))
    assert done.code == 0, done.err
    assert "rows learn from those of the whole batch: each of its 2 parts is computed twice" in done.err
