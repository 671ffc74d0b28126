"""`ftkit compress`: a smaller and faster model from a finished run, and what that costs.

Heads and feed-forward units are taken out, the run's own recipe fine-tunes what is left, and its linear layers compute in 8 bits
where that is asked for.  What comes out is a run like any other.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftkit import device, rundir
from ftkit.errors import RecipeError, VerificationFailed
from ftkit.latency import in_turns
from ftkit.opened import open_here, open_run
from ftkit.report import Reporter
from ftkit.summary import leading_metric, share_kept

if TYPE_CHECKING:
    import torch

    from ftkit.data.features import FeatureSet
    from ftkit.data.types import Batch, Row
    from ftkit.opened import Opened
    from ftkit.prune import Part

START = "start"  # what the run starts from, such as the pruned model: no part of what it writes, so that it outlives --overwrite
PLAN = "compress.json"
ROWS = 512  # at most, whose gradients say what is important
COMPARED = 64  # rows that 8 bits are compared on
AGREEMENT = 0.9  # the least share of scores whose largest is the same in 8 bits
ERROR = 0.25  # the largest difference in 8 bits of what is no such score, relative to its size (both as norms)
ROUNDS = 10  # of which latencies are medians
BATCHES = (1, 32)
CARD = """## In 8 bits

The weights are stored in float, and so transformers loads them. `ftkit predict`, `ftkit eval` and `ftkit.load` round its linear layers
below the head to int8, for a CPU.
"""


def compress(
    target: str,
    output: str,
    heads: float | None,
    feed_forward: float | None,
    int8: bool,
    overrides: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make a smaller run in `output` of the one in `target`; returns the summary, which is also in compression.json.

    `heads` and `feed_forward` are the shares that go.  `overrides` are those of `ftkit train`, for the fine-tuning.
    Raises RecipeError for what cannot be made smaller so, VerificationFailed where the result answers otherwise than it must.
    """
    shares = {"--heads": heads, "--feed-forward": feed_forward}
    pruning = any(share is not None for share in shares.values())
    _check_asked(shares, int8, overrides)
    run, here = Path(target), Path(output)
    _check_run(run)
    if run.resolve().is_relative_to(here.resolve()):
        raise RecipeError(f"-o {here} is where the run itself is; choose another output")
    rundir.check(here, resume, overwrite)
    plan = {"run": str(run.resolve()), "heads": heads, "feed_forward": feed_forward}
    if overwrite or not _begun(here, plan):
        if pruning:
            _prune(run, here, plan)
        else:
            _copy(run, here, plan)
    if pruning:
        from ftkit.run import train

        train(str(here / START / "recipe.yaml"), overrides, resume=True)
    with Reporter(None) as report:
        threads = device.use_all_cores()
        compared = {"int8": _quantise(here, report)} if int8 else {}
        summary = {"output": str(here), "models": _table(run, here, pruning, int8, report), "threads": threads} | compared
    rundir.write_json(here / "compression.json", summary)
    return summary


def _check_asked(shares: Mapping[str, float | None], int8: bool, overrides: Sequence[str]) -> None:
    for option, share in shares.items():
        if share is not None and not 0 < share < 1:
            raise RecipeError(f"{option}: {share:g} is no share of a layer that can go; give a number between 0 and 1, such as 0.5")
    if not int8 and not any(shares.values()):
        raise RecipeError("nothing to do: give --heads SHARE, --feed-forward SHARE, --int8, or several of them")
    for override in overrides:
        if override.partition("=")[0].partition(".")[0] in ("model", "output"):
            raise RecipeError(f"{override}: the model is that of the run, and -o says where the smaller one goes; leave it out")
    if overrides and not any(shares.values()):
        raise RecipeError(f"{overrides[0]}: nothing is fine-tuned, since --int8 alone changes no weight; leave it out, or prune with --heads or --feed-forward")


def _check_run(run: Path) -> None:
    if not rundir.is_run(run):
        raise RecipeError(f"{run} is not a run directory; give one that `ftkit train` wrote")
    artifact = rundir.finished(run)["artifact"]
    if artifact["loads_with"] != "transformers":
        raise RecipeError(
            f"{run} holds an adapter, whose base stays as it is; merge the two with `ftkit merge-adapter {run} -o DIR`, "
            "fine-tune DIR (model: DIR, method: full), and compress that run"
        )
    if "quantization_config" in artifact["load_kwargs"]:
        raise RecipeError(f"{run} is stored in few bits, which nothing can be cut from; compress a run on float weights")
    if "quantise" in artifact:
        raise RecipeError(f"{run} is compressed to {artifact['quantise']} already; compress the run that it was made from")


def _begun(here: Path, plan: Mapping[str, Any]) -> bool:
    """Whether what fine-tuning or quantising starts from is there; RecipeError where another run is."""
    if not rundir.is_run(here) or (rundir.read_json(here / rundir.MANIFEST)["status"] == rundir.CLAIMED and not (here / START / PLAN).is_file()):
        return False
    if not (here / START / PLAN).is_file():
        raise RecipeError(f"--resume: the run in {here} was not begun by `ftkit compress`; choose another output")
    if (before := rundir.read_json(here / START / PLAN)) != plan:
        raise RecipeError(f"--resume: {here} was begun with {before}, not with {plan}; give the same again, or choose another output")
    return True


def _claim(here: Path) -> None:
    rundir.claim(here, anew=True)
    shutil.rmtree(here / START, ignore_errors=True)


def _prune(run: Path, here: Path, plan: Mapping[str, Any]) -> None:
    """Write the pruned model and the recipe that fine-tunes it."""
    start = here / START
    with Reporter(None) as report:
        opened = open_here(run, report)
        parts, kept, config = _chosen(opened, plan["heads"], plan["feed_forward"], report)
        _claim(here)
        _write(opened, parts, kept, config, start, report)
    rundir.write_text(start / "recipe.yaml", _recipe(opened, here))
    rundir.write_json(start / PLAN, plan)  # last: all the rest is there


def _chosen(opened: Opened, heads: float | None, feed_forward: float | None, report: Reporter) -> tuple[list[Part], list[torch.Tensor], Any]:
    """What is cut, which units stay, and the config that says so."""
    from ftkit import plugins, prune
    from ftkit.loop import Trainee

    model, recipe = opened.model, opened.recipe
    if hasattr(recipe.task, "read_beside") and recipe.task.read_beside(model, opened.path / "model") is not None:
        raise RecipeError(f"{opened.path}: what learned beside its model for task {recipe.task.kind} would start anew; prune a run that was fine-tuned from it")
    asked: list[tuple[Part, int]] = []
    config = model.config
    for option, share, found, smaller in (
        ("--heads", heads, prune.head_parts, prune.with_fewer_heads),
        ("--feed-forward", feed_forward, prune.feed_forward_parts, prune.with_narrower_layers),
    ):
        if share is None:
            continue
        parts = found(model)
        if len({part.units for part in parts}) > 1:
            raise RecipeError(f"{option}: the layers of {type(model).__name__} differ in size, and its config has one number for all; leave {option} out")
        kept = prune.num_kept(parts[0].units, share, option)
        prune.check_config(model, smaller(model.config, kept), parts, kept, option)
        config = smaller(config, kept)
        asked += [(part, kept) for part in parts]
        report.note(f"{option}: {kept:,} of {parts[0].units:,} stay in each of {len(parts)} layers")
    parts = [part for part, _ in asked]
    features = _training_features(opened, report)
    trainee = Trainee(model, model.base_model, recipe.task, plugins.find("objective", "supervised")())
    with report.stage("weighing heads and units", len(features)) as stage:
        values = prune.importance(model, parts, trainee, features, opened.tokenizer.pad_token_id, stage.advance)
    return parts, [prune.most_important(value, kept) for value, (_, kept) in zip(values, asked, strict=True)], config


def _training_features(opened: Opened, report: Reporter) -> FeatureSet:
    """Those of some training rows, by the seed of the run."""
    from ftkit.data.rows import load_rows

    recipe = opened.recipe
    with report.stage("reading data"):
        rows = load_rows(recipe.data, recipe.task, recipe.train.seed, report.note).train
    chosen = sorted(random.Random(recipe.train.seed).sample(range(len(rows)), min(ROWS, len(rows))))
    return _encoded(opened, "train", [rows[i] for i in chosen], report)


def _encoded(opened: Opened, name: str, rows: list[Row], report: Reporter) -> FeatureSet:
    from ftkit.prepare import tokenise

    recipe = opened.recipe
    return tokenise(name, rows, recipe.task, opened.tokenizer, opened.limits, recipe.data.on_bad_rows, report).features


def _write(opened: Opened, parts: list[Part], kept: list[torch.Tensor], config: Any, start: Path, report: Reporter) -> None:
    """Cut, save, load with plain transformers, and compare with the whole model whose other units are zero."""
    from ftkit import merge, prune, reload, verify

    model, artifact = opened.model, opened.manifest["artifact"]
    rows = merge.sample(opened.tokenizer, opened.limits.max_length)
    with prune.zeroed(model, parts, kept):
        expected = reload.answers(model, rows)
    prune.cut(model, parts, kept, config)
    with report.stage("saving"):
        model.save_pretrained(start)
        opened.tokenizer.save_pretrained(start)
    found = reload.answers(reload.load(start, artifact, str(model.device)), rows)
    difference, problems = verify.compare(expected, found, merge.TOLERANCE[artifact["load_kwargs"]["dtype"]] * verify.scale(expected))
    if problems:
        raise VerificationFailed(
            f"{start} does not answer as {opened.path} does with the same heads and units at zero, so its layers are not what they seem: {problems[0]}"
        )
    report.note(f"pruned outputs differ by {difference:.2g} at most from those of the whole model with the same heads and units at zero")


def _recipe(opened: Opened, here: Path) -> str:
    """That of the run, from the pruned model: its tokenizer, config and added tokens are in there."""
    from ftkit.recipe import document
    from ftkit.recipe.spec import Model

    values = opened.recipe.model_dump()
    before = opened.recipe.model
    values["model"] = Model(name=str((here / START).resolve()), dtype=before.dtype, attention=before.attention).model_dump()
    values["output"] = str(here.resolve())
    if values["method"].get("reinit"):
        values["method"]["reinit"] = 0  # what was drawn anew has learned
    return document.dump(values)


def _copy(run: Path, here: Path, plan: Mapping[str, Any]) -> None:
    """The run once more, without its checkpoints and what was measured later."""
    from ftkit.recipe import dump, read

    recipe = read(run / "recipe.yaml").recipe
    _claim(here)
    for name in ("model", "predictions", "plots", "metrics.json", "details.json", "log.jsonl", "README.md"):
        if (run / name).exists():  # without sets to measure on there are no predictions
            (shutil.copytree if (run / name).is_dir() else shutil.copy)(run / name, here / name)
    rundir.write_text(here / "recipe.yaml", dump(recipe.model_copy(update={"output": str(here.resolve())})))
    rundir.write_json(here / rundir.MANIFEST, rundir.read_json(run / rundir.MANIFEST))
    rundir.write_json(here / START / PLAN, plan)


def _quantise(here: Path, report: Reporter) -> dict[str, float]:
    """Let the manifest of the run say that it computes in 8 bits, and measure it so; returns how alike the two answer."""
    from accelerate.state import AcceleratorState

    from ftkit import int8, remeasure

    manifest = rundir.read_json(here / rundir.MANIFEST)
    if "quantised" not in manifest:
        manifest["quantised"] = _compare(here, report)
        manifest["artifact"]["quantise"] = int8.KIND
        card = (here / "README.md").read_text(encoding="utf-8")
        rundir.write_text(here / "README.md", f"{card.rstrip()}\n\n{CARD}")
        rundir.write_json(here / rundir.MANIFEST, manifest)
    if len(rundir.read_json(here / "metrics.json")) > 1:  # there are sets to measure on
        AcceleratorState._reset_state(True)  # accelerate 1.15 keeps the device and precision of the training otherwise
        remeasure.evaluate(str(here))
    return manifest["quantised"]


def _compare(here: Path, report: Reporter) -> dict[str, float]:
    """How alike the model answers in float and in 8 bits; VerificationFailed where that is too little."""
    import torch

    from ftkit import int8, reload, verify

    opened = open_run(here, torch.device("cpu"))
    rows = verify.choose(_measured_features(opened), COMPARED)
    with report.stage("comparing 8 bits"):
        expected = reload.answers(opened.model, rows)
        int8.quantise(opened.model)
        compared = alike(expected, reload.answers(opened.model, rows))
    told = ", ".join(f"{name} {value:.4f}" for name, value in compared.items())
    if compared["agreement"] < AGREEMENT if "agreement" in compared else compared["error"] > ERROR:
        raise VerificationFailed(
            f"{here} answers otherwise in 8 bits ({told}; agreement {AGREEMENT} or, without classes, error {ERROR} is allowed); leave --int8 out"
        )
    report.note(f"in 8 bits, on {len(rows)} rows: {told}")
    return compared | {"rows": len(rows)}


def alike(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """error: |found - expected| / |expected| of all outputs, as norms; agreement: the share of scores whose largest is the same, if there are any."""
    difference = sum((found[name] - value).square().sum().item() for name, value in expected.items())
    size = sum(value.square().sum().item() for value in expected.values())
    scores = [name for name, value in expected.items() if name.endswith("logits") and value.shape[-1] > 1]
    same = [agreed for name in scores for agreed in (found[name].argmax(-1) == expected[name].argmax(-1)).flatten().tolist()]
    return {"error": (difference / size) ** 0.5} | ({"agreement": sum(same) / len(same)} if same else {})


def _measured_features(opened: Opened) -> FeatureSet:
    """Those of the first validation set, else of the test set, else of training rows; the run has said of them what there is to say."""
    from ftkit.data.rows import load_rows

    recipe = opened.recipe
    rows = load_rows(recipe.data, recipe.task, recipe.train.seed, lambda text: None)
    measured = next(iter(rows.validation.values()), rows.test or rows.train)
    with Reporter(None, quiet=True) as report:
        return _encoded(opened, "measured", [measured[i] for i in range(min(ROWS, len(measured)))], report)


def _table(run: Path, here: Path, pruned: bool, int8: bool, report: Reporter) -> list[dict[str, Any]]:
    """A row for the model of the run, the pruned one in float, and the one in 8 bits, as far as there are any."""
    import torch

    from ftkit import int8 as eight_bits
    from ftkit import reload

    cpu = torch.device("cpu")
    whole = open_run(run, cpu)
    models = {"before": whole.model}
    if pruned:
        models["pruned"] = reload.load(here / "model", rundir.read_json(here / rundir.MANIFEST)["artifact"], "cpu")
    parameters = [sum(parameter.numel() for parameter in model.parameters()) for model in models.values()]
    if int8:
        models[eight_bits.KIND] = open_run(here, cpu).model
        parameters.append(parameters[-1])
    features = _measured_features(whole)
    with report.stage("timing"):
        seconds = {size: latencies(models, _batch(whole, features, size)) for size in BATCHES}
    metric, scores = _scores(run, here, pruned, int8)
    return [
        {
            "model": name,
            "parameters": count,
            "bytes_on_disk": _bytes_of_weights(run if name == "before" else here),
            "bytes_loaded": eight_bits.num_bytes(model),
            **{f"seconds_batch_{size}": found[name] for size, found in seconds.items()},
            "metric": metric,
            "score": score,
            "kept": share_kept(metric, score, scores[0]) if metric and score and scores[0] else None,
        }
        for (name, model), count, score in zip(models.items(), parameters, scores, strict=True)
    ]


def _bytes_of_weights(run: Path) -> int:
    return sum(path.stat().st_size for path in (run / "model").glob("*.safetensors"))


def _batch(opened: Opened, features: FeatureSet, size: int) -> Batch:
    import numpy as np

    from ftkit.data.batches import collate

    return collate(features, np.arange(size) % len(features), opened.tokenizer.pad_token_id)


def latencies(models: Mapping[str, Any], batch: Batch) -> dict[str, float]:
    """Median seconds of a forward pass of each model on a CPU."""
    import torch

    def passing(model: Any) -> Callable[[int], Any]:
        decoder = {"decoder_input_ids": batch.input_ids} if model.config.is_encoder_decoder and model.can_generate() else {}
        return lambda turn: model(**batch.inputs, **decoder)

    with torch.no_grad():
        return in_turns({name: passing(model) for name, model in models.items()}, ROUNDS)


def _scores(run: Path, here: Path, pruned: bool, int8: bool) -> tuple[str | None, list[float | None]]:
    """The metric that leads on the first validation set, else on the test set; its value for each model."""
    from ftkit.recipe import read

    files = [run / "metrics.json", *([here / "metrics.json"] if pruned else [])]
    before = rundir.read_json(files[0])
    name = next((name for name in before if name != "base"), None)
    if name is None:
        return None, [None] * (len(files) + int8)
    metric = leading_metric(read(run / "recipe.yaml").recipe.task, before[name])
    if int8:
        files.append(here / "eval" / name / "metrics.json")
    return metric, [rundir.read_json(file)[name].get(metric) for file in files]
