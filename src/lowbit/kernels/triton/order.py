"""A PackedMatrix on a device, in the order that the kernels read (words.py); made once, when a model loads.

Codes, scales, zero-points, offsets, selectors, multipliers and tables keep their bits: `restore` gives the
PackedMatrix back. Two kinds of terms change on the way: sparse codes become dense ones with a code for 0, and
entropy-coded weights become bfloat16, so both take more memory on the device than in the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lowbit.errors import FormatError, UnsupportedError
from lowbit.kernels.triton import words
from lowbit.packed import (
    NO_INPUT,
    CodeTerm,
    ColumnsTerm,
    EntriesTerm,
    EntropyTerm,
    FloatTerm,
    GatheredTerm,
    LowRankTerm,
    PackedMatrix,
    RowsTerm,
    SparseTerm,
    Term,
    pack_groups,
    pack_multipliers,
    pack_values,
    unpack_groups,
    unpack_multipliers,
    unpack_values,
)

Put = Callable[[np.ndarray], torch.Tensor]
_PER_GROUP = ("zero_points", "offsets", "selectors", "factors", "offset_factors")


@dataclass(frozen=True, eq=False)
class DeviceCodes:
    """A CodeTerm. Arrays per group are [groups, padded rows]; names and meanings are those of CodeTerm.

    planes: int32 [words, padded rows] of each plane, or the one array of ternary words
    levels: float32 [tables * 2**bits], each table filled up with its last level
    multipliers: int32 words as those of 4-bit codes, whose inputs are the groups
    """

    term: CodeTerm  # bits, levels, types and sizes; its large arrays are not kept
    planes: tuple[torch.Tensor, ...]
    scales: torch.Tensor
    levels: torch.Tensor
    multipliers: torch.Tensor | None
    per_group: dict[str, torch.Tensor]

    def tensors(self) -> list[torch.Tensor]:
        further = [self.multipliers] if self.multipliers is not None else []
        return [*self.planes, self.scales, self.levels, *further, *self.per_group.values()]

    def restore(self, out_features: int, in_features: int) -> CodeTerm:
        term, planes = self.term, [_numpy(p) for p in self.planes]
        if term.packing == "base3":
            codes = words.codes_of_trits(planes[0], out_features, in_features)
        else:
            codes = words.codes_of_planes(planes, term.bits, out_features, in_features)

        def packed(tensor: torch.Tensor) -> np.ndarray:
            return pack_groups(words.groups_of_rows(_numpy(tensor), out_features))

        changed: dict[str, Any] = {name: packed(tensor) for name, tensor in self.per_group.items()}
        if self.multipliers is not None:
            groups = in_features // term.group_size
            values = words.codes_of_planes([_numpy(self.multipliers)], 4, out_features, groups)
            changed["multipliers"] = pack_multipliers(values)
        kept = _described(term)
        return CodeTerm(**kept | changed | {"codes": term.repack(codes), "scales": packed(self.scales)})


@dataclass(frozen=True, eq=False)
class DeviceFloats:
    """Plain floats, float32 | float16 | bfloat16 [inputs, padded rows]."""

    values: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        return [self.values]

    def restore(self, out_features: int, in_features: int) -> FloatTerm:
        name = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[self.values.dtype]
        bits = self.values.view(torch.int16) if name == "bf16" else self.values
        values = words.groups_of_rows(_numpy(bits), out_features)
        return FloatTerm(name, pack_values(values.view(np.uint16) if name == "bf16" else values))


@dataclass(frozen=True, eq=False)
class DeviceColumns:
    """A ColumnsTerm: its columns int64 [k], values float16 [k, padded rows]."""

    columns: torch.Tensor
    floats: DeviceFloats
    exclude: bool

    def tensors(self) -> list[torch.Tensor]:
        return [self.columns, self.floats.values]

    def restore(self, out_features: int, in_features: int) -> ColumnsTerm:
        values = self.floats.restore(out_features, len(self.columns)).values
        return ColumnsTerm(_numpy(self.columns).astype(np.uint32), values, self.exclude)


@dataclass(frozen=True, eq=False)
class DeviceEntries:
    """An EntriesTerm, by rows: entries starts[r] .. starts[r + 1] - 1 are of row r, by ascending column.

    starts: int32 [out_features + 1]; columns: int32 [n]; values: float16 [n]; longest: entries of a row
    """

    starts: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor
    longest: int

    def tensors(self) -> list[torch.Tensor]:
        return [self.starts, self.columns, self.values]

    def restore(self, out_features: int, in_features: int) -> EntriesTerm:
        rows = np.repeat(np.arange(out_features), np.diff(_numpy(self.starts)))
        return EntriesTerm.from_places(rows, _numpy(self.columns), _numpy(self.values), out_features)


@dataclass(frozen=True, eq=False)
class DeviceLowRank:
    """u @ v as two float matrices: v float16 [inputs, padded rank], u float16 [rank, padded rows]."""

    v: DeviceFloats
    u: DeviceFloats
    rank: int

    def tensors(self) -> list[torch.Tensor]:
        return [self.v.values, self.u.values]

    def restore(self, out_features: int, in_features: int) -> LowRankTerm:
        v = words.groups_of_rows(_numpy(self.v.values), self.rank)
        return LowRankTerm(self.u.restore(out_features, self.rank).values, v)


@dataclass(frozen=True, eq=False)
class DeviceRows:
    """A RowsTerm: codes of a matrix of k rows, rows int64 [k]."""

    rows: torch.Tensor
    codes: DeviceCodes

    def tensors(self) -> list[torch.Tensor]:
        return [self.rows, *self.codes.tensors()]

    def restore(self, out_features: int, in_features: int) -> RowsTerm:
        codes = self.codes.restore(len(self.rows), in_features)
        return RowsTerm(_numpy(self.rows).astype(np.uint32), codes)


@dataclass(frozen=True, eq=False)
class DeviceGathered:
    """A GatheredTerm: inputs int64 [k], -1 for an input that is 0."""

    inputs: torch.Tensor
    codes: DeviceCodes

    def tensors(self) -> list[torch.Tensor]:
        return [self.inputs, *self.codes.tensors()]

    def restore(self, out_features: int, in_features: int) -> GatheredTerm:
        inputs = _numpy(self.inputs)
        stored = np.where(inputs < 0, NO_INPUT, inputs).astype(np.uint32)
        return GatheredTerm(stored, self.codes.restore(out_features, len(inputs)))


DeviceTerm = (
    DeviceCodes | DeviceFloats | DeviceColumns | DeviceEntries | DeviceLowRank | DeviceRows | DeviceGathered
)


class DeviceMatrix:
    """A matrix that the GPU kernels multiply with; `to_device` makes it."""

    def __init__(self, matrix: PackedMatrix, terms: tuple[DeviceTerm, ...], device: torch.device):
        self.out_features, self.in_features = matrix.shape
        self.format_name = matrix.format_name
        self.terms = terms
        self.device = device
        self.excluded: torch.Tensor | None = None  # inputs that codes leave out
        for term in terms:
            if isinstance(term, DeviceColumns) and term.exclude:
                self.excluded = term.columns

    def __repr__(self) -> str:
        name = self.format_name or "unnamed"
        return f"DeviceMatrix({self.out_features} x {self.in_features}, {name}, {self.device})"

    @property
    def nbytes(self) -> int:
        """Bytes on the device, padding included."""
        return sum(t.numel() * t.element_size() for term in self.terms for t in term.tensors())

    def restore(self) -> PackedMatrix:
        """The PackedMatrix that it was made from, but for sparse and entropy terms (see the module)."""
        terms = tuple(term.restore(self.out_features, self.in_features) for term in self.terms)
        return PackedMatrix(self.out_features, self.in_features, terms, self.format_name)


def to_device(matrix: PackedMatrix, device: str | torch.device) -> DeviceMatrix:
    """Copy a matrix to `device` in the order of the kernels.

    Raises UnsupportedError for a kind of term that has no kernel on a GPU, FormatError for damaged codes.
    """
    target = torch.device(device)

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(target)

    out_features, in_features = matrix.shape
    return DeviceMatrix(
        matrix, tuple(_placed(t, out_features, in_features, put) for t in matrix.terms), target
    )


def _placed(term: Term, out_features: int, in_features: int, put: Put) -> DeviceTerm:
    if isinstance(term, SparseTerm):
        term = term.dense(out_features, in_features)
    if isinstance(term, CodeTerm):
        return _codes(term, out_features, in_features, put)
    if isinstance(term, FloatTerm):
        values = unpack_values(term.values, out_features)
        return _floats(values.view(np.int16) if term.type == "bf16" else values, put)
    if isinstance(term, EntropyTerm):
        return _floats(term.values(out_features, in_features).view(np.int16), put)
    if isinstance(term, ColumnsTerm):
        floats = _floats(unpack_groups(term.values, out_features), put)
        return DeviceColumns(put(term.columns.astype(np.int64)), floats, term.exclude)
    if isinstance(term, EntriesTerm):
        return _entries(term, out_features, put)
    if isinstance(term, LowRankTerm):
        u = _floats(unpack_groups(term.u, out_features), put)
        return DeviceLowRank(_floats(np.ascontiguousarray(term.v), put), u, term.rank)
    if isinstance(term, RowsTerm):
        codes = _codes(term.codes, len(term.rows), in_features, put)
        return DeviceRows(put(term.rows.astype(np.int64)), codes)
    if isinstance(term, GatheredTerm):
        inputs = np.where(term.inputs == NO_INPUT, -1, term.inputs.astype(np.int64))
        return DeviceGathered(put(inputs), _codes(term.codes, out_features, len(inputs), put))
    raise UnsupportedError(
        f"to_device: a term of kind {getattr(term, 'kind', type(term).__name__)!r} has no kernel on a GPU; "
        "run this matrix on the CPU, or quantize it to another format"
    )


def _codes(term: CodeTerm, out_features: int, in_features: int, put: Put) -> DeviceCodes:
    codes = term.unpack(out_features, in_features)
    n_levels = term.levels.shape[1]
    if int(codes.max()) >= n_levels:
        raise FormatError(
            f"to_device: code {int(codes.max())}, but the table has {n_levels} levels; the codes are damaged"
        )
    base3 = term.packing == "base3"
    planes = [words.trit_words(codes)] if base3 else words.plane_words(codes, term.bits)
    levels = np.pad(term.levels, ((0, 0), (0, (1 << term.bits) - n_levels)), mode="edge")
    multipliers = None
    if term.multipliers is not None:
        multipliers = put(words.plane_words(unpack_multipliers(term.multipliers, out_features), 4)[0])
    per_group = {
        name: put(words.group_rows(unpack_groups(array, out_features)))
        for name in _PER_GROUP
        if (array := getattr(term, name)) is not None
    }
    scales = put(words.group_rows(unpack_groups(term.scales, out_features)))
    small = CodeTerm(**_described(term), codes=term.codes[:0], scales=term.scales[:0])
    return DeviceCodes(
        small, tuple(map(put, planes)), scales, put(levels.reshape(-1)), multipliers, per_group
    )


def _described(term: CodeTerm) -> dict[str, Any]:
    """What a term says besides its arrays per weight and group."""
    names = ("bits", "levels", "scale_type", "group_size", "tensor_scale", "packing", "super_size")
    return {name: getattr(term, name) for name in (*names, "tensor_divisor")}


def _floats(values: np.ndarray, put: Put) -> DeviceFloats:
    """values: [out_features, inputs], of type int16 the bits of bfloat16."""
    placed = put(words.group_rows(values))
    return DeviceFloats(placed.view(torch.bfloat16) if placed.dtype == torch.int16 else placed)


def _entries(term: EntriesTerm, out_features: int, put: Put) -> DeviceEntries:
    rows, columns = term.places()
    order = np.lexsort((columns, rows))
    counts = np.bincount(rows, minlength=out_features)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return DeviceEntries(
        put(starts), put(columns[order].astype(np.int32)), put(term.values[order]), int(counts.max())
    )


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
