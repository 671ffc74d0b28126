"""Any exception to the exit code and the words that ftkit stops with."""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Iterator

from ftkit.errors import DiskError, FtkitError, HubError, Interrupted, OutOfMemory

DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
_NETWORK_LIBRARIES = {"huggingface_hub", "httpx", "httpx2", "requests"}
_OUT_OF_MEMORY = re.compile(r"out of memory|DefaultCPUAllocator|can't allocate memory|ALLOC_FAILED")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how libraries in Rust (safetensors, tokenizers) report errno


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code of an error and what to tell the user; for a defect of ftkit that is the traceback."""
    for cause in _causes(error):
        known = _as_documented(cause)
        if known:
            return known.code, str(known)
    trace = "".join(traceback.format_exception(error)).rstrip()
    return FtkitError.code, f"this is a defect of ftkit, please report it:\n{trace}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it was explicitly raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _as_documented(error: BaseException) -> FtkitError | None:
    if isinstance(error, FtkitError):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted")
    if _ran_out_of_memory(error):
        return OutOfMemory(
            f"out of memory{_detail(error)}\n"
            "What takes less, with equal results: a larger train.accumulate, train.gradient_checkpointing=true; "
            "with other results: a smaller data.max_length, train.optimizer=adamw_8bit, method=lora or method=qlora."
        )
    if _failed_to_connect(error):
        return HubError(
            f"the hub or the network failed{_detail(error)}\n"
            "Check the name and the network; private and gated repositories need `hf auth login`; with HF_HUB_OFFLINE=1 only cached files are used."
        )
    if (number := _errno(error)) in DISK_ERRORS:
        name = getattr(error, "filename", None)
        return DiskError(f"{name}: {errno.errorcode[number]}{_detail(error)}" if name else f"disk{_detail(error)}")
    return None


def _ran_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # an error of torch's is only possible once someone imported it
    if isinstance(error, (MemoryError, getattr(torch, "OutOfMemoryError", ()))):
        return True
    return isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error)))


def _failed_to_connect(error: BaseException) -> bool:
    if isinstance(error, BrokenPipeError):
        return False
    kinds = [base for base in type(error).__mro__ if issubclass(base, Exception)]
    return isinstance(error, ConnectionError | TimeoutError) or any(
        base.__module__.partition(".")[0] in _NETWORK_LIBRARIES and "StrictDataclass" not in base.__name__ for base in kinds
    )


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    match = _OS_ERROR.search(str(error))
    return int(match[1]) if match else None


def _detail(error: BaseException) -> str:
    """The first line of an error's own words."""
    words = getattr(error, "strerror", None) or str(error)
    return f": {words.splitlines()[0]}" if words else ""
