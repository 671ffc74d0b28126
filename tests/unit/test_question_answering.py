"""Answers stand at their tokens in every window, and of all windows of a question the best answer is said."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from ftkit import model as models
from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet
from ftkit.data.types import Limits, Row, RowError, Scores
from ftkit.errors import DataError, RecipeError
from ftkit.methods.lora import LoRA
from ftkit.recipe.spec import Generation, Model
from ftkit.tasks.question_answering import QuestionAnswering, Span
from ftkit.tasks.squad import score
from ftkit.tasks.streaming import Kept

TASK = QuestionAnswering()
WIDE = Limits(96, "right")
WORDS = ["roses", "unfathomable", "boats", "soup,", "old", "(tide)", "harbour"]


def row(context, answers=None, number=1, question="where are boats?", **values):
    return Row({"question": question, "context": context} | ({} if answers is None else {"answers": answers}) | values, "rows.jsonl", number)


def answered(context, text, number=1):
    return row(context, [{"text": text, "answer_start": context.index(text)}], number)


def said(features, context):
    """The text of the target; None where it is no answer."""
    spans, (first, last) = np.array(features.spans).reshape(-1, 2), features.targets
    assert (first, last) == (0, 0) or first > 0
    return None if last == 0 else context[spans[first][0] : spans[last][1]]


# --- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@pytest.mark.parametrize("text", ["boats", "unfathomable boats", "old", "soup", "tide", "서울"])
def test_the_target_is_the_first_and_the_last_token_of_the_answer(kind, text, tokenizers):
    context = "old roses,  unfathomable boats\tand soup (tide) 서울에서"
    (features,) = TASK.encode(answered(context, text), tokenizers[kind], WIDE)
    assert said(features, context) == ("서울에서" if kind == "wordpiece" and text == "서울" else text)
    assert features.weights == [1.0]


def run_qa_targets(tokenizer, question, context, answer, start, limit, stride):
    """Start and end of each window by the rule of transformers' run_qa.py: going inwards from both ends of the context.

    Theirs goes on behind the context where the last token is the answer, and lets it begin at the end of the row.
    """
    end = start + len(answer)
    encoded = tokenizer(
        question, context, truncation="only_second", max_length=limit, stride=stride, return_overflowing_tokens=True, return_offsets_mapping=True
    )
    found = []
    for number, offsets in enumerate(encoded["offset_mapping"]):
        own = [place for place, of in enumerate(encoded.sequence_ids(number)) if of == 1]
        first, last = own[0], own[-1]
        if offsets[first][0] > start or offsets[last][1] < end:
            found.append((encoded["input_ids"][number], [0, 0]))
            continue
        while first <= own[-1] and offsets[first][0] <= start:
            first += 1
        while offsets[last][1] >= end:
            last -= 1
        found.append((encoded["input_ids"][number], [first - 1, last + 1]))
    return found


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_windows_and_targets_are_those_of_run_qa(kind, tokenizers):
    rng, tokenizer = random.Random(0), tokenizers[kind]
    limits, task, several = Limits(60, "right"), QuestionAnswering(stride=16), 0
    for _ in range(40):
        words = rng.choices(WORDS, k=rng.randint(1, 40))
        place = rng.randrange(len(words))
        answer, start = words[place], len(" ".join([*words[:place], ""]))
        context = " ".join(words)
        expected = run_qa_targets(tokenizer, "where are boats?", context, answer, start, 60, 16)
        tokenizer("", verbose=False)
        features = task.encode(row(context, [{"text": answer, "answer_start": start}]), tokenizer, limits)
        assert [(each.input_ids, each.targets) for each in features] == expected
        several += len(features) > 1
    assert several > 10


def test_the_question_is_whole_in_every_window(tokenizers):
    tokenizer, context = tokenizers["wordpiece"], " ".join(["soup"] * 60)
    features = TASK.encode(answered(context, "soup"), tokenizer, Limits(24, "right"))
    question = tokenizer("where are boats?", "")["input_ids"][:-1]
    assert len(features) > 3
    assert all(each.input_ids[: len(question)] == question and len(each.input_ids) <= 24 for each in features)
    assert [each.token_type_ids[-1] for each in features] == [1] * len(features)


def test_a_question_without_room_is_refused(tokenizers):
    long = row("soup", [], question="where are boats? " * 9)
    with pytest.raises(RowError, match=r"the question has \d+ tokens, which leaves no room for the context in data\.max_length: 24"):
        TASK.encode(long, tokenizers["wordpiece"], Limits(24, "right"))
    assert TASK.encode(long, tokenizers["wordpiece"], Limits(24, "drop")) == []


@pytest.mark.parametrize("mode", ["drop", "error"])
def test_long_contexts_can_be_refused(mode, tokenizers):
    long = answered(" ".join(["boats"] * 40), "boats")
    if mode == "drop":
        assert TASK.encode(long, tokenizers["wordpiece"], Limits(24, mode)) == []
    else:
        with pytest.raises(RowError, match=r"more tokens than data\.max_length: 24"):
            TASK.encode(long, tokenizers["wordpiece"], Limits(24, mode))


CONTEXT = "old boats and boats"
FORMS = {
    "nested": {"answers": [{"text": "boats", "answer_start": 4}, {"text": "old boats", "answer_start": 0}]},
    "columns of lists": {"answers": {"text": ["boats", "old boats"], "answer_start": [4, 0]}},
    "one": {"answers": {"text": "boats", "answer_start": 4}},
    "plain": {"answers": "boats", "answer_start": 4},
    "plain, of a csv file": {"answers": "boats", "answer_start": "4"},
    "plain lists": {"answers": ["boats"], "answer_start": [4.0]},
}


@pytest.mark.parametrize("form", FORMS)
def test_answers_come_in_several_forms(form, tokenizers):
    (features,) = TASK.encode(row(CONTEXT, **FORMS[form]), tokenizers["wordpiece"], WIDE)
    assert said(features, CONTEXT) == "boats"
    assert features.spans[2 * features.targets[0]] == 4


@pytest.mark.parametrize("form", [{}, {"answers": {"text": [], "answer_start": []}}, {"answers": []}, {"answers": {"text": None, "answer_start": None}}])
def test_a_question_may_have_no_answer(form, tokenizers):
    (features,) = TASK.encode(row(CONTEXT, **form), tokenizers["wordpiece"], WIDE)
    assert features.targets == [0, 0]
    assert features.weights == [1.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"answers": [{"text": "boats", "answer_start": 5}]}, "the answer 'boats' does not begin at answer_start 5, where 'oats ' stands: it begins at 4"),
        ({"answers": [{"text": "Boats", "answer_start": 4}]}, "does not begin at answer_start 4, where 'boats' stands: it is nowhere in the context"),
        ({"answers": [{"text": "boats", "answer_start": 4}, {"text": "soup", "answer_start": 4}]}, "the answer 'soup' does not begin"),
        ({"answers": "boats", "answer_start": 400}, "does not begin at answer_start 400, where '' stands: it begins at 4"),
        ({"answers": "boats"}, "1 answers, but 0 answer_start"),
        ({"answers": {"text": ["a", "b"], "answer_start": [0]}}, "2 answers, but 1 answer_start"),
        ({"answers": [{"text": "boats"}]}, "answer_start must be a number of characters from 0, but is None"),
        ({"answers": "boats", "answer_start": -1}, "answer_start must be a number of characters from 0, but is -1"),
        ({"answers": "boats", "answer_start": 4.5}, "but is 4.5"),
        ({"answers": "boats", "answer_start": True}, "but is True"),
        ({"answers": "boats", "answer_start": "here"}, "but is 'here'"),
        ({"answers": 7, "answer_start": 4}, "an answer must be text, but is a number"),
        ({"answers": [{"text": " ", "answer_start": 3}]}, "an answer is empty"),
    ],
)
def test_answers_that_are_not_in_the_context_are_told(values, message, tokenizers):
    with pytest.raises(RowError, match=message):
        TASK.encode(row(CONTEXT, **values), tokenizers["wordpiece"], WIDE)


def test_an_answer_that_no_window_holds_is_told(tokenizers):
    context = " ".join(["soup"] * 60)
    with pytest.raises(RowError, match=r"no window holds the whole of the answer 'soup soup .*' \(299 characters\); raise data\.max_length or task\.stride"):
        TASK.encode(answered(context, context), tokenizers["wordpiece"], Limits(24, "right"))
    with pytest.raises(RowError, match="the tokenizer makes nothing of the context"):
        TASK.encode(row("\ufe0f"), tokenizers["wordpiece"], WIDE)


def test_the_threshold_is_that_of_the_recipe_or_comes_from_the_rows():
    some, none = answered(CONTEXT, "boats"), row(CONTEXT, [])
    assert TASK.resolve([some]).null_threshold is None
    assert TASK.resolve([some, none]).null_threshold == 0
    assert QuestionAnswering(null_threshold=-1.5).resolve([some, none]).null_threshold == -1.5
    assert TASK.metric_names == ("f1", "exact_match", "loss")
    assert "best_f1_threshold" in TASK.resolve([some, none]).metric_names
    with pytest.raises(DataError, match="no answer that can be used"):
        TASK.resolve([none])
    with pytest.raises(DataError, match=r"no answer that can be used: rows\.jsonl:1: 1 answers, but 0 answer_start"):
        TASK.resolve([row(CONTEXT, "boats")])


def test_a_tokenizer_without_places_is_refused():
    with pytest.raises(RecipeError, match="does not say where in a text its tokens stand, so answers cannot be found there"):
        TASK.check(transformers.CanineTokenizer())


# --- the best spans -----------------------------------------------------------------------------


def encoded(tokenizer, *rows, length=96, task=TASK):
    return FeatureSet.of(task.encode(each, tokenizer, Limits(length, "right")) for each in rows)


def logits_of(features, seed=0):
    """Random ones as `items` gives them: [2 n, L], -inf behind the end of a row."""
    logits = torch.randn(len(features), 2, int(features.lengths.max()), generator=torch.Generator().manual_seed(seed)) * 3
    for place, length in enumerate(features.lengths.tolist()):
        logits[place, :, length:] = -torch.inf
    return logits.flatten(0, 1)


@pytest.mark.parametrize("longest", [1, 3, 100])
@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_the_best_spans_are_those_of_all_pairs(kind, longest, tokenizers):
    rows = [row("old boats and  soup (tide)"), row("roses"), row("unfathomable tulips near my harbour")]
    features = encoded(tokenizers[kind], *rows)
    logits = logits_of(features)
    task = QuestionAnswering(max_answer_length=longest, n_best=7)
    found, nulls = task.best(logits, features, np.arange(3))
    for place in range(3):
        start, end = logits.view(3, 2, -1)[place].tolist()
        spans = features.get(place)["spans"].reshape(-1, 2).tolist()
        own = [i for i, (first, last) in enumerate(spans) if first < last]
        pairs = [(start[i] + end[j], spans[i][0], spans[j][1]) for i in own for j in own if i <= j < i + longest]
        expected = sorted(pairs, reverse=True)[:7]
        assert [tuple(span) for span in found[place]] == [(pytest.approx(value), first, last) for value, first, last in expected]
        assert nulls[place] == pytest.approx(start[0] + end[0])


# --- metrics ------------------------------------------------------------------------------------


def scores_of(features, logits, indices):
    """Those of some features; of none, as `collate` gives them to a process without rows."""
    weight = 0.5 if indices else 0.0
    indices = indices or [0]
    both = logits.view(len(features), 2, -1)[indices]
    rows = torch.tensor(indices).repeat_interleave(2)
    targets = torch.tensor(np.stack([features.get(i)["targets"] for i in indices])).long().flatten()
    return Scores(both.flatten(0, 1), targets, torch.full((len(rows),), weight), rows, kind="positions")


def long_rows():
    rng = random.Random(3)
    contexts = [" ".join(rng.choices(WORDS, k=count)) for count in (30, 3, 45, 12, 25)]
    return [answered(context, context.split()[-1], i) if i % 3 else row(context, [], i) for i, context in enumerate(contexts)]


@pytest.mark.parametrize("threshold", [None, 0.0])
def test_questions_are_measured_whole_whatever_the_batches(threshold, tokenizers):
    """Beside what all windows of a question together say; in any order, in batches of any size, in two processes."""
    rows, task = long_rows(), QuestionAnswering(null_threshold=threshold, stride=4)
    features = encoded(tokenizers["wordpiece"], *rows, length=24, task=task)
    logits = logits_of(features)
    spans, nulls = task.best(logits, features, np.arange(len(features)))
    owners = features.row.tolist()
    texts, margins = [], []
    for index, each in enumerate(rows):
        best = max(span for owner, own in zip(owners, spans, strict=True) if owner == index for span in own)
        margins.append(min(null for owner, null in zip(owners, nulls, strict=True) if owner == index) - best.score)
        texts.append("" if threshold is not None and margins[-1] > threshold else each.values["context"][best.start : best.end])
    right = [[answer["text"] for answer in each.values["answers"]] for each in rows]
    expected = [score(text, own, 1 if threshold is None else 2) for text, own in zip(texts, right, strict=True)]

    def measured(*batches):
        metrics = task.metrics(rows, features)
        for batch in batches:
            metrics.update(scores_of(features, logits, batch))
        return metrics

    order = random.Random(0).sample(range(len(features)), len(features))
    one, other = measured(order[:3], order[3:5]), measured(order[5:], [])
    joined = task.metrics(rows, features)
    joined.sums = {name: one.sums[name] + other.sums[name] for name in one.sums}
    joined.kept = {name: Kept([other.kept[name].all(), one.kept[name].all()]) for name in one.kept}
    whole = measured([*range(len(features))])
    values = whole.compute()
    assert joined.compute() == pytest.approx(values)
    assert joined.records() == whole.records()
    assert values["f1"] == pytest.approx(np.mean([each.f1 for each in expected]))
    assert values["exact_match"] == pytest.approx(np.mean([each.exact_match for each in expected]))
    assert values["loss_count"] == len(features)
    assert [record["text"] for record in whole.records()] == texts
    assert [features.row[record["feature"]] for record in whole.records()] == list(range(len(rows)))
    assert [record["answers"] for record in whole.records()] == right
    assert len(whole.kept["windows"].all()[0]) == 5  # of each window, whatever its length
    assert values.keys() == {*task.metric_names, "loss_count"}
    if threshold is not None:
        assert values["exact_match_no_answer"] == np.mean([not text for text, own in zip(texts, right, strict=True) if not own])
        assert values["f1_has_answer"] == pytest.approx(np.mean([each.f1 for each, own in zip(expected, right, strict=True) if own]))
        assert values["best_f1"] >= values["f1"]
        assert 0 < sum(not text for text in texts) < len(texts)


def test_an_evaluation_that_was_stopped_at_once_has_no_records(tokenizers):
    rows = [answered(CONTEXT, "boats")]
    assert TASK.metrics(rows, encoded(tokenizers["wordpiece"], *rows)).records() == []


def test_sets_of_one_kind_have_no_numbers_of_the_other(tokenizers):
    rows = [answered(CONTEXT, "boats"), answered(CONTEXT, "old")]
    features = encoded(tokenizers["wordpiece"], *rows)
    metrics = QuestionAnswering(null_threshold=0.0).metrics(rows, features)
    metrics.update(scores_of(features, logits_of(features), [0, 1]))
    assert "exact_match_no_answer" not in metrics.compute()


# --- the loss -----------------------------------------------------------------------------------


def model_of(checkpoint, name):
    config = transformers.AutoConfig.from_pretrained(checkpoint(name), **TASK.config_kwargs())
    torch.manual_seed(0)
    return transformers.AutoModelForQuestionAnswering.from_config(config).eval()


@pytest.mark.parametrize("name", ["bert", "distilbert", "gpt2"])
def test_the_loss_is_that_of_transformers_for_each_row(name, tokenizers, checkpoint):
    """Of rows side by side it is the mean of the losses of each alone; of equally long ones that of the whole batch."""
    from ftkit.objectives.supervised import Supervised

    tokenizer, model = tokenizers["bpe" if name == "gpt2" else "wordpiece"], model_of(checkpoint, name)
    rows = [answered("old boats near roses", "boats"), row("soup", []), answered("my small unfathomable harbour", "unfathomable harbour")]

    def features_of(*chosen):
        features = [each for one in chosen for each in TASK.encode(one, tokenizer, WIDE)]
        for each in features if name != "bert" else ():
            each.token_type_ids = None
        return FeatureSet.of([[each] for each in features])

    def theirs(batch):
        types = {} if batch.token_type_ids is None else {"token_type_ids": batch.token_type_ids}
        starts, ends = batch.targets.unbind(1)
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, start_positions=starts, end_positions=ends, **types).loss

    def ours(batch):
        items = TASK.items(model, batch)
        return Supervised().loss(items.scores()) / batch.weights.sum()

    features = features_of(*rows)
    assert len(set(features.lengths.tolist())) == 3
    pad = tokenizer.pad_token_id
    together = collate(features, np.arange(3), pad)
    separate = torch.stack([theirs(collate(features, np.array([i]), pad)) for i in range(3)])
    torch.testing.assert_close(ours(together), separate.mean(), rtol=1e-6, atol=1e-6)

    gradients = [torch.autograd.grad(loss, [*model.parameters()], allow_unused=True) for loss in (ours(together), separate.mean())]
    largest = max(gradient.abs().max() for gradient in gradients[1] if gradient is not None)
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).abs().max() <= 1e-6 * largest

    alike = features_of(rows[0], answered("old boats near roses", "roses"), row("old boats near roses", []))
    whole = collate(alike, np.arange(3), pad)
    assert whole.segments is None
    torch.testing.assert_close(ours(whole), theirs(whole), rtol=1e-6, atol=1e-6)


def test_a_model_behind_an_adapter_is_told_what_is_the_question(tokenizers, checkpoint):
    """PEFT's class for question answering takes token_type_ids from a call and does not hand them on (0.21.2)."""
    spec = Model(name=checkpoint("bert"))
    source = models.locate(spec)
    base = models.load(spec, source, models.load_config(spec, source), tokenizers["wordpiece"], TASK, LoRA(r=2), torch.float32, 0, torch.device("cpu"))
    model = LoRA(r=2).apply(base).eval()
    batch = collate(encoded(tokenizers["wordpiece"], row("old soup")), np.array([0]), 0)
    other = replace(batch, token_type_ids=torch.zeros_like(batch.input_ids))
    with torch.no_grad():
        one, another = (TASK.items(model, each).states for each in (batch, other))
    assert (one - another).abs().max() > 0.01


# --- predict ------------------------------------------------------------------------------------


class Told(torch.nn.Module):
    """Says that an answer begins and ends at each token of certain words, and none with so much."""

    def __init__(self, tokenizer, null=0.0, **words):
        super().__init__()
        self.words = {tokenizer(word, add_special_tokens=False)["input_ids"][0]: value for word, value in words.items()}
        self.null, self.device = null, torch.device("cpu")
        self.widest = 0

    def forward(self, input_ids, attention_mask, token_type_ids):
        self.widest = max(self.widest, len(input_ids))
        logits = torch.full(input_ids.shape, -5.0)
        for token, value in self.words.items():
            logits[(input_ids == token) & (token_type_ids == 1)] = value
        logits[:, 0] = self.null
        return transformers.modeling_outputs.QuestionAnsweringModelOutput(start_logits=logits, end_logits=logits)


class TestPredict:
    def answers(self, tokenizer, model, rows, length=96, **settings):
        return QuestionAnswering(**{"stride": 4, "n_best": 3, **settings}).predict(model, tokenizer, rows, Limits(length, "right"), Generation())

    def test_answers_are_those_of_the_context(self, tokenizers):
        tokenizer = tokenizers["wordpiece"]
        context = "old  soup, (tide)\tand nets"
        (found,) = self.answers(tokenizer, Told(tokenizer, soup=3.0, tide=2.0), [row(context)])
        assert (found["text"], found["start"], found["end"], found["score"]) == ("soup", 5, 9, 6.0)
        assert [each["text"] for each in found["n_best"]] == ["soup", "soup, (tide", "tide"]
        assert [each["score"] for each in found["n_best"]] == [6.0, 5.0, 4.0]
        weights = np.exp([6.0, 5.0, 4.0])
        assert [each["probability"] for each in found["n_best"]] == pytest.approx(weights / weights.sum())
        assert found["probability"] == found["n_best"][0]["probability"]
        assert all(context[each["start"] : each["end"]] == each["text"] for each in found["n_best"])
        json.dumps(found, allow_nan=False)

    @pytest.mark.parametrize(("null", "threshold", "text"), [(2.9, 0.0, "soup"), (3.1, 0.0, ""), (3.1, 0.5, "soup"), (9.0, None, "soup"), (2.9, -0.5, "")])
    def test_no_answer_is_said_where_it_is_better_by_the_threshold(self, null, threshold, text, tokenizers):
        tokenizer = tokenizers["wordpiece"]
        (found,) = self.answers(tokenizer, Told(tokenizer, null=null, soup=3.0), [row("old soup")], null_threshold=threshold)
        assert found["text"] == text
        assert ("" in [each["text"] for each in found["n_best"]]) == (threshold is not None)
        if not text:
            assert (found["start"], found["end"], found["score"]) == (None, None, pytest.approx(2 * null))

    def test_windows_of_a_question_are_answered_together(self, tokenizers):
        """The null score is the lowest of any window; each span is there once."""
        tokenizer = tokenizers["wordpiece"]
        context = " ".join(["old"] * 30 + ["soup"] + ["old"] * 300)
        model = Told(tokenizer, null=2.0, soup=3.0)
        found, other = self.answers(tokenizer, model, [row(context), row("tide")], length=24, null_threshold=0.0)
        assert (found["text"], found["start"]) == ("soup", context.index("soup"))
        assert other["text"] == ""
        places = [(each["start"], each["end"]) for each in found["n_best"]]
        assert len(places) == len(set(places)) == 4
        assert model.widest <= 16  # windows side by side, of however many there are

    def test_rows_that_cannot_be_answered_are_told(self, tokenizers):
        tokenizer = tokenizers["wordpiece"]
        with pytest.raises(DataError, match=r"rows\.jsonl:7: the question has \d+ tokens"):
            self.answers(tokenizer, Told(tokenizer), [row("soup", number=7, question="boats " * 50)], length=24)


def test_the_best_answer_is_taken_by_score():
    assert TASK.chosen(Span(1.0, 0, 3), 100.0) == Span(1.0, 0, 3)
    assert QuestionAnswering(null_threshold=0.0).chosen(Span(1.0, 0, 3), 1.0) == Span(1.0, 0, 3)
    assert QuestionAnswering(null_threshold=0.0).chosen(Span(1.0, 0, 3), 1.1) is None
