"""README.md of a run: what the hub wants to know of a model, and what a reader does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from pprint import pformat
from typing import TYPE_CHECKING, Any

from ftkit.quantities import denominator, interval, number
from ftkit.summary import leading_metric

if TYPE_CHECKING:
    from ftkit.recipe.spec import Recipe

Measured = Mapping[str, Mapping[str, float]]  # split -> metric -> value

LISTED_CLASSES = 30  # up to here the card has a table of classes
SHOWN_CHARACTERS = 200  # of an answer
PIPELINE_TAGS = {  # transformers' Auto class -> the hub's name for what a model with that head does
    "AutoModel": "sentence-similarity",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSeq2SeqLM": "text2text-generation",
}


def model_card(recipe: Recipe[Any, Any, Any], manifest: Mapping[str, Any], metrics: Mapping[str, Any], details: Mapping[str, Mapping[str, Any]]) -> str:
    """The card of a finished run, of what manifest.json, metrics.json and details.json hold.

    Nothing in it tells where on this machine anything lies: a local model or file goes by its own name.
    """
    import yaml

    base = metrics.get("base", {})
    tuned = {split: values for split, values in metrics.items() if split != "base"}
    front = yaml.safe_dump(_front_matter(recipe, manifest, tuned), sort_keys=False, allow_unicode=True)
    as_prompt = recipe.method.positions and manifest["artifact"]["loads_with"] == "peft"
    as_embedding = _library(recipe, manifest) == "sentence-transformers"
    sections = [
        f"---\n{front}---",
        f"# {Path(recipe.output).name}",
        _story(recipe, manifest, base, tuned),
        f"## Load it\n\nFrom inside the run directory:\n\n```python\n{_loading_code(manifest)}\n```"
        + ("\n\nSo it answers rows one by one; `ftkit.load('model')` takes rows side by side, too, padded on either side." if as_prompt else "")
        + ("\n\nSo it gives the states of tokens; `SentenceTransformer('model')` of sentence-transformers gives embeddings." if as_embedding else ""),
        "\n\n".join(["## Results", _results(base, tuned, details), *_classes(details), *_samples(details)]),
        f"## Training\n\n{_hyperparameters(recipe, manifest)}",
    ]
    if check := manifest.get("verification"):
        sections.append(
            f"## Verification\n\nA fresh process loaded `model/` with {manifest['artifact']['loads_with']} and compared its outputs with those "
            f"before saving: largest difference {check['max_difference']:.2g}, tolerance {check['tolerance']:.2g}."
        )
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items() if version)
    sections.append(f"## Versions\n\n{versions}. `recipe.yaml` beside this file repeats the run.")
    return "\n\n".join(sections) + "\n"


def public_name(name: str) -> str:
    """A hub id as it is; of a path only the last part, for a run's `model` folder the run's."""
    path = Path(name)
    if not path.is_absolute():
        return name
    return path.parent.name if path.name == "model" else path.name


def _front_matter(recipe: Recipe[Any, Any, Any], manifest: Mapping[str, Any], tuned: Measured) -> dict[str, Any]:
    """What the hub reads, in its own words: huggingface.co/docs/hub/model-cards."""
    artifact, name = manifest["artifact"], recipe.model.name
    adapter = artifact["loads_with"] != "transformers"
    front: dict[str, Any] = {}
    if name and not Path(name).is_absolute() and recipe.model.init == "pretrained":
        front |= {"base_model": name, "base_model_relation": "adapter" if adapter else "finetune"}
    front["library_name"] = _library(recipe, manifest)
    if tag := PIPELINE_TAGS.get(artifact["auto_class"]):
        front["pipeline_tag"] = tag
    if hub := [re.sub("[:@].*", "", source) for source in _sources(recipe) if not Path(source).is_absolute()]:
        front["datasets"] = hub
    front["tags"] = ["ftkit", recipe.task.kind, recipe.method.kind]
    results = [
        {
            "task": {"type": front.get("pipeline_tag", recipe.task.kind)},
            "dataset": {"name": ", ".join(map(public_name, _sources(recipe))), "type": hub[0] if hub else "local", "split": split},
            "metrics": [{"type": metric, "value": value} for metric, value in values.items() if metric != "loss_count"],
        }
        for split, values in tuned.items()
    ]
    if results:
        front["model-index"] = [{"name": Path(recipe.output).name, "results": results}]
    return front


def _library(recipe: Recipe[Any, Any, Any], manifest: Mapping[str, Any]) -> str:
    """What loads the model, as the hub calls it."""
    loads_with = manifest["artifact"]["loads_with"]
    laid_out = hasattr(recipe.task, "lay_out") and loads_with in ("transformers", "peft") and not recipe.method.positions
    return "sentence-transformers" if laid_out else loads_with


def _sources(recipe: Recipe[Any, Any, Any]) -> list[str]:
    train = recipe.data.train
    return [train] if isinstance(train, str) else list(train)


def _story(recipe: Recipe[Any, Any, Any], manifest: Mapping[str, Any], base: Measured, tuned: Measured) -> str:
    """Two sentences: what was trained on what, and what that changed."""
    counts, model, train = manifest["parameters"], recipe.model, recipe.train
    start = f"`{public_name(model.name)}`" if model.name else f"a new `{manifest['model']['architecture']}`"
    if model.init == "random":
        start += ", from random weights,"
    rows = f"{manifest['data']['audit']['train']['rows']:,} rows of {', '.join(f'`{public_name(source)}`' for source in _sources(recipe))}"
    length = f"{train.steps:,} steps" if train.steps else f"{train.epochs:g} epochs"
    taught = f", as a student of `{public_name(recipe.objective.teacher)}`" if hasattr(recipe.objective, "teacher") else ""
    done = (
        f"{start[0].upper()}{start[1:]} was trained for `{recipe.task.kind}` with method `{recipe.method.kind}`, which changes "
        f"{counts['trainable']:,} of {counts['total']:,} parameters, on {rows} for {'at most ' if train.early_stopping else ''}{length}{taught}."
    )
    if not tuned:
        return f"{done} How good it is was not measured: there were no rows to measure it on."
    split, values = next(iter(tuned.items()))
    metric = leading_metric(recipe.task, values)
    before = base.get(split, {}).get(metric)
    return f"{done} Its {metric} on {split} is {number(values[metric])}; before training it was {'not measured' if before is None else number(before)}."


def _loading_code(manifest: Mapping[str, Any]) -> str:
    """Python that does what the verification did."""
    artifact = manifest["artifact"]
    if artifact["loads_with"] == "ftkit":
        return "import ftkit\nfrom transformers import AutoTokenizer\n\nmodel = ftkit.load('model')\ntokenizer = AutoTokenizer.from_pretrained('model')"
    auto, kwargs = artifact["auto_class"], dict(artifact["load_kwargs"])
    if "id2label" in kwargs:
        kwargs["id2label"] = {int(index): label for index, label in kwargs["id2label"].items()}
    imports = [auto, "AutoTokenizer"]
    adapter = artifact["loads_with"] == "peft"
    if adapter and artifact.get("revision"):
        kwargs["revision"] = artifact["revision"]
    arguments = [f"{key}={pformat(value, width=100, compact=True, sort_dicts=False)}" for key, value in kwargs.items() if key != "quantization_config"]
    if quantization := kwargs.get("quantization_config"):
        imports.append("BitsAndBytesConfig")
        inner = ", ".join(f"{key}={value!r}" for key, value in quantization.items())
        arguments.append(f"quantization_config=BitsAndBytesConfig({inner})")
    device = "cuda" if manifest["hardware"]["gpus"] else "cpu"
    if quantization or device != "cpu":
        arguments.append(f"device_map={device!r}")
    lines = [f"from transformers import {', '.join(sorted(imports))}", ""]
    name = repr("model")
    if adapter:
        lines.insert(0, "from peft import PeftModel")
        name = repr("model/base" if artifact["base"] == "base" else artifact["base"])
        if Path(artifact["base"]).is_absolute():  # the hub may have another model of that name
            name = "path"
            lines.append(_local_base(artifact["base"], manifest))
    loaded = "".join(f"    {argument},\n" for argument in [name, *arguments])
    lines.append(f"{'base' if adapter else 'model'} = {auto}.from_pretrained(\n{loaded})")
    if adapter:
        lines.append("model = PeftModel.from_pretrained(base, 'model')")
    own_code = ", trust_remote_code=True" if kwargs.get("trust_remote_code") else ""
    return "\n".join([*lines, f"tokenizer = AutoTokenizer.from_pretrained('model'{own_code})"])


def _local_base(base: str, manifest: Mapping[str, Any]) -> str:
    """A line for the reader to complete, with what tells the right model."""
    name = public_name(base) + ("/model" if Path(base).name == "model" else "")
    digest = (manifest.get("verification") or {}).get("base_sha256")
    known = f"; sha256 over its tensors, in manifest.json: {digest}" if digest else ""
    return f"path = {f'PATH/TO/{name}'!r}  # the local model that this was trained on{known}"


def _results(base: Measured, tuned: Measured, details: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of base and tuned; the loss with what it is a mean over."""
    drawn = {split: found["intervals"] for split, found in details.items() if "intervals" in found}
    rows = []
    for split, values in tuned.items():
        for metric, value in values.items():
            if metric != "loss_count":
                name = f"{metric}{denominator(values) if metric == 'loss' else ''}"
                between = (interval(drawn.get(split, {}).get(metric)),) if drawn else ()
                rows.append((split, name, number(base.get(split, {}).get(metric)), number(value), *between))
    if not rows:
        return "None: there were no validation and no test rows."
    if not drawn:
        return _table(("set", "metric", "base", "tuned"), rows)
    return f"{_table(('set', 'metric', 'base', 'tuned', '95 % interval'), rows)}\n\nIntervals are those of 1,000 bootstrap samples of the set."


def _classes(details: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of the classes of each set that has some, but not too many."""
    return [
        f"Classes of {split}:\n\n"
        + _table(
            ("class", "precision", "recall", "f1", "rows"),
            [(name, *(number(values[key]) for key in ("precision", "recall", "f1")), f"{values['support']:,}") for name, values in found["classes"].items()],
        )
        for split, found in details.items()
        if 0 < len(found.get("classes", {})) <= LISTED_CLASSES
    ]


def _samples(details: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the model wrote before training and after, beside the right answers."""
    shown = ("asked", "reference", "before", "after")
    return [
        f"Answers to rows of {split}:\n\n{_table(shown, [[_short(sample[key]) for key in shown] for sample in found['samples']])}"
        for split, found in details.items()
        if "samples" in found
    ]


def _short(text: str | None) -> str:
    """The beginning, in one line."""
    line = " ".join((text or "-").split())
    return line if len(line) <= SHOWN_CHARACTERS else f"{line[:SHOWN_CHARACTERS]}..."


def _hyperparameters(recipe: Recipe[Any, Any, Any], manifest: Mapping[str, Any]) -> str:
    """The settings that others will want to compare; recipe.yaml has all of them."""
    train = recipe.train
    settings = {
        "learning rate": f"{train.learning_rate:g}, {train.schedule}, warm-up {train.warmup:g}",
        "length": f"{train.steps:,} steps" if train.steps else f"{train.epochs:g} epochs",
        "batch size": f"{train.batch_size} rows a step" if train.batch_size else f"{train.batch_tokens:,} tokens a step",
        "max length": f"{recipe.data.max_length} tokens",
        "optimizer": f"{train.optimizer}, weight decay {train.weight_decay:g}",
        "precision": manifest["precision"],
        "seed": train.seed,
        **{f"{recipe.method.kind}: {key}": value for key, value in recipe.method.model_dump().items() if key != "kind" and value is not None},
    }
    return _table(("setting", "value"), settings.items())


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Markdown."""
    lines = (" | ".join(str(cell).replace("|", "\\|") for cell in row) for row in (header, ["---"] * len(header), *rows))
    return "\n".join(f"| {line} |" for line in lines)
