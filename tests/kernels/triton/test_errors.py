"""What is missing for a GPU is said, and nothing falls back to the CPU."""

import sys

import numpy as np
import pytest

from lowbit.errors import FormatError, UnsupportedError

from .matrices import of_format

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install torch")
pytest.importorskip("triton", reason="needs Triton: pip install triton")

from lowbit.kernels.triton import matmul, order, to_device  # noqa: E402  # after the skips
from lowbit.kernels.triton.device import check_memory  # noqa: E402


@pytest.fixture(scope="module")
def matrix():
    return of_format("int4-g64", 64, 128)


def test_no_cuda(matrix, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match=r"no CUDA: .*or run on the CPU"):
        to_device(matrix, "cuda")


def test_the_cpu_needs_the_interpreter(matrix, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(UnsupportedError, match=r"run on cuda, not on cpu.*TRITON_INTERPRET=1"):
        to_device(matrix, "cpu")


def test_no_triton(matrix, monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UnsupportedError, match="Triton is not installed; pip install triton"):
        to_device(matrix, "cuda")


def test_an_unknown_device(matrix):
    with pytest.raises(UnsupportedError, match="device 'gpu7' is unknown"):
        to_device(matrix, "gpu7")


@pytest.fixture
def card(monkeypatch):
    """One card of compute capability 7.5 with a gigabyte free."""
    for name, value in {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (7, 5),
        "get_device_name": "Tesla T4", "mem_get_info": (10**9, 16 * 10**9), "memory_reserved": 0,
        "memory_allocated": 0,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


def test_too_old_a_card(matrix, card):
    with pytest.raises(UnsupportedError, match=r"Tesla T4 has compute capability 7.5; 8.0 or newer"):
        to_device(matrix, "cuda")


def test_no_such_card(matrix, card):
    with pytest.raises(UnsupportedError, match=r"cuda:3 is asked for, there are 1 GPUs"):
        to_device(matrix, "cuda:3")


def test_out_of_memory(card):
    with pytest.raises(UnsupportedError, match=r"needs 1.50 GB on cuda:0, where 1.00 of 16.00 GB are free"):
        check_memory(1_500_000_000, torch.device("cuda", 0), "to_device")
    check_memory(10**9, torch.device("cuda", 0), "to_device")


def test_out_of_memory_while_copying(matrix, device, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB; 1 GiB is free")

    monkeypatch.setattr(order, "to_device", full)
    with pytest.raises(UnsupportedError, match=r"does not fit on .*tried to allocate 2 GiB; 1 GiB is free"):
        to_device(matrix, device)


def test_mixed_devices(matrix, device):
    moved = to_device(matrix, device)
    with pytest.raises(FormatError, match="x is on meta, the matrix on"):
        matmul(torch.zeros(1, 128, device="meta"), moved)


def test_wrong_arguments(matrix, device):
    moved = to_device(matrix, device)
    x = torch.zeros(2, 128, device=device)
    with pytest.raises(FormatError, match=r"required \[batch, 128\]"):
        matmul(x[:, :64], moved)
    with pytest.raises(FormatError, match="not a DeviceMatrix"):
        matmul(x, matrix)
    with pytest.raises(FormatError, match="x is ndarray"):
        matmul(np.zeros((1, 128), np.float32), moved)
    with pytest.raises(FormatError, match=r"x is torch\.int64"):
        matmul(x.long(), moved)
    with pytest.raises(UnsupportedError, match="choose one of float, int8, fp8"):
        matmul(x, moved, "int4")
    assert matmul(x[:0], moved).shape == (0, 64)
