"""Feature sets, the audit of tokenising, and what their cache key depends on."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import ClassVar

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ftkit.data import features, parallel
from ftkit.data.features import Audit, Encoded, FeatureSet, describe, encode
from ftkit.data.types import Features, Limits, Row, RowError
from ftkit.errors import DataError, DiskError
from ftkit.recipe.spec import Spec
from ftkit.tasks.causal_lm import CausalLM
from ftkit.tasks.text_classification import TextClassification

WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "good", "bad", "film", "the", "a", "is", "!", "long"]


class Task(Spec):
    """Reads words; learns the words behind the first `prompt` ones."""

    prompt: int = 0
    calls: ClassVar[list[int]] = []

    def encode(self, row, tokenizer, limits):
        self.calls.append(row.number)
        if row.values["text"] == "unusable":
            raise RowError("the text says so")
        ids = tokenizer(row.values["text"], truncation=True, max_length=10**6)["input_ids"]
        lost = max(0, len(ids) - limits.max_length)
        if lost and limits.truncation == "drop":
            return []
        ids = ids[: limits.max_length]
        weights = [float(position >= self.prompt) for position in range(len(ids))]
        return [Features(input_ids=ids, targets=ids, weights=weights, truncated=lost)]


@pytest.fixture
def tokenizer():
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / "cache"))
    Task.calls.clear()


def rows(*texts):
    return [Row({"text": text, "label": "not counted as words"}, "d.csv", number) for number, text in enumerate(texts, 1)]


def run(texts, tokenizer, task=None, max_length=16, truncation="right", split="train", on_bad_rows="error", notes=None, **kwargs):
    note = (notes if notes is not None else []).append
    return encode(rows(*texts), task or Task(), tokenizer, Limits(max_length, truncation), split=split, on_bad_rows=on_bad_rows, note=note, **kwargs)


# --- feature sets -------------------------------------------------------------------------------


def per_token():
    return [
        [Features([5, 6, 7], [6, 7, 1], [1.0, 1.0, 0.5], token_type_ids=[0, 0, 1])],
        [],
        [Features([8], [9], [0.0], token_type_ids=[1]), Features([2, 3], [3, 4], [1.0, 0.0], token_type_ids=[0, 1])],
    ]


def test_a_set_gives_views_of_its_features():
    data = FeatureSet.of(per_token())
    assert len(data) == 3
    assert data.lengths.tolist() == [3, 1, 2]
    assert data.row.tolist() == [0, 2, 2]
    assert not data.per_row
    feature = data.get(2)
    assert feature.pop("spans") is None
    assert {name: array.tolist() for name, array in feature.items()} == {
        "input_ids": [2, 3], "targets": [3, 4], "weights": [1.0, 0.0], "token_type_ids": [0, 1], "texts": [2]
    }  # fmt: skip
    assert all(array.base is not None for array in feature.values())
    assert (data.input_ids.dtype, data.offsets.dtype, data.targets.dtype, data.weights.dtype) == (np.int32, np.int64, np.int32, np.float32)


def test_targets_of_whole_rows():
    data = FeatureSet.of([[Features([1, 2, 3], [2], [1.0])], [Features([4], [0], [1.0])]])
    assert data.per_row
    assert [data.get(i)["targets"].tolist() for i in range(2)] == [[2], [0]]
    assert data.get(0)["token_type_ids"] is None
    scores = FeatureSet.of([[Features([1, 2], [2.5], [1.0])], [Features([4], [3], [1.0])]])
    assert scores.targets.dtype == np.float32
    assert scores.targets.tolist() == [2.5, 3.0]


def with_spans():
    return [[Features([1, 2], [0, 1], [1.0], spans=[0, 0, 3, 8]), Features([3], [0, 0], [1.0], spans=[8, 9])]]


def test_tokens_may_have_spans():
    data = FeatureSet.of(with_spans())
    assert (data.per_row, data.width) == (True, 2)
    assert [data.get(i)["spans"].tolist() for i in range(2)] == [[0, 0, 3, 8], [8, 9]]
    with pytest.raises(AssertionError, match="spans for all features, or for none"):
        FeatureSet.of([*with_spans(), [Features([4], [0, 0], [1.0])]])


def test_a_row_of_one_token_can_be_classified():
    assert FeatureSet.of([[Features([1], [2], [1.0])]]).per_row


def test_targets_that_fit_neither_tokens_nor_rows_are_a_defect():
    with pytest.raises(AssertionError, match="a target for each token, or one for each feature"):
        FeatureSet.of([[Features([1, 2, 3], [2, 3], [1.0, 1.0])]])


@pytest.mark.parametrize("features", [per_token(), with_spans(), [[Features([1, 2], [0.1], [1.0])]], []])
def test_saving_and_loading_keeps_every_bit(tmp_path, features):
    data = FeatureSet.of(features)
    data.save(tmp_path / "set", {"rows": 3, "text": "é"})
    loaded, metadata = FeatureSet.load(tmp_path / "set")
    assert metadata == {"rows": 3, "text": "é"}
    for name in data.__dataclass_fields__:
        before, after = getattr(data, name), getattr(loaded, name)
        if before is None:
            assert after is None
        else:
            assert before.dtype == after.dtype
            assert before.tobytes() == after.tobytes()


def test_a_loaded_set_is_mapped_not_read(tmp_path):
    FeatureSet.of(per_token()).save(tmp_path / "set", {})
    loaded, _ = FeatureSet.load(tmp_path / "set")
    maps = [line for line in open("/proc/self/maps") if str(tmp_path / "set") in line]  # noqa: PTH123, SIM115
    assert maps
    assert loaded.get(0)["input_ids"].tolist() == [5, 6, 7]


def test_saving_where_nothing_can_be_saved(tmp_path):
    with pytest.raises(DiskError, match="cannot be written"):
        FeatureSet.of(per_token()).save(tmp_path / "nowhere" / "set", {})


# --- the audit ----------------------------------------------------------------------------------


def test_the_audit_counts(tokenizer):
    encoded = run(["good film !", "the xyzzy film", "a a a a a a a a"], tokenizer, Task(prompt=1), max_length=6)
    audit = encoded.audit
    assert (audit.rows, audit.features, audit.tokens, audit.supervised) == (3, 3, 16, 13)
    assert audit.lengths == {"p50": 5, "p95": 6, "p99": 6, "max": 6}
    assert (audit.truncated_rows, audit.truncated_tokens, audit.dropped_rows) == (1, 4, 0)
    assert (audit.unknown_tokens, audit.text_tokens) == (1, 11)
    assert audit.tokens_per_word == 1.0  # of the two whole rows, special tokens left out
    assert audit.characters_per_token == pytest.approx((11 + 14) / 6)
    assert encoded.features.row.tolist() == [0, 1, 2]


def test_tokens_of_longer_words(tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Punctuation()
    assert run(["good! bad! good"], tokenizer).audit.tokens_per_word == pytest.approx(5 / 3)


def test_texts_inside_messages_are_counted(tokenizer):
    class Chat(Task):
        def encode(self, row, tokenizer, limits):
            return super().encode(Row({"text": row.values["messages"][0]["content"]}, "", 1), tokenizer, limits)

    messages = [{"role": "user", "content": "good film"}]
    audit = encode([Row({"messages": messages}, "d", 1)], Chat(), tokenizer, Limits(9, "right"), split="train", on_bad_rows="error", note=print).audit
    assert audit.tokens_per_word == 1.0


def test_an_unknown_token_that_also_ends_texts_says_nothing(tokenizer):
    tokenizer.eos_token = "[UNK]"
    assert run(["xyzzy"], tokenizer).audit.unknown_rate is None


def test_dropped_rows(tokenizer):
    encoded = run(["good", "a a a a a a a a"], tokenizer, max_length=4, truncation="drop")
    assert (encoded.audit.dropped_rows, encoded.audit.features) == (1, 1)


def test_nothing_left(tokenizer):
    encoded = run(["a a a"], tokenizer, max_length=4, truncation="drop")
    assert len(encoded.features) == 0
    assert encoded.audit.lengths == {}
    assert describe("train", encoded.audit)[0].startswith("train: 1 rows, 0 features")


def test_bad_rows_stop_or_are_left_out(tokenizer):
    texts = ["good", "unusable", "bad", "unusable"]
    with pytest.raises(DataError) as caught:
        run(texts, tokenizer)
    assert "2 rows cannot be used:\n  d.csv:2: the text says so\n  d.csv:4: the text says so" in str(caught.value)
    notes = []
    encoded = run(texts, tokenizer, on_bad_rows="skip", notes=notes)
    assert encoded.features.row.tolist() == [0, 2]
    assert "2 bad rows left out" in notes[0]
    assert encoded.audit.to_dict()["bad"] == 2


def test_training_rows_without_anything_to_learn_are_bad(tokenizer):
    texts = ["good film", "the film is long !"]
    with pytest.raises(DataError, match=r"d\.csv:2: nothing in this row is learned \(3 tokens of it are cut off: data\.max_length is 4\)"):
        run(texts, tokenizer, Cut(), max_length=4)
    assert run(texts, tokenizer, Cut(), max_length=4, on_bad_rows="skip").features.row.tolist() == [0]


class Cut(Task):
    """Learns the last token only."""

    def encode(self, row, tokenizer, limits):
        (feature,) = super().encode(row, tokenizer, limits)
        feature.weights = [0.0] * (len(feature.input_ids) - 1) + [float(not feature.truncated)]
        return [feature]


def test_other_rows_without_anything_to_measure_are_counted(tokenizer):
    encoded = run(["the film is long !", "good"], tokenizer, Cut(), max_length=4, split="validation")
    assert encoded.audit.unsupervised_rows == [0]
    assert len(encoded.features) == 2
    assert any(line.startswith("WARNING validation: in 1 rows nothing is supervised") for line in describe("validation", encoded.audit))


def test_the_log_warns_of_much_unknown_and_much_cut(tokenizer):
    many = ["good film"] * 98
    quiet = describe("train", run([*many, "xyzzy", "a a a a a"], tokenizer, max_length=6).audit)
    assert not any(line.startswith("WARNING") for line in quiet)
    assert any("0.50% of the tokens are unknown" in line for line in quiet)
    assert any("1.0% of the rows are longer than data.max_length: 1 truncated (losing 1 tokens), 0 dropped" in line for line in quiet)
    loud = describe("train", run([*many, *["xyzzy"] * 10, *["a a a a a"] * 10], tokenizer, max_length=6).audit)
    assert sum(line.startswith("WARNING train: ") for line in loud) == 2
    assert any("2 answers are not learned" in line for line in describe("train", Audit(rows=1, untrained_answers=2)))


def test_progress_and_interruption(tokenizer):
    reached = []
    run(["good"] * 130, tokenizer, progress=lambda done, total: reached.append((done, total)))
    assert reached == [(0, 130), (64, 130), (128, 130), (130, 130)]

    def poll():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(["bad"], tokenizer, poll=poll)


# --- the cache ----------------------------------------------------------------------------------


def test_the_second_time_nothing_is_tokenised(tokenizer):
    first = run(["good film", "bad film"], tokenizer)
    assert Task.calls == [1, 2]
    second = run(["good film", "bad film"], tokenizer)
    assert Task.calls == [1, 2]
    assert second.audit == first.audit
    assert second.features.input_ids.tobytes() == first.features.input_ids.tobytes()


def test_bad_rows_are_told_from_the_cache_too(tokenizer):
    for _ in range(2):
        with pytest.raises(DataError, match=r"d\.csv:1: the text says so"):
            run(["unusable", "good"], tokenizer)
    assert Task.calls == [1, 2]


CHANGES = {
    "a row": lambda t: {"texts": ["good film", "bad films"]},
    "the order": lambda t: {"texts": ["bad film", "good film"]},
    "the task's settings": lambda t: {"task": Task(prompt=1)},
    "the task's class": lambda t: {"task": Cut()},
    "the length": lambda t: {"max_length": 15},
    "the truncation": lambda t: {"truncation": "left"},
    "the split": lambda t: {"split": "validation"},
    "the chat template": lambda t: setattr(t, "chat_template", "{{ messages }}") or {},
    "a special token": lambda t: setattr(t, "sep_token", "!") or {},
    "the inputs of the model": lambda t: setattr(t, "model_input_names", ["input_ids"]) or {},
    "an added token": lambda t: t.add_tokens(["new"]) and {},
    "the vocabulary": lambda t: setattr(t.backend_tokenizer, "pre_tokenizer", pre_tokenizers.Punctuation()) or {},
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_key_holds_everything_that_tokens_depend_on(tokenizer, change):
    arguments = {"texts": ["good film", "bad film"]}
    run(**arguments, tokenizer=tokenizer)
    Task.calls.clear()
    run(**arguments | CHANGES[change](tokenizer), tokenizer=tokenizer)
    assert Task.calls == [1, 2]


def test_the_key_holds_the_code(tokenizer, monkeypatch):
    run(["good"], tokenizer)
    monkeypatch.setattr(features.ftkit, "__version__", "another")
    run(["good"], tokenizer)
    assert Task.calls == [1, 1]


def test_the_key_forgets_how_the_tokenizer_was_last_called(tokenizer):
    run(["good"], tokenizer)
    tokenizer(["good", "bad film"], truncation=True, max_length=3, padding="max_length")
    run(["good"], tokenizer)
    assert Task.calls == [1]


# On several cores


def test_many_rows_are_tokenised_by_several_processes_with_the_same_result(monkeypatch, tokenizer, tmp_path):
    """Bad rows, dropped ones and the order included."""
    rows = [Row({"text": f"{'boats ' * (i % 40)}nets {i}", "label": "a" if i % 7 else "unheard of"}, "rows.csv", i) for i in range(600)]
    task, limits = TextClassification(labels=["a"]), Limits(24, "drop")
    polls: list[int] = []

    def tokenised() -> Encoded:
        monkeypatch.setenv("FTKIT_CACHE", str(tmp_path / str(len(polls))))
        return encode(rows, task, tokenizer, limits, split="train", on_bad_rows="skip", note=lambda text: None, poll=lambda: polls.append(1))

    alone = tokenised()
    monkeypatch.setattr(parallel, "ROWS_A_PROCESS", 200)
    monkeypatch.setattr("ftkit.device.num_cores", lambda: 2)
    pools: list[int] = []
    monkeypatch.setattr(parallel, "ProcessPoolExecutor", lambda workers, *rest: pools.append(workers) or ProcessPoolExecutor(workers, *rest))
    together = tokenised()
    assert pools == [2]
    assert alone.audit == together.audit
    assert alone.audit.bad
    assert alone.audit.dropped_rows
    for name in ("input_ids", "offsets", "targets", "weights", "row"):
        assert np.array_equal(getattr(alone.features, name), getattr(together.features, name))


def test_a_request_to_stop_is_heard_while_several_processes_work(monkeypatch, tokenizer, tmp_path):
    class Stop(Exception):
        pass

    def poll() -> None:
        if polls.append(1) or len(polls) > 3:
            raise Stop

    rows, polls = [Row({"text": f"nets {i}", "label": "a"}, "rows.csv", i) for i in range(5000)], []
    monkeypatch.setenv("FTKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(parallel, "ROWS_A_PROCESS", 200)
    monkeypatch.setattr("ftkit.device.num_cores", lambda: 2)
    with pytest.raises(Stop):
        encode(rows, TextClassification(labels=["a"]), tokenizer, Limits(24, "drop"), split="train", on_bad_rows="skip", note=lambda text: None, poll=poll)
    assert not multiprocessing.active_children()


def test_tasks_that_keep_what_they_learned_of_a_tokenizer_go_to_processes_too(monkeypatch, tokenizer):
    task = CausalLM()
    task._manner(tokenizer)  # kept, and not to be pickled
    tokenizer.eos_token = "[SEP]"
    rows = [Row({"text": f"a film {i}"}, "rows.jsonl", i) for i in range(40)]
    expected = list(parallel.outcomes(rows, task, tokenizer, Limits(24, "right"), lambda: None))
    monkeypatch.setattr(parallel, "ROWS_A_PROCESS", 20)
    monkeypatch.setattr("ftkit.device.num_cores", lambda: 2)
    assert list(parallel.outcomes(rows, task, tokenizer, Limits(24, "right"), lambda: None)) == expected
