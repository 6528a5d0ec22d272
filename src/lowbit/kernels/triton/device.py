"""Is there a GPU that runs the kernels? What is missing is said before anything is copied or compiled."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lowbit.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

LEAST_CAPABILITY = (8, 0)  # Ampere: bfloat16 on tensor cores
_REMEDY = "or run on the CPU"


def interpreted() -> bool:
    """Whether the user asked for Triton's interpreter, which runs the kernels on the CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def check_device(device: str | torch.device, what: str) -> torch.device:
    """The device, with its index, if the kernels run there. `what` opens the message otherwise."""
    try:
        import torch
    except ImportError as error:
        raise UnsupportedError(f"{what}: PyTorch is not installed; pip install torch, {_REMEDY}") from error
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise UnsupportedError(f"{what}: device {device!r} is unknown; use cuda or cuda:N") from error
    try:
        import triton  # noqa: F401  # not needed before a kernel is launched, but missed here
    except ImportError as error:
        raise UnsupportedError(
            f"{what}: Triton is not installed; pip install triton (Linux), {_REMEDY}"
        ) from error
    if target.type == "cpu" and interpreted():
        return target
    if target.type != "cuda":
        raise UnsupportedError(
            f"{what}: the kernels run on cuda, not on {target}; on a CPU use lowbit.kernels.matmul (to test "
            "them without a GPU, set TRITON_INTERPRET=1: slow)"
        )
    if not torch.cuda.is_available():
        built = "this PyTorch is built without CUDA" if torch.version.cuda is None else "no GPU is visible"
        raise UnsupportedError(
            f"{what}: no CUDA: {built}; install a CUDA build of PyTorch and a driver, {_REMEDY}"
        )
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if target.index is None else target.index
    if index >= count:
        raise UnsupportedError(f"{what}: {target} is asked for, there are {count} GPUs (cuda:0 ..)")
    target = torch.device("cuda", index)
    check_capability(target, LEAST_CAPABILITY, what)
    return target


def check_capability(device: torch.device, least: tuple[int, int], what: str) -> None:
    """Raise UnsupportedError if a GPU is older than `least` compute capability."""
    import torch

    if device.type != "cuda":
        return
    found = torch.cuda.get_device_capability(device)
    if found < least:
        name = torch.cuda.get_device_name(device)
        raise UnsupportedError(
            f"{what}: {name} has compute capability {found[0]}.{found[1]}; {least[0]}.{least[1]} or newer is "
            f"required; use another card, {_REMEDY}"
        )


def check_memory(needed: int, device: torch.device, what: str) -> None:
    """Raise UnsupportedError unless `needed` bytes are free on a GPU."""
    import torch

    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # cached by PyTorch
    if needed > free:
        raise UnsupportedError(
            f"{what}: needs {needed / 1e9:,.2f} GB on {device}, where {free / 1e9:,.2f} of "
            f"{total / 1e9:,.2f} GB are free; quantize to fewer bits, free memory, {_REMEDY}"
        )
