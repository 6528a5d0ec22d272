"""Products on an NVIDIA GPU, in Triton: every format, over the same PackedMatrix as on the CPU.

    matrix = to_device(packed, "cuda")           once, when a model loads
    y = matmul(x, matrix)                        torch tensors on the same device

Without a GPU the kernels run under Triton's interpreter, on tensors of the CPU, where the environment says
TRITON_INTERPRET=1: slow, for tests. Nothing falls back to the CPU by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowbit.errors import FormatError, UnsupportedError
from lowbit.kernels.triton.device import check_capability, check_device, check_memory

if TYPE_CHECKING:
    import torch

    from lowbit.kernels.triton.order import DeviceCodes, DeviceMatrix, DeviceTerm
    from lowbit.packed import PackedMatrix

__all__ = ["ACTIVATIONS", "check_device", "lookup", "matmul", "to_device"]

ACTIVATIONS = ("float", "int8", "fp8")
FP8_CAPABILITY = (8, 9)


def to_device(matrix: PackedMatrix, device: str | torch.device = "cuda") -> DeviceMatrix:
    """Copy a matrix to a GPU, in the order of its kernels.

    Raises UnsupportedError where there is no such GPU, none new enough, no Triton, or too little free
    memory; FormatError for damaged codes.
    """
    target = check_device(device, "to_device")
    check_memory(matrix.nbytes, target, f"to_device: {matrix!r}")
    import torch

    from lowbit.kernels.triton import order

    try:
        return order.to_device(matrix, target)
    except torch.OutOfMemoryError as error:  # padding, and terms that take more than in the file
        raise UnsupportedError(
            f"to_device: {matrix!r} does not fit on {target}: {error}; free memory, or run on the CPU"
        ) from error


def matmul(x: torch.Tensor, m: DeviceMatrix, activations: str = "float") -> torch.Tensor:
    """`x @ W.T`, accumulated in float32, in the type of x.

    x: [batch, in_features], float32 | float16 | bfloat16, on the device of `m`; not checked for NaN
    activations: "float": weights are rounded to the type of x. "int8": x is rounded per row and 64 inputs to
        8 bits, the sums are exact, as kernels/reference.py defines. "fp8": x is rounded to e4m3 likewise
    A row's result is the same bits whatever other rows are in the batch.
    """
    import torch

    from lowbit.kernels.triton.order import DeviceMatrix

    if activations not in ACTIVATIONS:
        raise UnsupportedError(
            f"matmul: activations={activations!r} is unknown; choose one of {', '.join(ACTIVATIONS)}"
        )
    if not isinstance(m, DeviceMatrix):
        raise FormatError(
            f"matmul: the second argument is {type(m).__name__}, not a DeviceMatrix; make one with "
            "lowbit.kernels.triton.to_device(packed_matrix, device)"
        )
    if not isinstance(x, torch.Tensor) or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        received = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise FormatError(f"matmul: x is {received}; give a torch tensor of float32, float16 or bfloat16")
    if x.ndim != 2 or x.shape[1] != m.in_features:
        raise FormatError(
            f"matmul: x has shape {list(x.shape)}; required [batch, {m.in_features}] for a matrix of "
            f"{m.out_features} x {m.in_features}"
        )
    _same_device("matmul: x", x, m)
    if not len(x):
        return x.new_zeros((0, m.out_features))
    if activations == "fp8":
        check_capability(m.device, FP8_CAPABILITY, 'matmul: activations="fp8"')
    total = _sum(x.contiguous(), m, activations)
    return total.to(x.dtype)


def lookup(m: DeviceMatrix, rows: torch.Tensor) -> torch.Tensor:
    """Decoded rows, float32 [n, in_features], equal to those of `dequantize`: embeddings.

    rows: int64 [n] on the device of `m`, each below out_features (not checked: that would wait for the GPU)
    """
    from lowbit.kernels.triton import launch, order

    _same_device("lookup: rows", rows, m)
    total = None
    for term in m.terms:
        if isinstance(term, order.DeviceCodes):
            part = launch.decoded_rows(term, rows, m.in_features)
        elif isinstance(term, order.DeviceFloats):
            part = term.values[:, rows].T.float()
        else:
            raise UnsupportedError(
                f"lookup: a matrix with {type(term).__name__[6:].lower()} beside its codes has no lookup of "
                "rows on a GPU; quantize the embedding to codes or floats alone"
            )
        total = part if total is None else total + part
    assert total is not None
    return total


def _same_device(what: str, x: torch.Tensor, m: DeviceMatrix) -> None:
    if x.device != m.device and not (x.device.type == m.device.type and m.device.index is None):
        raise FormatError(
            f"{what} is on {x.device}, the matrix on {m.device}; move one of them, for example x.to(m.device)"
        )


def _sum(x: torch.Tensor, m: DeviceMatrix, activations: str) -> torch.Tensor:
    """The terms' products, added in float32 in the order of the terms."""
    rounded = x
    if m.excluded is not None:  # codes do not see these inputs, and they widen nobody's step
        rounded = x.index_fill(1, m.excluded, 0)
    total = None
    for term in m.terms:
        part = _product(term, x, rounded, m.out_features, activations)
        total = part if total is None else total + part
    assert total is not None
    return total


def _product(
    term: DeviceTerm, x: torch.Tensor, rounded: torch.Tensor, n_rows: int, activations: str
) -> torch.Tensor:
    import torch

    from lowbit.kernels.triton import launch, order

    if isinstance(term, order.DeviceCodes):
        return _codes(term, rounded, n_rows, activations)
    if isinstance(term, order.DeviceFloats):
        return launch.multiply(term, x, n_rows)
    if isinstance(term, order.DeviceRows):
        y = x.new_zeros((len(x), n_rows), dtype=torch.float32)
        return y.index_copy(1, term.rows, _codes(term.codes, rounded, len(term.rows), activations))
    if isinstance(term, order.DeviceGathered):
        gathered = x[:, term.inputs.clamp(min=0)] * (term.inputs >= 0)
        return _codes(term.codes, gathered, n_rows, activations)
    if isinstance(term, order.DeviceColumns):
        return launch.multiply(term.floats, x[:, term.columns].contiguous(), n_rows)
    if isinstance(term, order.DeviceLowRank):
        return launch.multiply(term.u, launch.multiply(term.v, x, term.rank), n_rows)
    return launch.multiply_entries(term, x, n_rows)


def _codes(codes: DeviceCodes, x: torch.Tensor, n_rows: int, activations: str) -> torch.Tensor:
    from lowbit.kernels.triton import launch

    if activations == "float":
        return launch.multiply(codes, x, n_rows)
    quantize = launch.quantize_int8 if activations == "int8" else launch.quantize_float8
    return launch.multiply_segments(codes, *quantize(x), n_rows)
