"""Products by table lookup: the same bits as without tables, the choice between the two and its override."""

import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lowbit import _native
from lowbit.formats import parse_format
from lowbit.kernels import lookup, tuning
from lowbit.kernels.reference import matmul_reference, matmul_tolerance
from lowbit.packed import CodeTerm, PackedMatrix, pack_codes
from lowbit.packed.layout import pack_groups
from lowbit.quantize import round_to_nearest

SHAPES = [(33, 64, 64), (40, 96, 0), (31, 192, 96), (1, 100, 0), (64, 256, 32), (70, 320, 64), (5, 31, 0)]
EVERY = 0x0E0E


@pytest.fixture(autouse=True)
def as_before():
    before, threads = _native.tables(), _native.threads()
    _native.set_threads(1)
    yield
    _native.set_threads(threads)
    _native.set_tables(before)


def matrices():
    """(name, matrix): every width, of levels that are one apart, further apart and with zero points."""
    rng = np.random.default_rng(3)
    for bits in lookup.BITS:
        for kind in ("one", "step", "zero_points"):
            for shape in SHAPES:
                term = code_term(rng, bits, kind, shape)
                # Enough blocks for the choice to fall on tables: the same rows again.
                yield f"{bits} bits {kind} {shape}", repeated(term, shape)


def code_term(rng, bits, kind, shape):
    out_features, in_features, group_size = shape
    groups = in_features // group_size if group_size else 1
    codes = rng.integers(0, 2**bits, (out_features, in_features)).astype(np.uint8)
    codes[0] = 2**bits - 1  # the largest sums
    levels = (np.arange(2**bits) - bits) * (3 if kind == "step" else 1)
    zeros = rng.integers(0, 2**bits, (out_features, groups)).astype(np.uint8)
    return CodeTerm(
        bits,
        levels.astype(np.float32)[None],
        pack_codes(codes, bits),
        pack_groups(rng.uniform(0.5, 2, (out_features, groups)).astype(np.float16)),
        "fp16",
        group_size,
        zero_points=pack_groups(zeros) if kind == "zero_points" else None,
    )


def repeated(term, shape):
    meta, arrays = PackedMatrix(shape[0], shape[1], (term,)).state()
    rows = 8 * 32 + shape[0]  # kLeastBlocks of native/crossover.cc
    blocks = -(-rows // 32)
    arrays = {
        key: a if key.endswith("levels") else np.resize(a, (blocks, *a.shape[1:]))
        for key, a in arrays.items()
    }
    return PackedMatrix.from_state({**meta, "shape": [rows, shape[1]]}, arrays)


def inputs(in_features):
    """Rows of activations: normal, alike and as large as they get, of both signs, nothing."""
    rng = np.random.default_rng(in_features)
    x = rng.normal(size=(5, in_features)).astype(np.float32)
    x[1], x[2] = 3.0, -3.0
    x[3] = np.where(np.arange(in_features) % 2, 3.0, -3.0)
    x[4] = 0
    return x


def products(matrix, activation_bits, widths):
    _native.set_tables(widths)
    native = matrix.native()
    return np.concatenate(
        [_native.matmul(row[None], native, activation_bits) for row in inputs(matrix.in_features)]
    )


def digests():
    """Of the products by table, after holding them against those without."""
    _native.set_threads(1)
    found = {}
    for name, matrix in matrices():
        digest = hashlib.sha256()
        for activation_bits in (8, 16):
            direct = products(matrix, activation_bits, 0)
            assert matrix.native().kernel(1, activation_bits) == "gemv", name
            looked_up = products(matrix, activation_bits, EVERY)
            assert matrix.native().kernel(1, activation_bits) == "table", name
            np.testing.assert_array_equal(looked_up, direct, err_msg=f"{name}, {activation_bits}")
            digest.update(looked_up.tobytes())
        found[name] = digest.hexdigest()
    return found


def test_tables_change_no_bit_on_any_instruction_set(same_on_every_isa):
    same_on_every_isa(__file__, digests())


def test_equals_the_reference():
    for name, matrix in matrices():
        x = inputs(matrix.in_features)
        for activation_bits in (8, 16):
            difference = np.abs(
                products(matrix, activation_bits, EVERY) - matmul_reference(x, matrix, activation_bits)
            )
            assert (difference <= matmul_tolerance(x, matrix, activation_bits) + 1e-30).all(), name


def test_a_flipped_code_is_seen(rng):
    term = code_term(rng, 1, "one", (64, 256, 32))
    before = products(repeated(term, (64, 256, 32)), 8, EVERY)
    term.codes.reshape(-1)[1000] ^= 8
    after = products(repeated(term, (64, 256, 32)), 8, EVERY)
    assert (before[:4] != after[:4]).any(axis=1).all() and np.abs(before).max() > 0


@pytest.mark.parametrize("name", ["int4-g64", "ternary", "nf4-g64", "int2-g16-m4"])
def test_what_has_no_table_goes_the_direct_way(name, rng):
    native = round_to_nearest(rng.normal(size=(512, 256)).astype(np.float32), parse_format(name)).native()
    _native.set_tables(EVERY)
    assert native.kernel(1) == "gemv"


def test_a_matrix_of_two_widths_names_both(rng):
    terms = tuple(code_term(rng, bits, "one", (512, 64, 64)) for bits in (1, 2))
    native = PackedMatrix(512, 64, terms).native()
    _native.set_tables(1 << 1)
    assert native.kernel(1) == "gemv+table"
    assert native.kernel(1, 16) == "gemv" and native.kernel(2) == native.kernel(2, 16) != "table"


def test_few_blocks_are_not_worth_tables(rng):
    _native.set_tables(EVERY)
    term = code_term(rng, 1, "one", (33, 64, 64))
    assert PackedMatrix(33, 64, (term,)).native().kernel(1) == "gemv"


def test_measuring_keeps_the_setting_and_finds_known_widths():
    _native.set_tables(1 << 2)
    found = lookup.measure()
    assert _native.tables() == 1 << 2 and found & ~EVERY == 0


def test_what_is_forced_is_not_kept_as_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    monkeypatch.setenv("LOWBIT_KERNEL", "table")
    monkeypatch.delenv("LOWBIT_TUNING", raising=False)
    crossovers = _native.crossovers()
    try:
        tuning.tune()
    finally:
        _native.set_crossovers(*crossovers)
    assert lookup.measure() is None
    assert [key for key in json.loads(tuning.path().read_text()) if "tables" in key] == []


SCRIPT = """
import warnings, numpy as np
warnings.simplefilter("error")
from lowbit.formats import parse_format
from lowbit.quantize import round_to_nearest
weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
for name in {names}:
    print(round_to_nearest(weight, parse_format(name)).native().kernel(1))
"""


def run_with(kernel, names):
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(names=names)],
        env={**os.environ, "LOWBIT_KERNEL": kernel},
        capture_output=True,
        text=True,
    )


def test_the_choice_can_be_forced_and_says_where_it_cannot():
    assert run_with("table", ["int1-g64", "int3-g64"]).stdout.split() == ["table"] * 2
    assert run_with("direct", ["int1-g64", "int4-g64"]).stdout.split() == ["gemv"] * 2
    refused = run_with("table", ["int4-g64"])
    assert refused.returncode and "no tables for 4-bit codes" in refused.stderr and "Unset" in refused.stderr
    unknown = run_with("tabel", ["int1-g64"])
    assert unknown.returncode and "LOWBIT_KERNEL=tabel: must be table or direct" in unknown.stderr


if __name__ == "__main__":
    print(json.dumps({"isa": _native.isa(), **digests()}))
