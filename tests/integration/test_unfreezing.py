"""Gradual unfreezing (ULMFiT): a layer more learns in each epoch, and a resumed run knows which."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ftkit import checkpoint
from ftkit.loop import Position, fit
from ftkit.prepare import prepare
from ftkit.recipe import read
from ftkit.report import Reporter
from ftkit.session import open_session

METHOD = {"kind": "partial", "last": "all", "embeddings": True, "unfreeze_every": 1, "lr_decay": 0.5}
TRAIN = {"epochs": 5, "steps": None, "batch_size": 16, "save_every": 3, "eval_every": 100, "weight_decay": 0.1}


def group(name: str) -> int:
    """Steps down from the head of a BERT of two layers."""
    return 0 if name.startswith("classifier") else 1 if "layer.1." in name or "pooler" in name else 2 if "layer.0." in name else 3


def test_a_group_more_moves_in_each_epoch(recipe):
    with Reporter(None, quiet=True) as report:
        session = open_session(prepare(read(recipe("bert", "single", TRAIN, method=METHOD)), report), report)
        assert [note for note in report.notes if "learning parameters wait for later epochs" in note]
    position, steps = Position(), session.sampler.steps(1)
    training = fit(session, position)
    for epoch in range(5):
        before = {name: parameter.detach().clone() for name, parameter in session.learner.named_parameters()}
        for _ in range(steps):
            next(training)
        moved = {group(name) for name, parameter in session.learner.named_parameters() if not torch.equal(parameter, before[name])}
        assert moved == set(range(min(epoch, 3) + 1))
    assert all(parameter.requires_grad for parameter in session.learner.parameters())


def test_a_resumed_run_has_the_same_bits(recipe, ftkit, tmp_path, verify_here):
    for name in ("whole", "cut"):
        path = recipe("bert", "single", TRAIN, name=f"{name}.yaml", method=METHOD, output=str(tmp_path / name))
        with pytest.MonkeyPatch.context() as patch:
            if name == "cut":
                save, saved = checkpoint.save, []

                def stop(*args, save=save, saved=saved, **kwargs):
                    save(*args, **kwargs)
                    saved.append(args)
                    if len(saved) == 1:
                        raise KeyboardInterrupt

                patch.setattr(checkpoint, "save", stop)
                assert ftkit("train", path).code == 130
        done = ftkit("train", path, *(["--resume"] if name == "cut" else []))
        assert done.code == 0, done.err
    whole, cut = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(value, cut[key]) for key, value in whole.items())
    manifest = json.loads((tmp_path / "cut" / "manifest.json").read_text())
    assert manifest["status"] == "finished"


def test_what_never_learns_is_said(recipe):
    with Reporter(None, quiet=True) as report:
        open_session(prepare(read(recipe("bert", "single", {**TRAIN, "epochs": 2}, method=METHOD)), report), report)
        assert [note for note in report.notes if "parameters never learn: their turn would come after the 2 epochs" in note]


def test_on_several_processes_it_is_refused_beforehand(recipe, ftkit):
    done = ftkit("check", recipe("bert", "single", {**TRAIN, "processes": 2}, method=METHOD))
    assert (done.code, "leave unfreeze_every out, or set processes: 1" in done.err) == (2, True)


def test_the_log_tells_the_rate_of_the_recipe(recipe, ftkit, tmp_path, verify_here):
    train = {"steps": 2, "epochs": None, "learning_rate": 1e-3, "schedule": "constant", "warmup": 0, "log_every": 1}
    method = {"kind": "partial", "last": "all", "embeddings": True, "lr_decay": 0.5}
    assert ftkit("train", recipe("bert", "single", {**TRAIN, **train}, method=method)).code == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert [line["learning_rate"] for line in lines if "learning_rate" in line] == [1e-3, 1e-3]
