"""What a process is told: which kernels torch takes, and to keep the memory that is freed."""

import platform
import subprocess
import sys

import pytest
import torch

from ftkit import device, opened
from ftkit.report import Reporter

FAULTS = """
import resource, sys
import torch
from ftkit import device
if sys.argv[1] == "keep":
    device.keep_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for step in range(20):
    tensors = [torch.ones(10 * 2**20 + 1000 * (step % 3)) for _ in range(3)]
    del tensors
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_kept_memory_is_not_asked_for_again():
    """Three tensors of 40 MiB a step: pages that the system has to give each time, or the first ones only."""
    found = {}
    for how in ("keep", "give back"):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        found[how] = int(done.stdout)
    assert found["keep"] < found["give back"] / 3


@pytest.fixture
def as_torch_has_it():
    device.use_kernels_for(None)  # a run of another test may have left its own
    yield
    device.use_kernels_for(None)


def kernels():
    return torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.usefixtures("as_torch_has_it")
def test_kernels_are_those_of_the_precision_until_they_are_torchs_own():
    before = kernels()
    for precision, products in (("tf32", "high"), ("bf16", "highest"), ("tf32", "high"), ("fp32", "highest")):
        device.use_kernels_for(precision)
        assert kernels() == (products, False)
    device.use_kernels_for(None)
    assert kernels() == before == ("highest", True)


@pytest.mark.usefixtures("as_torch_has_it")
def test_an_opened_run_has_no_plans_of_attention(monkeypatch):
    monkeypatch.setattr(opened, "open_run", lambda target, device: kernels())
    with Reporter(None, quiet=True) as report:
        assert opened.open_here("run", report) == ("highest", False)
