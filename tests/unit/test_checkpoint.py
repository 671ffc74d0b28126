"""Checkpoints: bitwise round trips, damage of every kind, kills while writing, rotation, full disks."""

import dataclasses
import json
import math
import multiprocessing
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from ftkit import checkpoint
from ftkit.errors import DiskError, RecipeError

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["ftkit.checkpoint", "pytest"])


def eight_bit(name, parameters, lr):
    import bitsandbytes  # takes seconds, which the processes below would pay at every start

    return getattr(bitsandbytes.optim, name)(parameters, lr=lr)


OPTIMIZERS = {
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "adamw_8bit": lambda p: eight_bit("AdamW8bit", p, 1e-2),
    "paged_adamw_8bit": lambda p: eight_bit("PagedAdamW8bit", p, 1e-2),
    "lion_8bit": lambda p: eight_bit("Lion8bit", p, 1e-3),
}


def network() -> nn.Module:
    """Two matrices above bitsandbytes' 4096 elements, vectors below, dropout, a buffer that changes, a frozen part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 70), nn.BatchNorm1d(70), nn.Dropout(0.3), nn.Linear(70, 70), nn.Linear(70, 3))
    model[4].requires_grad_(False)
    return model


def with_groups(model, make):
    learning = [p for p in model.parameters() if p.requires_grad]
    return make(
        [
            {"params": [p for p in learning if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in learning if p.ndim == 1], "weight_decay": 0.0},
        ]
    )


def train(model, optimizer, steps):
    for _ in range(steps):
        rows = torch.randn(8, 70) * random.random() + float(np.random.normal())
        optimizer.zero_grad()
        model(rows).square().mean().backward()
        optimizer.step()


def seed():
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


def capture(model, optimizer, step, **numbers):
    return checkpoint.TrainingState(
        step=step,
        epoch=1,
        batch=step,
        model=checkpoint.learned(model),
        optimizer=checkpoint.capture_optimizer(optimizer, model.named_parameters()),
        rng=checkpoint.capture_rng(),
        environment=checkpoint.environment(1),
        **numbers,
    )


def small(step, **numbers) -> checkpoint.TrainingState:
    """A state without a model behind it; everything in it tells the step."""
    return checkpoint.TrainingState(
        step=step,
        epoch=0,
        batch=step,
        model={"w": torch.full((2000,), float(step))},
        optimizer={"state": {"w": {"m": torch.full((2000,), -float(step))}}, "param_groups": []},
        rng=checkpoint.capture_rng(),
        environment={},
        **numbers,
    )


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def quiet(reason):
    raise AssertionError(f"unexpected note: {reason}")


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_goes_on_bitwise(kind, tmp_path):
    seed()
    model = network()
    optimizer = with_groups(model, OPTIMIZERS[kind])
    train(model, optimizer, 5)
    checkpoint.save(tmp_path, capture(model, optimizer, 5), keep=1)
    train(model, optimizer, 5)

    resumed = network()
    again = with_groups(resumed, OPTIMIZERS[kind])
    state = checkpoint.load(checkpoint.newest(tmp_path, quiet))
    checkpoint.restore_model(resumed, state.model)
    checkpoint.restore_optimizer(again, resumed.named_parameters(), state.optimizer)
    checkpoint.restore_rng(state.rng)
    train(resumed, again, 5)

    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    ours = checkpoint.capture_optimizer(again, resumed.named_parameters())
    theirs = checkpoint.capture_optimizer(optimizer, model.named_parameters())
    assert flat(ours) == flat(theirs)


def flat(tree, path=""):
    """Every leaf by its path; tensors as dtype, shape and bytes."""
    if isinstance(tree, torch.Tensor):
        return {path: (tree.dtype, tuple(tree.shape), tree.detach().reshape(-1).view(torch.uint8).numpy().tobytes())}
    if isinstance(tree, dict):
        return {key: leaf for name, value in tree.items() for key, leaf in flat(value, f"{path}/{name}").items()}
    return {path: tree}


def test_shared_tables_are_stored_once_and_shared_again(tmp_path):
    model = network()
    optimizer = with_groups(model, OPTIMIZERS["adamw_8bit"])
    train(model, optimizer, 1)
    path = checkpoint.save(tmp_path, capture(model, optimizer, 1), keep=1)
    with safe_open(path / "optimizer.safetensors", "pt") as file:
        tables = [name for name in file.keys() if "qmap" in name]  # noqa: SIM118  (not a dict)
    assert len(tables) == 2  # one for each moment, not for each parameter

    again = with_groups(model, OPTIMIZERS["adamw_8bit"])
    checkpoint.restore_optimizer(again, model.named_parameters(), checkpoint.load(path).optimizer)
    states = [again.state[model[0].weight], again.state[model[3].weight]]
    assert states[0]["qmap1"].data_ptr() == states[1]["qmap1"].data_ptr() != states[0]["qmap2"].data_ptr()
    assert states[0]["state1"].data_ptr() != states[1]["state1"].data_ptr()


def test_numbers_survive_exactly(tmp_path):
    numbers = {"best_step": 3, "best_metric": 0.1 + 0.2, "evaluations_since_best": 2, "log_bytes": 2**40 + 1}
    scaler = {"scale": 65536.0, "growth_factor": math.inf, "tiny": 5e-324, "minus": -math.inf, "_growth_tracker": 7}
    path = checkpoint.save(tmp_path, small(3, **numbers, scaler=scaler), keep=1)
    state = checkpoint.load(path)
    assert {name: getattr(state, name) for name in numbers} == numbers
    assert state.scaler == scaler
    assert (state.step, state.epoch, state.batch) == (3, 0, 3)
    assert math.isnan(checkpoint.load(checkpoint.save(tmp_path, small(4, best_metric=math.nan), keep=1)).best_metric)
    for file in path.parent.glob("*/*.json"):
        json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def test_nothing_is_stored_that_json_cannot_hold(tmp_path):
    with pytest.raises(TypeError, match="scaler/odd: cannot keep a set"):
        checkpoint.save(tmp_path, small(1, scaler={"odd": {1}}), keep=1)


def test_random_generators_continue():
    seed()
    random.gauss(0, 1)  # leaves a second number cached, as np.random.normal does
    np.random.normal()
    saved = checkpoint.capture_rng()

    def draw():
        return random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.rand(3).tolist()

    first = draw()
    draw()
    checkpoint.restore_rng(saved)
    assert draw() == first


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "optimizer.json", "rng-0.safetensors", "state.json", "manifest.json"])
def test_any_damage_falls_back_to_the_checkpoint_before(file, tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, small(step), keep=2)
    victim = tmp_path / "step-2" / file
    whole = victim.read_bytes()
    places = sorted({0, len(whole) // 2, len(whole) - 1, *random.Random(file).sample(range(len(whole)), 20)})
    damaged = [whole[:place] for place in places]
    damaged += [whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :] for place in places]
    for content in [*damaged, whole + b"\0", b""]:
        victim.write_bytes(content)
        notes = []
        assert checkpoint.newest(tmp_path, notes.append) == tmp_path / "step-1"
        assert len(notes) == 1
        assert "step-2 is not used: " in notes[0]
        with pytest.raises(DiskError, match="step-2 cannot be used"):
            checkpoint.load(tmp_path / "step-2")
    victim.unlink()
    assert checkpoint.newest(tmp_path, notes.append) == tmp_path / "step-1"
    assert f"{file}: No such file" in notes[-1]
    victim.write_bytes(whole)
    assert checkpoint.newest(tmp_path, quiet) == tmp_path / "step-2"


def test_a_broken_checkpoint_is_written_anew_and_never_pushes_out_a_whole_one(tmp_path):
    for step in (10, 20):
        checkpoint.save(tmp_path, small(step), keep=2)
    (tmp_path / "step-20" / "state.json").write_text("{}")
    checkpoint.save(tmp_path, small(15), keep=1)
    assert checkpoint.newest(tmp_path, lambda _: None) == tmp_path / "step-15"
    checkpoint.save(tmp_path, small(20), keep=1)
    assert checkpoint.newest(tmp_path, quiet) == tmp_path / "step-20"
    assert names(tmp_path) == ["step-20"]


def test_a_whole_checkpoint_of_the_same_step_stays(tmp_path):
    path = checkpoint.save(tmp_path, small(5), keep=1)
    before = (path / "manifest.json").stat().st_ino
    assert checkpoint.save(tmp_path, small(5), keep=1) == path
    assert (path / "manifest.json").stat().st_ino == before
    assert names(tmp_path) == ["step-5"]


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 9, 10, 11):
        checkpoint.save(tmp_path, small(step), keep=2, best=2)
    assert names(tmp_path) == ["step-10", "step-11", "step-2"]
    checkpoint.save(tmp_path, small(12), keep=1, best=11)
    assert names(tmp_path) == ["step-11", "step-12"]


def test_no_checkpoint_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "nowhere", quiet) is None
    (tmp_path / "step-x").mkdir()
    assert checkpoint.newest(tmp_path, quiet) is None


def write_for_ever(root: str) -> None:
    torch.set_num_threads(1)
    last = checkpoint.newest(Path(root), quiet)
    step = int(last.name.removeprefix("step-")) if last else 0
    while True:
        step += 1
        checkpoint.save(Path(root), small(step), keep=1)


def test_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path):
    moments = random.Random(0)
    unfinished, reached = 0, 0
    for kill in range(20):
        writer = processes.Process(target=write_for_ever, args=(str(tmp_path),))
        writer.start()
        while not any(number > reached for number, _ in checkpoint._steps(tmp_path)):
            time.sleep(0.001)
            assert writer.is_alive()
        time.sleep(moments.random() * 0.05)
        writer.kill()
        writer.join()
        unfinished += any(path.name.startswith(".tmp") for path in tmp_path.iterdir())
        newest = checkpoint.newest(tmp_path, quiet)
        assert newest is not None, f"kill {kill} lost every checkpoint"
        state = checkpoint.load(newest)
        assert state.step > reached
        assert state.model["w"].unique().item() == state.step == -state.optimizer["state"]["w"]["m"].unique().item()
        assert not any(path.name.startswith(".tmp") for path in tmp_path.iterdir())
        reached = state.step
    assert unfinished > 0, "no kill hit a checkpoint in the making: the test proves nothing"


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, small(1), keep=1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10_000))
    with pytest.raises(DiskError, match=r"step-2 could not be written: the checkpoint needs 1\.1 MB and only 0\.0 MB are free"):
        checkpoint.save(tmp_path, small(2), keep=1)
    assert names(tmp_path) == ["step-1"]


def write_under_limit(root: str, limit: int) -> None:
    """Every file above `limit` bytes fails to be written: the next best thing to a disk that fills up."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with pytest.raises(DiskError, match=r"File too large .*; older checkpoints are untouched"):
        checkpoint.save(Path(root), small(2), keep=1)


@pytest.mark.parametrize("limit", [100, 9000])  # in the model's tensors; in the generators
def test_a_write_that_fails_midway_leaves_the_older_checkpoint(limit, tmp_path):
    checkpoint.save(tmp_path, small(1), keep=1)
    writer = processes.Process(target=write_under_limit, args=(str(tmp_path), limit))
    writer.start()
    writer.join()
    assert writer.exitcode == 0
    assert names(tmp_path) == ["step-1"]
    assert checkpoint.newest(tmp_path, quiet) == tmp_path / "step-1"


def test_an_unwritable_place_is_a_disk_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="Not a directory"):
        checkpoint.save(tmp_path / "file" / "checkpoints", small(1), keep=1)


def test_another_model_is_refused():
    state = checkpoint.learned(network())
    other = nn.Sequential(nn.Linear(70, 71), nn.BatchNorm1d(71))
    with pytest.raises(RecipeError, match=r"0\.bias is \[71\], in the checkpoint \[70\]; .* \(and \d+ more\)"):
        checkpoint.restore_model(other, state)
    del state["3.weight"]
    with pytest.raises(RecipeError, match=r"3\.weight \[70, 70\] is not in the checkpoint"):
        checkpoint.restore_model(network(), state)


def test_another_optimizer_or_grouping_is_refused():
    model = network()
    saved = checkpoint.capture_optimizer(with_groups(model, OPTIMIZERS["adamw fused"]), model.named_parameters())
    with pytest.raises(RecipeError, match="the checkpoint's optimizer is AdamW with 2 parameter groups, this run's is SGD with 2"):
        checkpoint.restore_optimizer(with_groups(model, OPTIMIZERS["sgd"]), model.named_parameters(), saved)
    single = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(RecipeError, match="with 2 parameter groups, this run's is AdamW with 1"):
        checkpoint.restore_optimizer(single, model.named_parameters(), saved)
    everything = torch.optim.AdamW(model.parameters())
    with pytest.raises(RecipeError, match=r"4\.bias \[3\] is not in the checkpoint"):
        checkpoint.restore_optimizer(everything, model.named_parameters(), saved)


def write_as(rank: int, root: str, barrier) -> None:
    torch.manual_seed(rank)
    checkpoint.save(Path(root), small(7), keep=1, rank=rank, barrier=barrier.wait)


def test_every_process_keeps_its_own_generators(tmp_path):
    barrier = processes.Barrier(2)
    writers = [processes.Process(target=write_as, args=(rank, str(tmp_path), barrier)) for rank in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    path = checkpoint.newest(tmp_path, quiet)
    for rank in range(2):
        expected = torch.Generator().manual_seed(rank).get_state()
        assert torch.equal(checkpoint.load(path, rank).rng["torch"], expected)
    assert checkpoint.load(path, 2).rng == {}


def sharded_run(rank: int, root: str, barrier) -> None:
    """Three steps, save, three more; then the same three from the checkpoint, in fresh objects."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def build():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))  # sizes that 2 does not divide
        model[0].bias.requires_grad_(False)
        fully_shard(model, mesh=mesh)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def steps(model, optimizer):
        for step in range(3):
            rows = torch.randn(4, 7, generator=torch.Generator().manual_seed(10 * step + rank))
            model(rows).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = build()
    steps(model, optimizer)
    state = capture(model, optimizer, 3)
    path = checkpoint.save(Path(root), state, keep=1, rank=rank, barrier=barrier.wait)
    steps(model, optimizer)
    resumed, again = build()
    saved = checkpoint.load(path, rank)
    assert saved.model["1.weight"].shape == (3, 5)  # whole, not this process's share
    checkpoint.restore_model(resumed, saved.model)
    checkpoint.restore_optimizer(again, resumed.named_parameters(), saved.optimizer)
    steps(resumed, again)
    for name, value in checkpoint.learned(model).items():
        assert torch.equal(value, checkpoint.learned(resumed)[name]), name
    dist.destroy_process_group()


def test_a_sharded_model_is_saved_whole_and_restored_in_shares(tmp_path):
    barrier = processes.Barrier(2)
    ranks = [processes.Process(target=sharded_run, args=(rank, str(tmp_path), barrier)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
    assert [rank.exitcode for rank in ranks] == [0, 0]


def test_what_changed_about_the_machine_is_told():
    then = checkpoint.environment(1)
    assert list(checkpoint.changes(then, then)) == []
    assert list(checkpoint.changes(then, checkpoint.environment(2))) == ["processes: 1 before, 2 now"]


def test_the_state_has_no_field_that_is_not_stored():
    stored = {*checkpoint.NUMBERS, "model", "optimizer", "rng"}
    assert stored == {field.name for field in dataclasses.fields(checkpoint.TrainingState)}
