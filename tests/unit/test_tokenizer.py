"""Tokenizers trained from nothing."""

import pytest
from transformers import AutoTokenizer, LlamaConfig

from ftkit.errors import DataError, RecipeError
from ftkit.recipe.spec import TrainedTokenizer
from ftkit.tokenizer import CHAT_TEMPLATE, train_tokenizer

NOUNS = ["fox", "bird", "river", "child", "teacher", "garden", "letter", "window", "winter", "summer", "kitchen", "bridge", "engine", "harbour"]
VERBS = ["runs", "flies", "sings", "waits", "wanders", "listens", "answers", "returns"]
TEXTS = [f"The {noun} {verb} over the {place}, quietly {verb}ing again.\n" for noun in NOUNS for verb in VERBS for place in NOUNS[::3]]
UNSEEN = "Xylophon 漢字 안녕 🙂\n\n  two spaces\tand a tab \x00 q"
SIZES = {"bpe": 340, "unigram": 270, "wordpiece": 120}


def trained(kind, **options):
    return train_tokenizer(TrainedTokenizer(train="data", kind=kind, vocab_size=SIZES[kind], **options), TEXTS)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_bytes_give_back_every_text(kind):
    tokenizer = trained(kind)
    for text in (*TEXTS[:3], UNSEEN):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.unk_token is None


@pytest.mark.parametrize("kind", SIZES)
def test_the_vocabulary_has_the_size_asked_for(kind):
    assert len(trained(kind)) == SIZES[kind]


@pytest.mark.parametrize("kind", SIZES)
def test_the_same_text_gives_the_same_tokenizer(kind):
    """Each run of a trainer has hash maps with seeds of their own."""
    first, *others = [trained(kind)._tokenizer.to_str() for _ in range(4)]
    assert others == [first] * 3


@pytest.mark.parametrize("kind", SIZES)
def test_a_saved_tokenizer_loads_the_same(kind, tmp_path):
    tokenizer = trained(kind)
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig().save_pretrained(tmp_path)  # the model type beside it must not bring another tokenizer class
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded._tokenizer.to_str() == tokenizer._tokenizer.to_str()
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.chat_template == tokenizer.chat_template


def test_special_tokens_of_texts_and_chats():
    tokenizer = trained("bpe")
    ids = tokenizer.convert_tokens_to_ids(["<|pad|>", "<|eos|>", "<|im_start|>", "<|im_end|>"])
    assert ids == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    messages = [{"role": "user", "content": "a fox"}, {"role": "assistant", "content": " runs\n"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n runs\n<|im_end|>\n"
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_texts_may_end(kind):
    plain = trained(kind)
    ending = train_tokenizer(TrainedTokenizer(train="data", kind=kind, vocab_size=SIZES[kind]), TEXTS, ending=True)
    one, two, end = (plain(text)["input_ids"] for text in ("a fox", "a bird", "<|eos|>"))
    assert ending("a fox")["input_ids"] == one + end
    assert ending("a fox", "a bird")["input_ids"] == one + end + two + end


def test_wordpiece_is_like_berts():
    tokenizer = trained("wordpiece")
    encoded = tokenizer("The FOX", "a bird", return_token_type_ids=True)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens[0] == "[CLS]"
    assert tokens[-1] == "[SEP]"
    second = tokens.index("[SEP]") + 1
    assert encoded["token_type_ids"] == [0] * second + [1] * (len(tokens) - second)
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == "the fox a bird"
    assert tokenizer("漢")["input_ids"] == [tokenizer.cls_token_id, tokenizer.unk_token_id, tokenizer.sep_token_id]
    assert not any(token.content.startswith("##") for token in tokenizer.added_tokens_decoder.values())


def test_rare_characters_leave_room_for_words(monkeypatch):
    letters = {c for text in TEXTS for c in text.lower() if not c.isspace()}
    monkeypatch.setattr("ftkit.tokenizer.MAX_ALPHABET", len(letters))
    crowded = [*TEXTS, "漢字 漢字"]
    vocabulary = train_tokenizer(TrainedTokenizer(train="data", kind="wordpiece", vocab_size=120), crowded).get_vocab()
    assert letters <= vocabulary.keys()
    assert not {"漢", "字", "##字"} & vocabulary.keys()
    assert "the" in vocabulary


@pytest.mark.parametrize("kind", SIZES)
def test_too_little_text_says_how_many_tokens_there_are(kind):
    with pytest.raises(DataError, match=r"the text gives (\d+) tokens, fewer than vocab_size: 9000; give more text, or vocab_size: \1"):
        train_tokenizer(TrainedTokenizer(train="data", kind=kind, vocab_size=9000), TEXTS)


def test_more_characters_than_tokens():
    letters = ["".join(chr(0x430 + i) for i in range(32)) * 2, "abcdefghijklmnopqrstuvwxyz" * 2]
    with pytest.raises(DataError, match=r"the characters of the text alone give (\d+) tokens, more than vocab_size: 70; give vocab_size: \1 or more"):
        train_tokenizer(TrainedTokenizer(train="data", kind="wordpiece", vocab_size=70), letters)


@pytest.mark.parametrize("kind", SIZES)
def test_no_text_at_all(kind):
    with pytest.raises(DataError, match="the text gives"):
        train_tokenizer(TrainedTokenizer(train="data", kind=kind, vocab_size=300), [])


def test_a_vocabulary_too_small_for_bytes():
    with pytest.raises(RecipeError, match="256 bytes and 4 special tokens"):
        train_tokenizer(TrainedTokenizer(train="data", vocab_size=200), TEXTS)
