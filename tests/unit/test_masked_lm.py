"""Which tokens are hidden, and behind what; how lines become inputs; what fills masks."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers

from ftkit import prompts
from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet, encode
from ftkit.data.types import Features, Limits, Row, RowError, Scores
from ftkit.errors import DataError, RecipeError
from ftkit.recipe.spec import Generation
from ftkit.tasks.masked_lm import MaskedLM
from ftkit.tasks.masking import Masking
from ftkit.tasks.packing import Frame, packed

WIDE = Limits(96, "right")
MASK, OTHERS = 4, np.arange(100, 120)
TEXT = "unfathomable roses tulips and compost\nnear the harbour lamps\n\nbread"


def row(text, number=1):
    return Row({"text": text}, "rows.jsonl", number)


def masking(unit="token", probability=0.15, mask=0.8, random=0.1):
    return Masking(probability, unit, mask, random, MASK, OTHERS)


def example(words: list[int], special=()):
    """Tokens 1000, 1001, ... of words of these lengths; at the places in `special` nothing can be hidden."""
    begins = {sum(words[:number]) for number in range(len(words))}
    ids = np.arange(1000, 1000 + sum(words), dtype=np.int32)
    weights = np.array([float(place not in special) for place in range(len(ids))], np.float32)
    return {"input_ids": ids, "targets": np.array([i if place in begins else ~i for place, i in enumerate(ids)]), "weights": weights, "token_type_ids": None}


def drawn(masking, given, count=200):
    """Hidden examples by as many generators, and the given one as it was."""
    before = {name: None if value is None else value.copy() for name, value in given.items()}
    found = [masking(given, np.random.default_rng((7, seed))) for seed in range(count)]
    assert all(np.array_equal(before[name], given[name]) for name in ("input_ids", "targets", "weights")), "views of a set must not change"
    return found


def spans_of(weights) -> list[tuple[int, int]]:
    """Runs of hidden tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], weights > 0, [0])).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


class TestMasking:
    @pytest.mark.parametrize(("tokens", "expected"), [(1, 1), (3, 1), (10, 2), (100, 15), (510, 76)])
    def test_a_share_is_hidden_and_one_at_least(self, tokens, expected):
        for found in drawn(masking(), example([1] * tokens), 20):
            assert found["weights"].sum() == expected
            assert np.array_equal(found["targets"], np.arange(1000, 1000 + tokens))

    def test_hidden_tokens_are_replaced_as_asked_and_others_stay(self):
        counts, total = Counter(), 0
        for found in drawn(masking(), example([1] * 200)):
            hidden = found["weights"] > 0
            assert np.array_equal(found["input_ids"][~hidden], found["targets"][~hidden])
            seen, was = found["input_ids"][hidden], found["targets"][hidden]
            counts.update(mask=int((seen == MASK).sum()), random=int(np.isin(seen, OTHERS).sum()), kept=int((seen == was).sum()))
            total += len(seen)
        assert sum(counts.values()) == total == 200 * 30
        for name, share in {"mask": 0.8, "random": 0.1, "kept": 0.1}.items():
            assert abs(counts[name] / total - share) < 4 * (share * (1 - share) / total) ** 0.5, name

    def test_all_tokens_are_hidden_alike_often_and_special_ones_never(self):
        given = example([1] * 20, special=(0, 7, 19))
        often = sum(found["weights"] for found in drawn(masking(probability=0.3), given, 2000))
        assert not often[[0, 7, 19]].any()
        rest = np.delete(often, [0, 7, 19]) / 2000
        assert abs(rest - 5 / 17).max() < 4 * (0.3 * 0.7 / 2000) ** 0.5

    def test_words_are_hidden_whole_and_their_tokens_replaced_one_by_one(self):
        sizes = [1, 3, 2, 1, 4, 1, 2, 2, 1, 3] * 2
        starts = np.cumsum([0, *sizes])
        mixed = 0
        for found in drawn(masking("whole-word", probability=0.3), example(sizes)):
            hidden = found["weights"] > 0
            for start, stop in pairwise(starts):
                assert hidden[start:stop].all() or not hidden[start:stop].any()
                mixed += len(set((found["input_ids"] == MASK)[start:stop][hidden[start:stop]])) == 2
            assert hidden.sum() == 12, "the share is filled up with words that still fit"
        assert mixed

    def test_a_word_longer_than_the_share_is_hidden_where_there_is_no_other(self):
        for found in drawn(masking("whole-word"), example([4, 5]), 20):
            assert found["weights"].sum() in (4, 5)

    def test_spans_are_words_side_by_side_and_replaced_alike(self):
        sizes = [1, 2, 1, 3] * 10
        starts = np.cumsum([0, *sizes])
        for found in drawn(masking("span"), example(sizes, special=(25,)), 100):
            hidden = found["weights"] > 0
            assert not hidden[25]
            for start, stop in pairwise(starts):
                if not start <= 25 < stop:
                    assert hidden[start:stop].all() or not hidden[start:stop].any()
            assert hidden.sum() == round(0.15 * 69)

    def test_lengths_of_spans_are_those_of_spanbert(self):
        """Where hardly any two meet."""
        found = drawn(masking("span", 0.02), example([1] * 5000), 40)
        lengths = [stop - start for each in found for start, stop in spans_of(each["weights"])]
        counts = Counter(lengths)
        assert np.mean(lengths) == pytest.approx(3.8, abs=0.25)  # arXiv 1907.10529, 3.1
        assert counts[1] / len(lengths) == pytest.approx(0.2 / (1 - 0.8**10), abs=0.03)
        assert counts[10] / len(lengths) == pytest.approx(0.2 * 0.8**9 / (1 - 0.8**10), abs=0.02)

    def test_spans_that_are_replaced_are_replaced_whole(self):
        for found in drawn(masking("span", probability=0.3, mask=0.5, random=0.0), example([1] * 60, special=range(0, 60, 6)), 100):
            seen = (found["input_ids"] == MASK)[found["weights"] > 0]
            assert len(seen) == 15
        halves = [found for found in drawn(masking("span", 0.02, mask=0.5, random=0.0), example([1] * 400)) if len(spans_of(found["weights"])) == 1]
        whole = [{bool(x) for x in (found["input_ids"] == MASK)[found["weights"] > 0]} for found in halves]
        assert len(whole) > 20
        assert {len(each) for each in whole} <= {1, 2}
        assert sum(len(each) == 1 for each in whole) > 0.4 * len(whole), "two spans may lie side by side, but mostly it is one"

    def test_an_example_with_nothing_to_hide_stays(self):
        (found,) = drawn(masking(), example([1] * 3, special=(0, 1, 2)), 1)
        assert not found["weights"].any()
        assert found["input_ids"].tolist() == [1000, 1001, 1002]


@pytest.fixture
def features(tokenizers):
    """features(seed, **task): a set of rows of the tests' words, as `tokenise` gives it."""

    def make(seed=42, **fields):
        task, tokenizer = MaskedLM(**fields), tokenizers["wordpiece"]
        texts = ["roses and tulips in the old garden", "boats near the quiet tide", "bread and butter and soup", "ropes under the small lamps"]
        plain = FeatureSet.of([task.encode(row(text), tokenizer, WIDE) for text in texts])
        return replace(plain, corruption=task.corruption(plain, tokenizer, seed))

    return make


def masks(features, epoch, pad=0):
    return [{name: np.asarray(value).tolist() for name, value in features.get(i, epoch).items() if value is not None} for i in range(len(features))]


class TestCorruption:
    def test_masks_depend_on_seed_epoch_and_place_alone(self, features):
        assert masks(features(), 3) == masks(features(), 3)
        assert masks(features(), 3) != masks(features(), 4)
        assert masks(features(), 3) != masks(features(seed=1), 3)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        together = collate(features(), np.array([2, 0, 3]), 0, epoch=5)
        for place, index in enumerate((2, 0, 3)):
            alone = collate(features(), np.array([index]), 0, epoch=5)
            length = alone.input_ids.shape[1]
            assert torch.equal(together.input_ids[place, :length], alone.input_ids[0])
            assert torch.equal(together.weights[place, :length], alone.weights[0])
            assert not together.weights[place, length:].any()
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])

    def test_static_masks_are_those_of_the_first_epoch(self, features):
        assert masks(features(masking="static"), 7) == masks(features(masking="static"), 0) == masks(features(), 0)

    def test_what_is_kept_of_frozen_layers_is_for_inputs_that_stay(self, ftkit, recipe, checkpoint, verify_here):
        """A head learns on layers that are computed once, where masks are the same in each epoch; else they are computed anew."""
        said = {}
        for kind in ("static", "dynamic"):
            path = recipe("bert-masked", "masked", {"steps": 8}, method={"kind": "partial", "last": 1}, task={"kind": "masked-lm", "masking": kind})
            done = ftkit("train", path, "--overwrite")
            assert done.code == 0, done.err
            said[kind] = "are computed once for each row" in done.err
        assert said == {"static": True, "dynamic": False}


class TestEncode:
    def test_a_document_is_packed_by_lines_and_nothing_is_lost(self, tokenizers):
        tokenizer = tokenizers["wordpiece"]
        found = MaskedLM().encode(row(TEXT), tokenizer, Limits(16, "right"))
        lines = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in TEXT.splitlines() if line]
        assert [token for each in found for token in each.input_ids[1:-1]] == [token for line in lines for token in line]
        assert all(len(each.input_ids) <= 16 for each in found)
        assert all((each.input_ids[0], each.input_ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id) for each in found)
        assert all(each.weights == [0.0, *[1.0] * (len(each.input_ids) - 2), 0.0] and each.targets == each.input_ids for each in found)
        assert all(each.truncated == 0 and each.token_type_ids == [0] * len(each.input_ids) for each in found)
        (whole,) = MaskedLM().encode(row(TEXT), tokenizer, WIDE)
        assert whole.input_ids == tokenizer(TEXT)["input_ids"], "BERT takes a line break for a space"

    def test_a_row_longer_than_the_model_is_cut_at_words(self, tokenizers):
        tokenizer = tokenizers["wordpiece"]
        text = "unfathomable harbour compost unfathomable harbour lamps"
        found = MaskedLM(packing="lines", unit="whole-word").encode(row(text), tokenizer, Limits(18, "right"))
        ids = tokenizer(text, add_special_tokens=False)
        assert [token for each in found for token in each.input_ids[1:-1]] == ids["input_ids"]
        assert len(found) > 1
        assert all(each.targets[1] >= 0 for each in found), "each begins with a word"
        begins = [place for place, word in enumerate(ids.word_ids()) if place == 0 or word != ids.word_ids()[place - 1]]
        assert [target >= 0 for each in found for target in each.targets[1:-1]] == [place in begins for place in range(len(ids["input_ids"]))]

    def test_a_word_longer_than_the_model_is_cut_all_the_same(self, tokenizers):
        tokenizer = tokenizers["wordpiece"]
        found = MaskedLM(packing="lines", unit="whole-word").encode(row("unfathomable" * 3), tokenizer, Limits(8, "right"))
        assert [token for each in found for token in each.input_ids[1:-1]] == tokenizer("unfathomable" * 3, add_special_tokens=False)["input_ids"]

    def test_special_tokens_in_a_text_are_never_hidden(self, tokenizers):
        tokenizer = tokenizers["wordpiece"]
        (found,) = MaskedLM().encode(row("roses [SEP] 東 bread [MASK]"), tokenizer, WIDE)
        hidden = [token for token, weight in zip(found.input_ids, found.weights, strict=True) if weight]
        assert hidden == tokenizer("roses bread", add_special_tokens=False)["input_ids"]

    @pytest.mark.parametrize("mode", ["drop", "error"])
    def test_long_rows_can_be_refused(self, mode, tokenizers):
        if mode == "drop":
            assert MaskedLM().encode(row(TEXT), tokenizers["wordpiece"], Limits(16, mode)) == []
        else:
            with pytest.raises(RowError, match=r"\d+ tokens, more than data.max_length: 16"):
                MaskedLM().encode(row(TEXT), tokenizers["wordpiece"], Limits(16, mode))

    @pytest.mark.parametrize(("text", "message"), [(" \n", "the text is empty"), ("\ufe0f", "the tokenizer makes no token of the text")])
    def test_rows_without_tokens_are_told(self, text, message, tokenizers):
        for packing in ("lines", "doc-sentences", "full-sentences"):
            with pytest.raises(RowError, match=message):
                MaskedLM(packing=packing).encode(row(text), tokenizers["wordpiece"], WIDE)

    def test_full_sentences_cross_documents_with_a_separator_between(self, tokenizers):
        tokenizer = tokenizers["wordpiece"]
        texts = ["roses and tulips\nnear the old garden", "boats", "bread and butter\nsoup under the lamps of the harbour", "\ufe0f", "rain"]
        rows = [row(text, number) for number, text in enumerate(texts, 1)]
        said: list[str] = []
        done = encode(rows, MaskedLM(packing="full-sentences"), tokenizer, Limits(20, "right"), split="train", on_bad_rows="skip", note=said.append)
        found = [done.features.get(i)["input_ids"].tolist() for i in range(len(done.features))]
        assert all(len(ids) <= 20 and ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id for ids in found)
        lines = [[tokenizer(line, add_special_tokens=False)["input_ids"] for line in text.splitlines()] for text in texts]
        flat = [(document, line) for document, each in enumerate(lines) for line in each if line]
        assert [token for ids in found for token in ids if token not in (2, 3)] == [token for _, line in flat for token in line]
        # as many whole lines as fit, and a separator where the next line is of another document
        rest, first = list(flat), []
        for ids in found:
            inside, before = ids[1:-1], rest[0][0]
            first.append(before)
            while rest and inside:
                document, line = rest[0]
                if document != before:
                    assert inside.pop(0) == tokenizer.sep_token_id
                assert inside[: len(line)] == line
                inside, before = inside[len(line) :], document
                rest.pop(0)
            assert inside == []
            assert not rest or len(ids) + len(rest[0][1]) + (rest[0][0] != before) > 20
        assert done.features.row[:].tolist() == first
        assert done.audit.features == len(found)
        assert done.audit.supervised == sum(len(line) for _, line in flat)
        assert done.audit.bad == [(3, "the tokenizer makes no token of the text")]

    def test_packing_says_what_a_txt_file_is(self):
        assert [MaskedLM(packing=packing).txt_row for packing in ("lines", "doc-sentences", "full-sentences")] == ["line", "file", "file"]

    def test_pieces_that_fill_an_input_exactly_stay_together(self):
        pieces = [(0, Features([1, 2], [1, 2], [1.0] * 2)), (0, Features([3], [3], [1.0])), (1, Features([4], [4], [1.0]))]
        assert [(row, each.input_ids) for row, each in packed(pieces, 3, separator=9)] == [(0, [1, 2, 3]), (1, [4])]
        assert [(row, each.input_ids, each.weights) for row, each in packed(pieces, 5, separator=9)] == [(0, [1, 2, 3, 9, 4], [1.0, 1.0, 1.0, 0.0, 1.0])]

    def test_a_frame_is_what_the_tokenizer_puts_around_a_text(self, tokenizers):
        assert Frame.of(tokenizers["wordpiece"]) == Frame([2], [3], [3], frozenset(range(5)), True)
        assert Frame.of(tokenizers["bpe"]) == Frame([], [], [], frozenset(range(4)), False)


class TestRefusals:
    def test_a_tokenizer_without_a_mask_token(self, tokenizers):
        MaskedLM().check(tokenizers["wordpiece"])
        with pytest.raises(RecipeError, match=r"no mask token \(mask_token\), so nothing can be hidden"):
            MaskedLM().check(tokenizers["bpe"])

    def test_words_of_a_tokenizer_that_tells_none(self):
        slow = transformers.CanineTokenizer()
        MaskedLM().check(slow)
        with pytest.raises(RecipeError, match=r"task\.unit: span: the tokenizer of .* does not say which tokens make up a word; use unit: token"):
            MaskedLM(unit="span").check(slow)


@pytest.mark.parametrize(("name", "told"), [("bert", True), ("bert-masked", False)])
def test_a_head_that_starts_random_is_told(name, told, ftkit, recipe):
    done = ftkit("eval", recipe(name, "masked"))
    assert done.code == 0, done.err
    assert ("not among the stored weights, so from random ones: cls.predictions" in done.err) == told


def test_metrics_are_of_the_hidden_tokens():
    logits = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]])
    targets, weights = torch.tensor([0, 2, 1, 6]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    metrics = MaskedLM().metrics([], None)
    for part in (slice(0, 2), slice(2, 4)):
        metrics.update(Scores(logits[part], targets[part], weights[part], torch.zeros(2)))
    found = metrics.compute()
    loss = torch.nn.functional.cross_entropy(logits[:3], targets[:3]).item()
    assert found == pytest.approx({"loss": loss, "perplexity": np.exp(loss), "accuracy": 1 / 3, "accuracy_5": 2 / 3, "loss_count": 3})
    assert found.keys() == {*MaskedLM().metric_names, "loss_count"}


class TestPredict:
    @pytest.fixture
    def built(self, checkpoint):
        return transformers.AutoModelForMaskedLM.from_pretrained(checkpoint("bert-masked")).eval()

    def answers(self, built, tokenizer, *texts, length=96, **fields):
        return MaskedLM(**fields).predict(built, tokenizer, [row(text, number) for number, text in enumerate(texts, 1)], Limits(length, "right"), Generation())

    def test_masks_are_filled_as_the_pipeline_of_transformers_fills_them(self, built, tokenizers):
        tokenizer = tokenizers["wordpiece"]
        one, other = self.answers(built, tokenizer, "the [MASK] garden", "boats [MASK] near the [MASK]", top_k=3)
        fill = transformers.pipeline("fill-mask", model=built, tokenizer=tokenizer, top_k=3)
        for answer, expected in ((one, [fill("the [MASK] garden")]), (other, fill("boats [MASK] near the [MASK]"))):
            assert [[each["token"] for each in mask] for mask in answer["masks"]] == [[each["token_str"] for each in mask] for mask in expected]
            assert [[each["probability"] for each in mask] for mask in answer["masks"]] == [
                pytest.approx([each["score"] for each in mask], rel=1e-4) for mask in expected
            ]
        assert one["text"] == fill("the [MASK] garden")[0]["sequence"]
        json.dumps([one, other], allow_nan=False)

    def test_virtual_tokens_are_read_with_the_text(self, built, tokenizers):
        """As in training, whose items are those of the model's base."""
        tokenizer = tokenizers["wordpiece"]
        (without,) = self.answers(built, tokenizer, "the [MASK] garden", top_k=1)
        torch.manual_seed(0)
        torch.nn.init.normal_(prompts.add(built, 4).weight)
        (found,) = self.answers(built, tokenizer, "the [MASK] garden", top_k=1)
        inputs = tokenizer("the [MASK] garden", return_tensors="pt")
        place = 4 + inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)
        with torch.no_grad():
            expected = built(**inputs).logits[0, place].softmax(-1).max().item()
        assert found["masks"][0][0]["probability"] == pytest.approx(expected, rel=1e-5)
        assert found["masks"][0][0]["probability"] != pytest.approx(without["masks"][0][0]["probability"], rel=1e-3)

    def test_what_is_not_read_is_counted_and_stays(self, built, tokenizers):
        tokenizer = tokenizers["wordpiece"]
        (found,) = self.answers(built, tokenizer, "bread [MASK] bread bread [MASK]", length=5)
        whole = tokenizer("bread [MASK] bread bread [MASK]", add_special_tokens=False)["input_ids"]
        assert len(found["masks"]) == whole[:3].count(tokenizer.mask_token_id)
        assert found["truncated"] == len(whole) - 3
        assert found["text"].endswith("[MASK]")

    def test_a_text_without_a_mask_is_told(self, built, tokenizers):
        with pytest.raises(DataError, match=r"rows\.jsonl:2: the text has no \[MASK\]"):
            self.answers(built, tokenizers["wordpiece"], "the [MASK]", "the garden")
