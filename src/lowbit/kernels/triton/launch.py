"""From a DeviceTerm to the arguments of the kernels, and the launches: grids, splits and partial sums."""

from __future__ import annotations

from math import gcd
from typing import Any

import numpy as np
import torch

from lowbit.errors import UnsupportedError
from lowbit.kernels.reference import integer_levels
from lowbit.kernels.triton import products
from lowbit.kernels.triton.device import interpreted
from lowbit.kernels.triton.order import DeviceCodes, DeviceEntries, DeviceFloats
from lowbit.kernels.triton.words import ROWS, padded
from lowbit.packed.layout import PLANES

ACTIVATION_GROUP = 64
PROGRAMS = 264  # wanted in flight for one token: twice the multiprocessors of an H200
LEAST_BLOCKS = 4  # of 64 inputs, in one split: below, the sums cost more than the split wins
MOST_SPLITS = 16
WIDEST = 64  # tokens of one program; more tokens than this walk the splits in one program
_WHOLE_ROW = 1 << 24  # units of 16 inputs: every input is in group 0
FLOAT8_MAX = 448.0


def splits_of(n_rows: int, n_inputs: int) -> tuple[int, int]:
    """(splits, blocks of 64 inputs in each): a function of the shape alone, never of the number of tokens."""
    blocks = -(-n_inputs // 64)
    wanted = PROGRAMS // -(-n_rows // ROWS)
    splits = max(1, min(wanted, blocks // LEAST_BLOCKS, MOST_SPLITS))
    per_split = -(-blocks // splits)
    return -(-blocks // per_split), per_split


def tile_tokens(n_tokens: int) -> int:
    """Tokens of one program: 16, 32 or 64."""
    return min(WIDEST, max(16, 1 << (n_tokens - 1).bit_length()))


def is_linear(levels: np.ndarray) -> bool:
    """One table whose levels are first + step * code exactly in float32: small evenly spaced integers."""
    table = levels[0].astype(np.float64)
    steps = np.diff(table)
    small = np.abs(table).max() < 1 << 20 and (table == np.rint(table)).all()
    return len(levels) == 1 and len(table) > 1 and bool(small and (steps == steps[0]).all())


class Arguments:
    """What every kernel of codes is given, for one term: made once, kept with the term."""

    def __init__(self, codes: DeviceCodes, n_inputs: int):
        term, none = codes.term, codes.levels  # `none`: a pointer that is never read
        planes = (*codes.planes, none, none)[:3]
        of = codes.per_group.get
        groups = n_inputs // term.group_size if term.group_size else 1
        scale_rows = codes.scales.shape[0]
        self.levels = codes.levels
        self.head = planes
        self.tail = (
            codes.scales,
            of("zero_points", none),
            of("selectors", none),
            none if codes.multipliers is None else codes.multipliers,
            of("factors", none),
            of("offsets", none),
            of("offset_factors", none),
        )
        self.stride = codes.planes[0].shape[1]
        self.sizes = (
            self.stride,
            term.group_size // 16 or _WHOLE_ROW,
            term.super_size // 16 or _WHOLE_ROW,
            groups - 1,
            scale_rows - 1,
        )
        widths = (*(PLANES[term.bits] if term.packing == "planes" else (2,)), 0, 0)[:3]
        linear = is_linear(term.levels)
        table = term.levels[0]
        self.line = (float(table[0]), float(table[1] - table[0])) if linear else (0.0, 0.0)
        self.tensor = (float(term.tensor_scale), float(np.float32(term.tensor_divisor)))
        self.constants: dict[str, Any] = {
            "W0": widths[0],
            "W1": widths[1],
            "W2": widths[2],
            "BASE3": term.packing == "base3",
            "SIZE": 1 << term.bits,
            "LINEAR": linear,
            "ZEROS": "zero_points" in codes.per_group,
            "SELECTED": "selectors" in codes.per_group,
            "SCALES": term.scale_type,
            "DIVIDED": term.tensor_divisor != 1.0,
            "OFFSETS": "offsets" in codes.per_group,
        }


def arguments(codes: DeviceCodes, n_inputs: int) -> Arguments:
    made = codes.__dict__.get("_arguments")
    if made is None:
        made = Arguments(codes, n_inputs)
        object.__setattr__(codes, "_arguments", made)
    return made


def multiply(codes: DeviceCodes | DeviceFloats, x: torch.Tensor, n_rows: int) -> torch.Tensor:
    """float32 [tokens, n_rows] of x [tokens, inputs], which must be contiguous."""
    n_tokens, n_inputs = x.shape
    run = _Run(n_tokens, n_rows, n_inputs, x.device)
    if isinstance(codes, DeviceFloats):
        values = codes.values
        products.floats_product[run.grid](
            x, run.partial, values, n_tokens, n_rows, n_inputs, values.shape[1], run.per_split, run.splits,
            TOKENS=run.tokens, WIDE=interpreted(),
        )  # fmt: skip
        return run.result()
    a = arguments(codes, n_inputs)
    products.codes_product[run.grid](
        x, run.partial, *a.head, a.levels, *a.tail, n_tokens, n_rows, n_inputs, *a.sizes, run.per_split,
        run.splits, *a.line, *a.tensor, **a.constants, TOKENS=run.tokens,
        WIDE=interpreted(),
    )  # fmt: skip
    return run.result()


def multiply_segments(codes: DeviceCodes, x: torch.Tensor, scales: torch.Tensor, n_rows: int) -> torch.Tensor:
    """float32 [tokens, n_rows] of x int8 or float8 [tokens, inputs] with scales float32 [tokens, blocks]."""
    n_tokens, n_inputs = x.shape
    run = _Run(n_tokens, n_rows, n_inputs, x.device)
    a = arguments(codes, n_inputs)
    levels, line, unit, limbs = _narrow(codes, x.dtype)
    size = codes.term.scale_size if codes.term.scale_type != "m8" else codes.term.group_size
    parts = ACTIVATION_GROUP // gcd(size, ACTIVATION_GROUP) if size else 1
    products.segments_product[run.grid](
        x.view(torch.int8), scales, run.partial, *a.head, levels,
        *a.tail, n_tokens, n_rows, n_inputs,
        *a.sizes, run.per_split, run.splits, *line, *a.tensor, unit, **a.constants,
        TOKENS=run.tokens, PARTS=parts, LIMBS=limbs, WIDE=interpreted(),
    )  # fmt: skip
    return run.result()


class _Run:
    """The grid of one product and where its sums go."""

    def __init__(self, n_tokens: int, n_rows: int, n_inputs: int, device: torch.device):
        self.splits, self.per_split = splits_of(n_rows, n_inputs)
        self.tokens = tile_tokens(n_tokens)
        written = self.splits if n_tokens <= WIDEST else 1
        self.grid = (-(-n_rows // ROWS), -(-n_tokens // self.tokens), written)
        self.partial = torch.empty((written, n_tokens, n_rows), dtype=torch.float32, device=device)

    def result(self) -> torch.Tensor:
        written, n_tokens, n_rows = self.partial.shape
        if written == 1:
            return self.partial[0]
        y = torch.empty((n_tokens, n_rows), dtype=torch.float32, device=self.partial.device)
        products.reduce[(-(-y.numel() // 1024),)](self.partial, y, y.numel(), written, BLOCK=1024)
        return y


def multiply_entries(entries: DeviceEntries, x: torch.Tensor, n_rows: int) -> torch.Tensor:
    y = torch.empty((len(x), n_rows), dtype=torch.float32, device=x.device)
    products.entries_product[(n_rows, len(x))](
        x, y, entries.starts, entries.columns, entries.values, n_rows, x.shape[1], entries.longest, BLOCK=32
    )
    return y


def decoded_rows(codes: DeviceCodes, chosen: torch.Tensor, n_inputs: int) -> torch.Tensor:
    """float32 [chosen, inputs]: these rows as CodeTerm.dequantize gives them."""
    y = torch.empty((len(chosen), n_inputs), dtype=torch.float32, device=chosen.device)
    a = arguments(codes, n_inputs)
    products.codes_rows[(-(-len(chosen) // 16), -(-n_inputs // 64))](
        chosen, y, *a.head, a.levels, *a.tail, len(chosen), n_inputs, *a.sizes, *a.line, *a.tensor,
        **a.constants, ROWS=16,
    )  # fmt: skip
    return y


def quantize_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 [tokens, inputs], scales float32 [tokens, blocks]): as kernels/reference.py rounds."""
    grouped, largest = _grouped(x)
    top = torch.tensor(127.0, device=x.device)
    inverse = torch.where(largest > 1e-30, top / largest, 0.0)
    integers = torch.round(grouped * inverse[:, :, None]).to(torch.int8)
    return integers.view(len(x), -1)[:, : x.shape[1]].contiguous(), largest / top


def quantize_float8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(float8_e4m3fn [tokens, inputs], scales float32 [tokens, blocks]): each group's largest becomes 448."""
    grouped, largest = _grouped(x)
    top = torch.tensor(FLOAT8_MAX, device=x.device)
    inverse = torch.where(largest > 1e-30, top / largest, 0.0)
    rounded = (grouped * inverse[:, :, None]).clamp(-FLOAT8_MAX, FLOAT8_MAX)
    values = rounded.view(len(x), -1)[:, : x.shape[1]].contiguous()
    return values.to(torch.float8_e4m3fn), largest / top


def _grouped(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = padded(x.shape[1], ACTIVATION_GROUP)
    wide = torch.nn.functional.pad(x.float(), (0, inputs - x.shape[1])).view(len(x), -1, ACTIVATION_GROUP)
    return wide, wide.abs().amax(dim=2)


def _narrow(codes: DeviceCodes, dtype: torch.dtype) -> tuple[torch.Tensor, tuple[Any, Any], float, int]:
    """(levels, (first, step), unit, limbs) for activations of this type."""
    key = "_narrow_int" if dtype == torch.int8 else "_narrow_float8"
    made = codes.__dict__.get(key)
    if made is None:
        made = _narrow_int(codes) if dtype == torch.int8 else _narrow_float8(codes)
        object.__setattr__(codes, key, made)
    return made


def _narrow_int(codes: DeviceCodes) -> tuple[torch.Tensor, tuple[int, int], float, int]:
    term = codes.term
    integers, unit = integer_levels(term.levels)
    peak = int(np.abs(integers).max())
    if "zero_points" in codes.per_group:
        peak = peak + int(codes.per_group["zero_points"].max())
    if codes.multipliers is not None:
        peak *= 15
    # The largest signed byte, and the largest two limbs of which the sum over 64 inputs fits int32.
    if peak > 127 * 128 + 63:
        raise UnsupportedError(
            f"matmul: integer weights up to {peak} of a {term.bits}-bit term need more than two int8 limbs; "
            'use activations="float"'
        )
    table = np.pad(integers, ((0, 0), (0, (1 << term.bits) - integers.shape[1])), mode="edge")
    levels = torch.from_numpy(table.astype(np.int32).reshape(-1)).to(codes.levels.device)
    linear = is_linear(term.levels)
    line = (int(integers[0, 0]), int(integers[0, 1] - integers[0, 0])) if linear else (0, 0)
    return levels, line, float(unit), 1 if peak <= 127 else 2


def _narrow_float8(codes: DeviceCodes) -> tuple[torch.Tensor, tuple[float, float], float, int]:
    term = codes.term
    rounded = codes.levels.to(torch.float8_e4m3fn).float()
    if (
        not torch.equal(rounded, codes.levels)
        or codes.multipliers is not None
        or "zero_points" in codes.per_group
    ):
        raise UnsupportedError(
            f"matmul: FP8 activations need levels that e4m3 holds, and a {term.bits}-bit term has others (or "
            'multipliers or zero-points); use activations="int8" or "float"'
        )
    linear = is_linear(term.levels)
    table = term.levels[0]
    line = (float(table[0]), float(table[1] - table[0])) if linear else (0.0, 0.0)
    return codes.levels, line, 1.0, 0
