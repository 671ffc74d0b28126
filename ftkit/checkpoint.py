"""The complete training state on disk: safetensors and JSON only, whole or not there at all.

    root/step-N/
        model.safetensors       what learns, and the buffers
        optimizer.safetensors   the tensors of the optimizer's state, by path; one that entries share is stored once
        optimizer.json          its structure and numbers, by parameter name
        rng-R.safetensors       the random generators of process R
        state.json              where the run is, and what it ran on
        manifest.json           size and sha256 of every file; written last

A checkpoint is staged beside its place, synced and renamed; only then are older ones removed.  A kill at
any moment therefore leaves the last complete checkpoint, which `newest` finds.
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from hashlib import file_digest
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ftkit.errors import DiskError, RecipeError

Tensors = dict[str, torch.Tensor]

MODEL, OPTIMIZER, STRUCTURE, STATE, MANIFEST = (
    "model.safetensors",
    "optimizer.safetensors",
    "optimizer.json",
    "state.json",
    "manifest.json",
)
STAGED = ".tmp-"  # whatever begins so is unfinished, or on its way out
HEADROOM = 1 << 20  # bytes for the JSON files and the generators


@dataclass(kw_only=True)
class TrainingState:
    """Everything that decides how a run goes on."""

    step: int  # optimizer steps done
    epoch: int
    batch: int  # batches of this epoch done
    model: Tensors  # of `learned`
    optimizer: dict[str, Any]  # of `capture_optimizer`
    rng: Tensors  # of `capture_rng`: this process's own
    environment: dict[str, Any]  # of `environment`
    best_step: int | None = None  # where the best validation metric was measured
    best_metric: float | None = None
    evaluations_since_best: int = 0  # for early stopping
    evaluation_due: bool = False  # the evaluation after this step was cut off
    log_bytes: int = 0  # length of log.jsonl: what was logged after this step is to be cut off
    scaler: dict[str, Any] = field(default_factory=dict)  # GradScaler.state_dict() under fp16


NUMBERS = tuple(f.name for f in fields(TrainingState) if f.name not in ("model", "optimizer", "rng"))


# --- writing ---------------------------------------------------------------------------------------------


def save(
    root: Path,
    state: TrainingState,
    keep: int,
    best: int | None = None,
    *,
    rank: int = 0,
    barrier: Callable[[], None] = lambda: None,
) -> Path:
    """Write root/step-N for N = state.step, then remove all but the `keep` newest and the step `best`.

    Every process calls it: process 0 writes what they share, each its own generators, with `barrier`
    between.  A complete checkpoint of the same step is left as it is.  Raises DiskError, and leaves the
    older checkpoints untouched, if the disk is full or refuses.
    """
    final, staging = root / f"step-{state.step}", root / f"{STAGED}step-{state.step}"
    try:
        if rank == 0:
            remove(staging)
            staging.mkdir(parents=True)
        barrier()
        save_file(state.rng, staging / f"rng-{rank}.safetensors")
        if rank == 0:
            _write_shared(staging, state)
        barrier()
        if rank == 0:
            _publish(staging, final)
            _rotate(root, state.step, keep, best)
        barrier()
    except (OSError, SafetensorError) as error:
        if rank == 0:
            shutil.rmtree(staging, ignore_errors=True)  # the first error is the one to report
        raise DiskError(f"{final} could not be written: {error}; older checkpoints are untouched") from error
    return final


def _write_shared(staging: Path, state: TrainingState) -> None:
    tensors: Tensors = {}
    structure = _pack(state.optimizer, "", tensors, {})
    numbers = _pack({name: getattr(state, name) for name in NUMBERS}, "", {}, {})
    model = {name: _on_disk(tensor) for name, tensor in state.model.items()}
    _require_space(staging, sum(tensor.nbytes for tensor in chain(model.values(), tensors.values())) + HEADROOM)
    save_file(model, staging / MODEL)
    save_file(tensors, staging / OPTIMIZER)
    (staging / STRUCTURE).write_text(json.dumps(structure, allow_nan=False), encoding="utf-8")
    (staging / STATE).write_text(json.dumps(numbers, allow_nan=False, indent=1), encoding="utf-8")


def _require_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"the checkpoint needs {needed / 1e6:,.1f} MB and only {free / 1e6:,.1f} MB are free; free some space and run the same command with --resume"
        )


def _publish(staging: Path, final: Path) -> None:
    """Seal what is staged and move it into place; the rename is the moment at which it exists."""
    names = sorted(path.name for path in staging.iterdir())
    for name in names:
        _sync(staging / name)
    (staging / MANIFEST).write_bytes(_manifest({name: _fingerprint(staging / name) for name in names}))
    _sync(staging / MANIFEST)
    _sync(staging)
    if final.exists():
        if flaw(final) is None:
            remove(staging)
            return
        remove(final)
    staging.rename(final)
    _sync(final.parent)


def _rotate(root: Path, step: int, keep: int, best: int | None) -> None:
    # steps after the one just written are broken ones that `newest` passed over: they must not count
    for number, path in [entry for entry in _steps(root) if entry[0] <= step][keep:]:
        if number != best:
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint, if it is there, so that a kill in between leaves no half of it under its name."""
    if path.exists():
        doomed = path.with_name(f"{STAGED}removed-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fingerprint(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": file_digest(file, "sha256").hexdigest()}


def _manifest(files: Mapping[str, dict[str, int | str]]) -> bytes:
    """The one spelling of a manifest: any other byte in the file means that it is damaged."""
    return json.dumps({"files": files}, indent=1, sort_keys=True).encode()


# --- finding and reading ---------------------------------------------------------------------------------


def _steps(root: Path) -> list[tuple[int, Path]]:
    """The step directories, newest first, whole or not."""
    found = ((path.name.removeprefix("step-"), path) for path in root.glob("step-*"))
    return sorted(((int(number), path) for number, path in found if number.isdecimal()), reverse=True)


def newest(root: Path, note: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint, every hash verified; None if there is none.

    `note` is told why a newer one is passed over.  Removes what a killed run left unfinished, so that
    with several processes only the first may call it.
    """
    for unfinished in root.glob(f"{STAGED}*"):
        shutil.rmtree(unfinished)
    for _, path in _steps(root):
        reason = flaw(path)
        if reason is None:
            return path
        note(f"{path} is not used: {reason}")
    return None


def flaw(path: Path) -> str | None:
    """Why this checkpoint is not whole; None if it is."""
    try:
        sealed = (path / MANIFEST).read_bytes()
        files = json.loads(sealed)["files"]
        for name, fingerprint in files.items():
            if _fingerprint(path / name) != fingerprint:
                return f"{name} is not what was written"
        return None if _manifest(files) == sealed else f"{MANIFEST} is not what was written"
    except OSError as error:
        return f"{Path(str(error.filename)).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"


def load(path: Path, rank: int = 0) -> TrainingState:
    """Read a checkpoint, all tensors on the CPU; `rng` is empty if process `rank` was not part of the run.

    Raises DiskError if it is not whole.
    """
    reason = flaw(path)
    if reason is not None:
        raise DiskError(f"{path} cannot be used: {reason}")
    generators = path / f"rng-{rank}.safetensors"
    return TrainingState(
        **_unpack(json.loads((path / STATE).read_bytes()), {}),
        model=load_file(path / MODEL),
        optimizer=_unpack(json.loads((path / STRUCTURE).read_bytes()), load_file(path / OPTIMIZER)),
        rng=load_file(generators) if generators.exists() else {},
    )


# --- trees of tensors and numbers ------------------------------------------------------------------------


def _on_disk(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as safetensors takes it: on the CPU, contiguous, alone in its storage."""
    value = tensor.detach().cpu()
    alone = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
    return value if alone else value.clone(memory_format=torch.contiguous_format)


def _pack(value: Any, path: str, tensors: Tensors, owners: dict[Any, str]) -> Any:
    """`value` as JSON; its tensors go to `tensors` under their path, one that is met again only once.

    bitsandbytes' 8-bit state shares its quantisation tables between all parameters.
    """
    match value:
        case torch.Tensor():
            identity = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride()) if value.numel() else path
            owner = owners.setdefault(identity, path)
            if owner == path:
                tensors[path] = _on_disk(value)
            return {"$tensor": owner}
        case dict():
            return {key: _pack(entry, f"{path}/{key}" if path else key, tensors, owners) for key, entry in value.items()}
        case tuple():
            return {"$tuple": [_pack(entry, f"{path}/{i}", tensors, owners) for i, entry in enumerate(value)]}
        case list():
            return [_pack(entry, f"{path}/{i}", tensors, owners) for i, entry in enumerate(value)]
        case float() if not math.isfinite(value):
            return {"$float": repr(value)}
        case None | bool() | int() | float() | str():
            return value  # JSON spells a finite float by its repr, which is exact
    raise TypeError(f"{path}: cannot keep a {type(value).__name__} in a checkpoint")


def _unpack(value: Any, tensors: Tensors) -> Any:
    match value:
        case {"$tensor": str(owner)}:
            return tensors[owner]
        case {"$tuple": list(entries)}:
            return tuple(_unpack(entry, tensors) for entry in entries)
        case {"$float": str(text)}:
            return float(text)
        case dict():
            return {key: _unpack(entry, tensors) for key, entry in value.items()}
        case list():
            return [_unpack(entry, tensors) for entry in value]
    return value


# --- the model -------------------------------------------------------------------------------------------


def _whole(value: Any) -> Any:
    """A sharded tensor (FSDP2) gathered from all processes; anything else as it is."""
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value  # no GPU could hold all of them


def _sharded_like(value: torch.Tensor, target: Any) -> torch.Tensor:
    """The share of `value` that this process holds of `target`, if that is sharded."""
    if not hasattr(target, "placements") or value.shape != target.shape:
        return value
    from torch.distributed.tensor import distribute_tensor  # 0.9 s that only sharded runs pay

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def learned(model: nn.Module) -> Tensors:
    """What training changes: parameters that learn, and buffers.  Collective if the model is sharded."""
    parameters = ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
    return {name: _whole(tensor.detach()) for name, tensor in chain(parameters, model.named_buffers())}


def restore_model(model: nn.Module, saved: Tensors) -> None:
    """Write what `learned` saved back into the model.  Raises RecipeError if it is another model."""
    targets = {name: p for name, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers())
    _refuse_other({name: tuple(t.shape) for name, t in targets.items()}, {name: tuple(t.shape) for name, t in saved.items()})
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(_sharded_like(saved[name], target))


def _refuse_other(now: Mapping[str, tuple[int, ...]], then: Mapping[str, tuple[int, ...]]) -> None:
    differences = [
        *(f"{name} {list(now[name])} is not in the checkpoint" for name in now.keys() - then.keys()),
        *(f"{name} {list(then[name])} is only in the checkpoint" for name in then.keys() - now.keys()),
        *(f"{name} is {list(now[name])}, in the checkpoint {list(then[name])}" for name in now if now[name] != then.get(name, now[name])),
    ]
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise RecipeError(
            f"the checkpoint belongs to another model or method: {'; '.join(sorted(differences)[:3])}{more}; "
            "resume with the recipe that started the run, or start anew with --overwrite"
        )


# --- the optimizer ---------------------------------------------------------------------------------------


def _named_groups(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in named}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def capture_optimizer(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    """The optimizer's state by parameter name; `named` is what `model.named_parameters()` gives.

    References the live tensors: save or copy them before the next step.  Collective if they are sharded.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    parameters = dict(named)
    groups = _named_groups(optimizer, parameters.items())
    names = list(chain.from_iterable(groups))
    live = optimizer.state_dict()
    return {
        "kind": type(optimizer).__name__,
        "shapes": {name: tuple(parameters[name].shape) for name in names},
        "state": {names[i]: {key: _whole(value) for key, value in entry.items()} for i, entry in live["state"].items()},
        "param_groups": [group | {"params": members} for group, members in zip(live["param_groups"], groups, strict=True)],
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]], saved: dict[str, Any]) -> None:
    """Continue from what `capture_optimizer` saved.

    Raises RecipeError if the optimizer, its parameters or their grouping are others than those saved.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    parameters = dict(named)
    groups = _named_groups(optimizer, parameters.items())
    names = list(chain.from_iterable(groups))
    _refuse_other({name: tuple(parameters[name].shape) for name in names}, saved["shapes"])
    if type(optimizer).__name__ != saved["kind"] or groups != [group["params"] for group in saved["param_groups"]]:
        raise RecipeError(
            f"the checkpoint's optimizer is {saved['kind']} with {len(saved['param_groups'])} parameter groups, this run's is "
            f"{type(optimizer).__name__} with {len(groups)}; resume with the recipe that started the run, or start anew with --overwrite"
        )
    indices = {name: i for i, name in enumerate(names)}
    optimizer.load_state_dict(
        {
            "state": {
                indices[name]: {key: _sharded_like(value, parameters[name]) if isinstance(value, torch.Tensor) else value for key, value in entry.items()}
                for name, entry in saved["state"].items()
            },
            "param_groups": [group | {"params": [indices[name] for name in group["params"]]} for group in saved["param_groups"]],
        }
    )
    _as_bitsandbytes_had_it(optimizer)


def _as_bitsandbytes_had_it(optimizer: Any) -> None:
    """Undo what its `load_state_dict` leaves behind: a table for each parameter, and paged state no longer paged."""
    if not hasattr(optimizer, "name2qmap"):
        return
    tables: dict[Any, torch.Tensor] = {}
    for parameter, state in optimizer.state.items():
        for key in state.keys() & {"qmap1", "qmap2"}:
            state[key] = tables.setdefault((key, state[key].device), state[key])
        if optimizer.is_paged:
            for key in state.keys() & {"state1", "state2"}:
                state[key] = optimizer.get_state_buffer(parameter, dtype=state[key].dtype).copy_(state[key])


# --- randomness and environment --------------------------------------------------------------------------


def capture_rng() -> Tensors:
    """The state of every random generator of this process: Python, NumPy, torch on the CPU and every CUDA device."""
    _, words, gauss = random.getstate()
    twister = np.random.get_state(legacy=False)
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*twister["state"]["key"].tolist(), twister["state"]["pos"], twister["has_gauss"]]),
        "numpy.gauss": torch.tensor([twister["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    return state | {f"cuda.{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}


def restore_rng(saved: Tensors) -> None:
    """Set every generator that `capture_rng` found; CUDA devices that are not here are left out."""
    gauss = saved["python.gauss"].tolist()
    random.setstate((3, tuple(saved["python"].tolist()), gauss[0] if gauss else None))
    *keys, position, has_gauss = saved["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, saved["numpy.gauss"].item()))
    torch.set_rng_state(saved["torch"])
    for i in range(torch.cuda.device_count()):
        if f"cuda.{i}" in saved:
            torch.cuda.set_rng_state(saved[f"cuda.{i}"], i)


def environment(world_size: int) -> dict[str, Any]:
    """What the bits of a step depend on besides the state: threads, processes, hardware, versions."""
    return {
        "threads": torch.get_num_threads(),
        "processes": world_size,
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "peft", "accelerate")},
    }


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Each reason why a resumed run may differ in the last bits from one that was never stopped."""
    for name in now:
        if now[name] != then.get(name):
            yield f"{name}: {then.get(name)} before, {now[name]} now"
