"""Names of public benchmarks: each stands for a data set on the hub and brings its columns, its labels and the metrics that are reported of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ftkit.recipe.spec import Default


class Benchmark(NamedTuple):
    """What `data.train: NAME` stands for."""

    train: str  # on the hub
    defaults: Mapping[str, Default]  # dotted recipe key -> value and source


def _of(source: str, train: str, task: Mapping[str, Any], metrics: Sequence[str], columns: Mapping[str, str], **others: str) -> Benchmark:
    values = {f"task.{key}": value for key, value in task.items()} | {f"data.columns.{key}": value for key, value in columns.items()}
    values |= {"eval.metrics": [*metrics]} | {f"data.{split}": other for split, other in others.items()}
    return Benchmark(train, {key: Default(value, source) for key, value in values.items()})


def _classes(*labels: str) -> dict[str, Any]:
    return {"kind": "text-classification", "labels": [*labels]}


def _glue(name: str, task: Mapping[str, Any], metrics: Sequence[str], first: str, second: str | None = None) -> Benchmark:
    columns = {"text": first, **({"text_pair": second} if second else {}), "score" if "problem" in task else "label": "label"}
    return _of("GLUE (arXiv 1804.07461)", f"nyu-mll/glue:{name}", task, metrics, columns)


NUMBERS = {"kind": "text-classification", "problem": "regression"}
ANSWERS = {"kind": "question-answering"}
ENTAILMENT = _classes("entailment", "not_entailment")
INFERENCE = _classes("entailment", "neutral", "contradiction")
KOREAN = "KorNLI and KorSTS (arXiv 2004.03289)"

BENCHMARKS: Mapping[str, Benchmark] = {
    "glue/cola": _glue("cola", _classes("unacceptable", "acceptable"), ["mcc"], "sentence"),
    "glue/sst2": _glue("sst2", _classes("negative", "positive"), ["accuracy"], "sentence"),
    "glue/mrpc": _glue("mrpc", _classes("not_equivalent", "equivalent"), ["f1_binary", "accuracy"], "sentence1", "sentence2"),
    "glue/qqp": _glue("qqp", _classes("not_duplicate", "duplicate"), ["f1_binary", "accuracy"], "question1", "question2"),
    "glue/stsb": _glue("stsb", NUMBERS, ["pearson", "spearman"], "sentence1", "sentence2"),
    "glue/mnli": _glue("mnli", INFERENCE, ["accuracy"], "premise", "hypothesis"),  # its validation_matched and validation_mismatched are both measured
    "glue/qnli": _glue("qnli", ENTAILMENT, ["accuracy"], "question", "sentence"),
    "glue/rte": _glue("rte", ENTAILMENT, ["accuracy"], "sentence1", "sentence2"),
    "glue/wnli": _glue("wnli", _classes("not_entailment", "entailment"), ["accuracy"], "sentence1", "sentence2"),
    "squad": _of("SQuAD 1.1 (arXiv 1606.05250)", "rajpurkar/squad", ANSWERS, ["exact_match", "f1"], {}),
    "squad_v2": _of("SQuAD 2.0 (arXiv 1806.03822)", "rajpurkar/squad_v2", ANSWERS, ["exact_match", "f1"], {}),
    "kornli": _of(
        KOREAN,
        "kakaobrain/kor_nli:multi_nli",
        INFERENCE,
        ["accuracy"],
        {"text": "premise", "text_pair": "hypothesis", "label": "label"},
        validation="kakaobrain/kor_nli:xnli",
        test="kakaobrain/kor_nli:xnli",
    ),
    "korsts": _of(KOREAN, "dkoterwa/kor-sts", NUMBERS, ["spearman", "pearson"], {"text": "sentence1", "text_pair": "sentence2", "score": "score"}),
    "nsmc": _of("github.com/e9t/nsmc", "e9t/nsmc", _classes("negative", "positive"), ["accuracy"], {"text": "document", "label": "label"}, test="e9t/nsmc"),
}
