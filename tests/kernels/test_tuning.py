"""The crossovers between kernels: measured, kept, read back; no result depends on them."""

import json

import numpy as np
import pytest

from lowbit import _native
from lowbit.formats import parse_format
from lowbit.kernels import tuning
from lowbit.quantize import round_to_nearest


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path))
    monkeypatch.delenv("LOWBIT_TUNING", raising=False)
    before, tables = _native.crossovers(), _native.tables()
    yield
    _native.set_crossovers(*before)
    _native.set_tables(tables)


def test_measured_once_and_read_back():
    found = tuning.tune()
    assert all(1 <= value <= tuning.MOST for value in found)
    _native.set_crossovers(1, 1)
    tables = _native.tables()
    _native.set_tables(tables ^ 2)
    assert tuning.apply() == found == _native.crossovers() and _native.tables() == tables


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"%s": 3}', '{"%s": {"gemv": 0, "few": 4}}'])
def test_a_damaged_file_is_ignored_and_rewritten(text):
    tuning.path().write_text(text.replace("%s", tuning._key()))
    _native.set_crossovers(3, 5)
    assert tuning.apply() == (3, 5)
    found = tuning.tune()
    assert json.loads(tuning.path().read_text())[tuning._key()] == found._asdict()


def test_off_neither_reads_nor_measures(monkeypatch):
    monkeypatch.setenv("LOWBIT_TUNING", "off")
    _native.set_crossovers(3, 5)
    assert tuning.tune() == tuning.apply() == (3, 5)
    assert not tuning.path().exists()


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "file"))
    tuning.tune()


WIDTHS = [f"int{bits}-g{group}" for bits, group in zip(range(1, 9), (64, 32, 128, 64, 96, 32, 64, 64))]
OTHERS = ["int8", "ternary", "mxfp4", "mxfp8_e4m3", "int4a-g64", "nf4-g64"]


@pytest.mark.parametrize("name", [*WIDTHS, *OTHERS])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_every_kernel_gives_the_same_bits(name, activation_bits, rng):
    """At every width of a tile of tokens, of one and of several tiles."""
    fmt = parse_format(name)
    native = round_to_nearest(rng.normal(size=(70, 384)).astype(np.float32), fmt).native()
    x = rng.normal(size=(tuning.MOST, 384)).astype(np.float32)
    _native.set_crossovers(1, 1)
    expected, kernels = _native.matmul(x, native, activation_bits), set()
    for gemv, few in ((1, 1), (tuning.MOST, 1), (1, tuning.MOST)):
        _native.set_crossovers(gemv, few)
        for tokens in (*range(2, 11), 13, 16, 19, tuning.MOST):
            kernel = native.kernel(tokens, activation_bits)
            kernels.add(kernel)
            found = _native.matmul(x[-tokens:], native, activation_bits)
            np.testing.assert_array_equal(found, expected[-tokens:], err_msg=f"{kernel}, {tokens} tokens")
    assert native.kernel(1) == "gemv"
    assert kernels >= {"gemm", "gemv"}
    assert ("few" in kernels) == (name not in ("nf4-g64", "mxfp8_e4m3"))  # levels of two bytes


def test_crossovers_out_of_range_are_named():
    with pytest.raises(ValueError, match="gemv=0"):
        _native.set_crossovers(0, 4)
    with pytest.raises(ValueError, match="few=65"):
        _native.set_crossovers(4, 65)
