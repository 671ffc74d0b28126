"""Words that are worth a token, and tokens that a stored model learns beside its own."""

import json

import pytest
import torch
import transformers

from ftkit import model, vocabulary
from ftkit.errors import DataError, RecipeError
from ftkit.methods.full import Full
from ftkit.recipe.spec import AddedTokens, Model
from ftkit.sources import locate
from ftkit.tasks.causal_lm import CausalLM
from ftkit.tasks.masked_lm import MaskedLM

TEXT = "the unfathomable and the old unfathomable near the harbour\n" * 6 + "Unfathomable zeppelin zeppelin quokka\n" * 2


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.mark.parametrize(("name", "token"), [("bert-masked", "unfathomable"), ("llama", " unfathomable")])
def test_words_that_take_most_tokens_are_proposed_and_the_gain_is_seen(name, token, checkpoint, corpus):
    found = vocabulary.propose(checkpoint(name), [corpus], size=3, least=3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint(name))
    assert found.tokens[0] == token
    assert found.words == len(TEXT.split())
    assert found.before == pytest.approx(len(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) / found.words)
    tokenizer.add_tokens([transformers.AddedToken(each, single_word=each[0] != " ") for each in found.tokens])
    assert found.after == pytest.approx(len(tokenizer(TEXT, add_special_tokens=False)["input_ids"]) / found.words)
    assert found.after < 0.7 * found.before
    assert token.replace("unfathomable", "zeppelin") in found.tokens, "it is unknown to BERT's, and four letters and more to Llama's"
    assert not any("quokka" in each for each in found.tokens), "it occurs twice"


def test_the_command_writes_what_a_recipe_reads(checkpoint, corpus, ftkit, tmp_path):
    done = ftkit("vocab", checkpoint("bert-masked"), corpus, "--least", "5", "-o", tmp_path / "new.txt", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["tokens"] == vocabulary.listed(AddedTokens(file=str(tmp_path / "new.txt")))
    assert told["tokens_per_word"]["after"] < told["tokens_per_word"]["before"]
    assert "unfathomable" in ftkit("vocab", checkpoint("bert-masked"), corpus).out.splitlines()
    done = ftkit("vocab", checkpoint("bert-masked"), tmp_path / "gone.txt")
    assert (done.code, "there is no file" in done.err) == (3, True)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["zeppelin", "garden", "Harbour"], r"one token each already, so leave them out: 'garden', 'Harbour'"),
        (["zeppelin", "quokka", "zeppelin"], "named more than once: 'zeppelin'"),
        (["zeppelin", "\ufe0f"], "nothing to the tokenizer: "),
    ],
)
def test_tokens_that_cannot_be_added_are_named(tokens, message, checkpoint):
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint("bert"))
    with pytest.raises(RecipeError, match=message):
        vocabulary.add(tokenizer, AddedTokens(tokens=tokens))
    with pytest.raises(DataError, match=r"model\.add_tokens\.file: there is no file gone\.txt"):
        vocabulary.add(tokenizer, AddedTokens(file="gone.txt"))


def loaded(checkpoint, task, **added):
    """A model with tokens added, its tokenizer, and the model without."""
    spec = Model(name=checkpoint, add_tokens=AddedTokens(**added))
    source = locate(spec)
    tokenizer = model.load_tokenizer(spec, source, None, ())
    base = model.load(spec, source, model.load_config(spec, source), tokenizer, task, Full(), torch.float32, 3, torch.device("cpu"))
    return base, tokenizer, getattr(transformers, task.auto_class).from_pretrained(checkpoint)


@pytest.mark.parametrize("init", ["subwords", "mean", "noise"])
@pytest.mark.parametrize(("name", "task"), [("bert-masked", MaskedLM()), ("llama", CausalLM()), ("gpt2", CausalLM())])
def test_new_rows_begin_as_asked_and_old_ones_stay(name, task, init, checkpoint):
    base, tokenizer, plain = loaded(checkpoint(name), task, tokens=["zeppelin", "quokka"], init=init)
    before = transformers.AutoTokenizer.from_pretrained(checkpoint(name))
    size = plain.get_input_embeddings().num_embeddings
    assert base.added == [len(before), len(before) + 1] == tokenizer.convert_tokens_to_ids(["zeppelin", "quokka"])
    assert base.model.config.vocab_size == base.model.get_input_embeddings().num_embeddings == size + 2
    assert not base.stored
    for part in ("get_input_embeddings", "get_output_embeddings"):
        for new, old in zip(getattr(base.model, part)().parameters(), getattr(plain, part)().parameters(), strict=True):
            assert torch.equal(new[:size], old)
            for token in ("zeppelin", "quokka"):
                row = new[tokenizer.convert_tokens_to_ids(token)]
                if init == "subwords":
                    torch.testing.assert_close(row, old[before(token, add_special_tokens=False)["input_ids"]].mean(0))
                elif init == "mean":
                    torch.testing.assert_close(row, old.mean(0))
                else:
                    assert ((row - old.mean(0)).abs() <= 5 * old.std(0)).all()
                    assert not torch.equal(row, old.mean(0)) or not old.std(0).any()
    tied = plain.get_input_embeddings().weight is plain.get_output_embeddings().weight
    assert (base.model.get_input_embeddings().weight is base.model.get_output_embeddings().weight) == tied
    ids = before("boats near roses", return_tensors="pt")["input_ids"]
    torch.testing.assert_close(base.model.eval()(input_ids=ids).logits[..., :size], plain.eval()(input_ids=ids).logits)


def test_a_head_that_does_not_grow_is_refused(tokenizers):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 160}
    built = transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(**sizes, legacy=False))
    with pytest.raises(RecipeError, match="the head of DebertaV2ForMaskedLM does not grow with its vocabulary"):
        vocabulary.grow(built, tokenizers["wordpiece"], AddedTokens(tokens=["zeppelin"]))


RUNS = {
    "full": ("bert-masked", "masked", "full"),
    "lora": ("llama", "prompts", {"kind": "lora", "r": 4}),
    "partial": ("bert", "single", {"kind": "partial", "last": 1, "embeddings": True}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns_new_tokens_and_its_artefact_knows_them(name, ftkit, recipe, checkpoint, tmp_path, verify_here):
    architecture, rows, method = RUNS[name]
    added = {"tokens": ["zeppelin", "quokka"], "init": "noise"}
    path = recipe({"name": checkpoint(architecture), "add_tokens": added}, rows, method=method)
    for arguments in (["check", path], ["show", path], ["train", path, "--smoke"], ["train", path]):
        done = ftkit(*arguments)
        assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["verification"]["max_difference"] <= manifest["verification"]["tolerance"]
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert saved.tokenize("zeppelin quokka")[0] == "zeppelin"
    size = len(transformers.AutoTokenizer.from_pretrained(checkpoint(architecture)))
    assert saved.convert_tokens_to_ids(["zeppelin", "quokka"]) == [size, size + 1]
    assert (tmp_path / "run" / "model" / "base").is_dir() == (name == "lora")
    if name == "lora":
        size = sum(file.stat().st_size for file in (tmp_path / "run" / "model").glob("adapter_model*"))
        assert size < 0.5 * (tmp_path / "run" / "model" / "base" / "model.safetensors").stat().st_size
        merged = ftkit("merge-adapter", tmp_path / "run", "-o", tmp_path / "merged")
        assert merged.code == 0, merged.err
    assert ftkit("eval", tmp_path / "run").code == 0
    again = ftkit("train", recipe({"name": str(tmp_path / "run"), "add_tokens": added}, rows, method=method, output=str(tmp_path / "next")))
    assert (again.code, "one token each already, so leave them out: 'zeppelin', 'quokka'" in again.err) == (2, True)


@pytest.mark.parametrize(
    ("architecture", "rows", "method", "message"),
    [
        ("bert", "single", "bitfit", r"model\.add_tokens: method bitfit freezes the embeddings"),
        ("llama", "prompts", "qlora", r"where no tokens can be added; train these first"),
        ("bert-masked", "masked", "lora", r"model\.add_tokens: the head of BertForMaskedLM has a bias.* use method: full"),
    ],
)
def test_methods_that_would_learn_nothing_of_them_are_refused(architecture, rows, method, message, ftkit, recipe, checkpoint):
    import re

    path = recipe({"name": checkpoint(architecture), "add_tokens": {"tokens": ["zeppelin"]}}, rows, method=method)
    for command in ("check", "train"):
        done = ftkit(command, path)
        assert (done.code, bool(re.search(message, done.err))) == (2, True), done.err
