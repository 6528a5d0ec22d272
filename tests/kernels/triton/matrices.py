"""Random matrices of every format and every kind of term; for tests only."""

import numpy as np

from lowbit.formats import FORMATS
from lowbit.packed import (
    NO_INPUT,
    CodeTerm,
    ColumnsTerm,
    EntriesTerm,
    GatheredTerm,
    LowRankTerm,
    PackedMatrix,
    RowsTerm,
    SparseTerm,
    pack_codes,
    pack_groups,
)
from lowbit.quantize import quantize_array


def of_format(name, out_features=70, in_features=384, seed=0):
    fmt = FORMATS[name]
    weight = np.random.default_rng(seed).standard_normal((out_features, in_features), dtype=np.float32)
    if fmt.float_type is not None:
        weight = (weight.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return quantize_array(weight, fmt, search="minmax")


def codes_term(rng, bits, out_features, in_features, group_size, **further):
    codes = pack_codes(rng.integers(0, 1 << bits, (out_features, in_features), dtype=np.uint8), bits)
    levels = (np.arange(1 << bits, dtype=np.float32) - (1 << bits) // 2)[None]
    groups = in_features // group_size if group_size else 1
    scales = pack_groups(rng.uniform(0.5, 2, (out_features, groups)).astype(np.float16))
    return CodeTerm(bits, levels, codes, scales, "fp16", group_size, **further)


def offset_term(rng, out_features, in_features, group_size):
    groups = in_features // group_size
    offsets = pack_groups(rng.standard_normal((out_features, groups)).astype(np.float16))
    return codes_term(rng, 4, out_features, in_features, group_size, offsets=offsets, tensor_divisor=3.0)


def m8_term(rng, out_features, in_features):
    codes = pack_codes(rng.integers(0, 8, (out_features, in_features), dtype=np.uint8), 3)
    groups, supers = in_features // 16, in_features // 64
    scales, offsets = (
        pack_groups(rng.uniform(0.01, 0.02, (out_features, supers)).astype(np.float16)) for _ in range(2)
    )
    factors, offset_factors = (
        pack_groups(rng.integers(-32, 32, (out_features, groups), dtype=np.int8)) for _ in range(2)
    )
    levels = np.arange(8, dtype=np.float32)[None]
    return CodeTerm(
        3, levels, codes, scales, "m8", 16, offsets=offsets, factors=factors,
        offset_factors=offset_factors, super_size=64,
    )  # fmt: skip


def side_matrices(out_features=70, in_features=192):
    """Name -> a matrix for every kind of term that stands beside codes or in their place."""
    rng = np.random.default_rng(5)
    shape = (out_features, in_features)
    codes = codes_term(rng, 4, *shape, 64)
    columns = np.sort(rng.choice(in_features, 7, replace=False)).astype(np.uint32)
    values = pack_groups(rng.standard_normal((out_features, 7)).astype(np.float16))
    places = rng.choice(out_features * in_features, 50, replace=False)
    entries = EntriesTerm.from_places(
        places // in_features, places % in_features, rng.standard_normal(50), out_features
    )
    u = pack_groups(rng.standard_normal((out_features, 5)).astype(np.float16))
    low_rank = LowRankTerm(u, rng.standard_normal((5, in_features)).astype(np.float16))
    some = np.sort(rng.choice(out_features, 9, replace=False)).astype(np.uint32)
    inputs = np.full(in_features + 64, NO_INPUT, np.uint32)
    inputs[:in_features] = rng.permutation(in_features)
    kept = np.argsort(np.argsort(rng.random((out_features, in_features // 4, 4)))) < 2
    raw = rng.integers(0, 4, shape).astype(np.uint8)
    levels = np.array([[-2, -1, 1, 2]], np.float32)
    sparse = SparseTerm.from_codes(
        raw, kept.reshape(shape), 2, levels, codes.scales, "fp16", 64, tensor_scale=0.5
    )
    terms = {
        "columns": (codes, ColumnsTerm(columns, values, True)),
        "added columns": (codes, ColumnsTerm(columns, values, False)),
        "entries": (codes, entries),
        "low rank": (codes, low_rank),
        "rows": (codes, RowsTerm(some, codes_term(rng, 3, 9, in_features, 32))),
        "gathered": (GatheredTerm(inputs, codes_term(rng, 4, out_features, in_features + 64, 64)),),
        "2:4": (sparse,),
        "offsets": (offset_term(rng, *shape, 32),),
        "m8": (m8_term(rng, *shape),),
        "all": (codes, ColumnsTerm(columns, values, True), entries, low_rank, offset_term(rng, *shape, 64)),
    }
    return {name: PackedMatrix(*shape, parts) for name, parts in terms.items()}
