"""The end of a run whose model is shared out among processes."""

from types import SimpleNamespace

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ftkit import finish, model
from ftkit.methods.full import Full
from ftkit.methods.lora import LoRA
from ftkit.recipe.spec import Model
from ftkit.sources import locate
from ftkit.tasks.text_classification import TextClassification

CPU = torch.device("cpu")


@pytest.fixture
def mesh(tmp_path):
    """A process group of one, over which FSDP2 shards as over many."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("method", [Full(), LoRA()], ids=["full", "lora"])
def test_a_sharded_model_is_whole_again_before_it_is_written(mesh, checkpoint, tokenizers, monkeypatch, method):
    spec, task = Model(name=checkpoint("bert")), TextClassification(labels=("a", "b"))
    source = locate(spec)

    def load(*_) -> model.Base:
        return model.load(spec, source, model.load_config(spec, source), tokenizers["wordpiece"], task, method, torch.float32, 0, CPU)

    base = load()
    learner = method.apply(base)
    for layer in base.inner().encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(learner, mesh=mesh)
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.add_(0.5 if parameter.requires_grad else 0.0)
    expected = {name: parameter.full_tensor() for name, parameter in learner.named_parameters()}
    assert all(hasattr(parameter, "placements") for parameter in learner.parameters())

    monkeypatch.setattr(finish, "load_base", load)
    recipe = SimpleNamespace(method=method)
    session = SimpleNamespace(learner=learner, base=base, prepared=None, precision="fp32", recipe=recipe, accelerator=SimpleNamespace(is_main_process=True))
    finish._gather(session)
    found = dict(session.learner.named_parameters())
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert not hasattr(found[name], "placements")
        torch.testing.assert_close(found[name].data, tensor, rtol=0, atol=0, msg=name)
