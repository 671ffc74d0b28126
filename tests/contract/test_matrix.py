"""The support matrix, executed: what it says of an architecture is what the classes of transformers show, and what it calls possible works."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

from ftkit import architectures, attention, finish, model, reformer, reload, verify
from ftkit.data.batches import collate
from ftkit.data.features import FeatureSet
from ftkit.data.types import Limits, Row
from ftkit.errors import RecipeError
from ftkit.few_bits import steady_quantised
from ftkit.loop import Trainee
from ftkit.methods.modules import added
from ftkit.miniature import miniature
from ftkit.objectives.supervised import Supervised
from ftkit.recipe.spec import Model
from ftkit.sources import Source
from ftkit.tasks.causal_lm import CausalLM
from ftkit.tasks.masked_lm import MaskedLM
from ftkit.tasks.next_sentence import NextSentence
from ftkit.tasks.question_answering import QuestionAnswering
from ftkit.tasks.replaced_token_detection import ReplacedTokenDetection
from ftkit.tasks.reranking import Reranking
from ftkit.tasks.sentence_embedding import SentenceEmbedding
from ftkit.tasks.sentence_order import SentenceOrder
from ftkit.tasks.seq2seq import Seq2Seq
from ftkit.tasks.text_classification import TextClassification
from ftkit.tasks.token_classification import TokenClassification

TASKS = {
    "text-classification": TextClassification(labels=["garden", "harbour", "kitchen"]),
    "token-classification": TokenClassification(labels=["B-X", "I-X", "O"], subwords="all"),
    "question-answering": QuestionAnswering(),
    "masked-lm": MaskedLM(),
    "replaced-token-detection": ReplacedTokenDetection(),
    "next-sentence": NextSentence(),
    "sentence-order": SentenceOrder(),
    "sentence-embedding": SentenceEmbedding(loss="cosine"),
    "reranking": Reranking(),
    "causal-lm": CausalLM(),
    "seq2seq": Seq2Seq(),
}
CELLS = [(task, name) for task in TASKS for name in architectures.TABLE if architectures.head(TASKS[task]) in architectures.TABLE[name]]
# These tasks each architecture learns by a part of the methods only, one in EVERY, without `--whole-matrix`: so each method meets each task, and each
# architecture, all the same.
BRIEF, EVERY = ("token-classification", "question-answering", "sentence-embedding", "reranking"), 4
METHODS = {  # without dropout, so that two ways to compute can be compared
    kind: method.model_copy(update={"dropout": 0.0} if "dropout" in type(method).model_fields else {}) for kind, method in architectures.methods().items()
}
# Named otherwise in each architecture, and trained apart from its base.
HEADS = (
    "classifier",
    "pre_classifier",
    "score",
    "lm_head",
    "embed_out",
    "head",
    "cls",
    "predictions",
    "sop_classifier",
    "discriminator_predictions",
    "pooler",
    "qa_outputs",
    "qa_classifier",
    "classification_head",
)
TEXTS = ["roses and tulips in the old garden", "boats near the quiet tide", "bread, butter and soup", "ropes under the small lamps of the harbour"]

# One process loads everything that was written, without ftkit what other libraries load, and so before what it loads itself.
FRESH = """
import json, pathlib, runpy, sys
reload = runpy.run_path(sys.argv[1])
cells = [(cell, json.loads((cell / "artifact.json").read_text())) for cell in sorted(pathlib.Path(sys.argv[2]).iterdir())]
found = {}
for library in ("transformers", "peft", "ftkit"):
    own = found[library] = {"differences": {}}
    for cell, artifact in cells:
        if artifact["loads_with"] == library:
            rows = [{"input_ids": reload["torch"].tensor(ids)} for ids in json.loads((cell / "rows.json").read_text())]
            answers = reload["answers"](reload["load"](cell / "model", artifact, "cpu"), rows)
            expected = reload["load_file"](cell / "answers.safetensors")
            assert answers.keys() == expected.keys(), cell
            scale = max(value.abs().max() for value in expected.values())
            own["differences"][cell.name] = (max((answers[name] - expected[name]).abs().max() for name in expected) / scale).item()
    own["ftkit"] = "ftkit" in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Where the cells leave what they saved, a folder each, by task."""
    return tmp_path_factory.mktemp("cells")


def small(name: str, task: str, tokenizers):
    """The config of an architecture in small, and its tokenizer."""
    continues = architectures.CAUSAL in architectures.TABLE[name] and task != "masked-lm"
    tokenizer = tokenizers["ending" if architectures.REWRITER in architectures.TABLE[name] else "bpe" if continues else "wordpiece"]
    config = model.load_config(Model(init="random", config={"model_type": name}), None, tokenizer)
    config = miniature(config, 2, tokenizer)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    config.classifier_dropout = 0.0  # 0.1 where the config says nothing
    if name == "big_bird":
        config.attention_type = "original_full"
    if name == "reformer":
        config.is_decoder = task == "causal-lm"
        for key, value in reformer.undecided(config, 64, 0).items():
            setattr(config, key, value)
    config.initializer_range = 0.1
    return config, tokenizer


def test_the_table_has_every_new_head_that_there_is():
    classes = {head: getattr(transformers, head)._model_mapping for head in architectures.NEW_HEADS}
    known = {name: {head for head in classes if transformers.CONFIG_MAPPING[name] in classes[head]} for name in architectures.TABLE}
    assert known == {name: architectures.NEW_HEADS & has for name, has in architectures.TABLE.items()}


@pytest.mark.parametrize(("task", "name"), CELLS)
def test_the_table_says_what_a_method_finds(task, name, tokenizers):
    config, tokenizer = small(name, task, tokenizers)
    for kind, method in METHODS.items():
        if architectures.lacking(name, method, TASKS[task]):
            with pytest.raises(RecipeError):
                applied(method, config, tokenizer, TASKS[task])
        else:
            assert any(parameter.requires_grad for parameter in applied(method, config, tokenizer, TASKS[task]).parameters()), kind


def applied(method, config, tokenizer, task):
    """A model without weights with the method applied, a new head on it."""
    base = model.plan(model_spec(), Source("somewhere"), config, tokenizer, task, method)
    base.new = {key for key, _ in base.model.named_parameters() if task.new_head and key.split(".")[0] in base.head}
    return method.apply(base)


def model_spec():
    return Model(name="somewhere")


@pytest.mark.parametrize(("task", "name"), CELLS)
def test_what_is_possible_learns_and_is_saved(task, name, tokenizers, tmp_path, written, request):
    config, tokenizer = small(name, task, tokenizers)
    for key, value in TASKS[task].config_kwargs().items():
        setattr(config, key, value)
    torch.manual_seed(0)
    auto = getattr(transformers, TASKS[task].auto_class)
    (transformers.AutoModel if TASKS[task].new_head else auto).from_config(config).save_pretrained(tmp_path / "base")
    batch = batch_of(TASKS[task], tokenizer)
    tried = chosen(task, name, request.config.getoption("whole_matrix"))
    assert tried
    for kind, method in tried.items():
        base = model.load(
            model_spec().model_copy(update={"name": str(tmp_path / "base")}),
            Source(str(tmp_path / "base")),
            transformers.AutoConfig.from_pretrained(tmp_path / "base"),
            tokenizer,
            TASKS[task],
            method,
            torch.float32,
            0,
            torch.device("cpu"),
        )
        steady_quantised(base.model)
        torch.manual_seed(1)
        learner = method.apply(base)
        learns(learner, base, batch, kind)
        keep(learner, base, method, written / task / f"{name}-{kind.replace('/', '-')}")


def chosen(task, name, whole: bool):
    """The methods by which this architecture is to learn the task."""
    first, step = ((list(TASKS).index(task) + list(architectures.TABLE).index(name)) % EVERY, EVERY) if task in BRIEF and not whole else (0, 1)
    return {kind: method for kind, method in list(METHODS.items())[first::step] if not architectures.lacking(name, method, TASKS[task])}


@pytest.mark.parametrize("task", BRIEF)
def test_a_part_of_the_matrix_has_each_method_of_a_task(task):
    names = [name for name in architectures.TABLE if (task, name) in CELLS]
    parts = [set(chosen(task, name, whole=False)) for name in names]
    assert set().union(*parts) == {kind for name in names for kind in chosen(task, name, whole=True)}


def batch_of(task, tokenizer):
    rows = [{"text": text, "label": ["garden", "harbour", "kitchen", "harbour"][number]} for number, text in enumerate(TEXTS)]
    if task.kind in ("sentence-embedding", "reranking"):
        rows = [{"text": row["text"], "text_pair": f"{row['label']} lamps", "score": number / 4} for number, row in enumerate(rows)]
    if task.kind == "seq2seq":
        rows = [{"source": row["text"], "target": row["label"]} for row in rows]
    if task.kind == "token-classification":
        rows = [{"tokens": row["text"].split(), "tags": [["B-X", "O", "I-X"][place % 3] for place in range(len(row["text"].split()))]} for row in rows]
    if task.kind == "question-answering":
        answers = [row["text"].split()[-1] for row in rows]
        answers = [[{"text": answer, "answer_start": row["text"].rindex(answer)}] for answer, row in zip(answers, rows, strict=True)]
        rows = [{"question": f"in the {row['label']}?", "context": row["text"], "answers": given} for given, row in zip(answers, rows, strict=True)]
    if task.kind in ("causal-lm", "masked-lm", "replaced-token-detection"):
        rows = [{"text": row["text"]} for row in rows]
    if task.kind in ("next-sentence", "sentence-order"):
        rows = [{"text": f"{row['text']}\nin the {row['label']}\nnear the lamps"} for row in rows]
    encoded = [task.encode(Row(row, "rows", number), tokenizer, Limits(64, "right")) for number, row in enumerate(rows)]
    features = FeatureSet.of(encoded)
    if hasattr(task, "corruption"):
        features = replace(features, corruption=task.corruption(features, tokenizer, 0))
    return collate(features, np.arange(len(rows)), tokenizer.pad_token_id)


def learns(learner, base, batch, kind: str) -> None:
    """Two steps move exactly what learns, and flat batches have the gradients of padded ones."""
    beside = base.task.beside(base.model) if hasattr(base.task, "beside") else None
    trainee = Trainee(learner, base.inner(), base.task, Supervised(), beside=beside).train()
    learning = {name: parameter for name, parameter in learner.named_parameters() if parameter.requires_grad}
    heads = {name for name in learning if any(f".{head}." in f".{name}" for head in HEADS)}
    assert heads or not base.task.new_head, kind
    if kind.partition("/")[0] not in ("full", "partial", "head", "bitfit"):
        assert {name for name in learning if not added(name) and ".modules_to_save." not in name} <= heads, kind
    before = {name: parameter.detach().clone() for name, parameter in learner.named_parameters()}
    optimizer = torch.optim.SGD(learning.values(), lr=0.1)
    for _ in range(2):
        trainee(batch).div(trainee.counts(batch)).sum().backward()
        frozen = [name for name, parameter in learner.named_parameters() if parameter.grad is not None and name not in learning]
        assert not frozen, kind
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, parameter in learner.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved <= set(learning), kind
    assert moved, kind
    assert not base.task.new_head or moved & heads, kind
    gradients = []
    for flat in (False, True):
        try:
            layers = attention.Flat(base.model) if flat else None
            trainee.flat = layers
            trainee(batch).sum().backward()
        except attention.Unsupported:
            break
        finally:
            if trainee.flat:
                trainee.flat.remove()
                trainee.flat = None
        gradients.append({name: parameter.grad.clone() for name, parameter in learning.items() if parameter.grad is not None})
        optimizer.zero_grad()
    if len(gradients) == 2:
        largest = max(gradient.abs().max() for gradient in gradients[0].values())
        assert max((gradients[1][name] - gradient).abs().max() for name, gradient in gradients[0].items()) <= 1e-4 * largest, kind


def keep(learner, base, method, directory) -> None:
    """Save what learned, and what it answers."""
    artifact = finish.write_model(method, learner, base, {}, directory / "model")
    padding = 1 if base.model.config.model_type == "mpnet" else None  # whatever its config says
    ids = [[token for token in base.tokenizer(text)["input_ids"] if token != padding] for text in TEXTS]
    rows = [{"input_ids": torch.tensor(each)} for each in ids]
    verify.as_loaded(learner, torch.float32)
    answers = reload.answers(learner.eval(), rows)
    (directory / "artifact.json").write_text(json.dumps(artifact))
    (directory / "rows.json").write_text(json.dumps([row["input_ids"].tolist() for row in rows]))
    reload.save_file(answers, directory / "answers.safetensors")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("task", TASKS)
def test_one_fresh_process_loads_all_that_was_saved(task, written):
    """Runs after the cells of the task above, in their process."""
    if not (written / task).exists():
        pytest.skip("the cells were left out")
    done = subprocess.run([sys.executable, "-P", "-c", FRESH, reload.__file__, str(written / task)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for library, found in json.loads(done.stdout).items():
        assert found["ftkit"] == (library == "ftkit")
        assert found["differences"], library
        assert max(found["differences"].values()) <= 1e-5, found["differences"]
