"""Where a run computes and in which arithmetic."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ftkit.errors import MissingDependency

if TYPE_CHECKING:
    import torch


def pick(local_rank: int = 0) -> torch.device:
    """The device of this process: its own GPU if there is one, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda", local_rank % torch.cuda.device_count())  # srun may show each rank only its own
    return torch.device("cpu")


def has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic runs in hardware: emulated, it is slower than float32."""
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def precision(asked: str, device: torch.device) -> str:
    """fp32, tf32, bf16 or fp16.  `auto` is bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU."""
    if asked == "auto":
        return "bf16" if has_bf16(device) else "fp16" if device.type == "cuda" else "fp32"
    if asked == "fp16" and device.type == "cpu":
        raise MissingDependency("train.precision: fp16 needs a GPU; a CPU computes in fp32 or bf16")
    if asked == "tf32" and not has_tf32(device):
        raise MissingDependency("train.precision: tf32 needs an Nvidia GPU of compute capability 8.0 (Ampere) or newer")
    return asked


def has_tf32(device: torch.device) -> bool:
    """Whether products of float32 matrices can be taken with fractions of 10 bits."""
    import torch

    return device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def use_kernels_for(precision: str | None) -> None:
    """Let torch compute in this process as runs in a precision do, or, with None, as it does of itself.

    tf32 takes products of float32 matrices in TF32.  None takes cuDNN's attention, which torch prefers on some GPUs: for each new shape
    cuDNN makes a plan, which takes an H200's processor 0.13 s, where FlashAttention has one kernel for all; batches of texts are of
    many shapes.  Once there is a plan, 4,096 tokens take it 55 % of the time: `attention` asks for it where rows are long.
    """
    import torch

    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cuda.enable_cudnn_sdp(precision is None)


def autocast_to(precision: str) -> str:
    """What accelerate calls the type that products are computed in where weights stay float32: bf16, fp16 or no."""
    return precision if precision in ("bf16", "fp16") else "no"


def use_all_cores(processes_here: int = 1) -> int:
    """Set torch's threads to the cores this process may use, shared among the processes of this machine; returns them."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() // processes_here))
    return torch.get_num_threads()


def num_cores() -> int:
    """Cores that this process may use: in a container or a job, fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_memory() -> None:
    """Let this process keep what it freed, for the next step, in place of giving it back to the system; where the C library is glibc.

    Of itself glibc maps each large tensor anew, and the system fills it with zeros, a page at a time.
    """
    import ctypes
    import platform

    if platform.libc_ver()[0] == "glibc":
        m_trim_threshold, m_mmap_threshold, most = -1, -3, 2**30  # malloc.h; bytes
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_threshold, most)
        libc.mallopt(m_trim_threshold, most)


def free_memory() -> None:
    """Give back what is no longer referenced, so that another process can have it."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
