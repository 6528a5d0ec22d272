"""Products that are timed: the matrices, the refusals and the arithmetic; the times only for their sign."""

import numpy as np
import pytest

from lowbit import Format, _native, parse_format
from lowbit.errors import FormatError, RequestError
from lowbit.measure import bench_kernels, kernels, plot, products

KEYS = {
    "format", "bits_per_weight", "out_features", "in_features", "batch", "threads", "kernel", "seconds",
    "bytes_per_second", "bound_fraction",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A few milliseconds for each product, and small buffers."""
    for name in ("ROUND_SECONDS", "BOUND_SECONDS"):
        monkeypatch.setattr(kernels, name, 0.001)
    monkeypatch.setattr(kernels, "ROUNDS", 2)
    monkeypatch.setattr(kernels, "LEAST_BANDWIDTH_BYTES", 2**20)
    monkeypatch.setattr(kernels, "BANDWIDTH_CACHES", 0)
    monkeypatch.setattr(products, "LEAST_COLD_BYTES", 2**16)
    monkeypatch.setattr(products, "COLD_CACHES", 0)


def test_shapes():
    assert products.parse_shape("5632x2048") == products.parse_shape((5632, 2048)) == (5632, 2048)
    for bad in ("5632", "0x64", "-1x64", "64x", "64x64x64", "٣x64", f"64x{2**28 + 1}", (64,), ""):
        with pytest.raises(RequestError, match="OUTxIN"):
            products.parse_shape(bad)


@pytest.mark.parametrize("name", ["int4-g32", "nf4-g64", "bitmod4-g128", "bcq3-g128", "fp16", "ternary"])
def test_random_matrix_repeats_its_rows(name):
    matrix = products.random_matrix(parse_format(name), 160, 128)
    weight = matrix.dequantize()
    assert weight.shape == (160, 128) and np.ptp(weight) > 0
    np.testing.assert_array_equal(weight[64:128], weight[:64])
    np.testing.assert_array_equal(weight[128:], weight[:32])
    copies = products.copies_of(matrix, 3 * matrix.nbytes)
    assert len(copies) == 3
    for copy in copies:
        np.testing.assert_array_equal(copy.dequantize(), weight)
        assert not any(
            np.shares_memory(a, b) for a, b in zip(copy.state()[1].values(), matrix.state()[1].values())
        )


def test_a_product_gets_every_key_and_the_arithmetic_fits():
    before = _native.threads()
    seen = []
    result = bench_kernels(
        ["int4-g32", Format.codebook([-1.0, 0.2, 0.5, 1.0], group_size=64, name="mine")],
        ["64x128"],
        batches=[3, 1],
        threads=[1, 2],
        progress=lambda done, total, what: seen.append((done, total)),
    )
    assert _native.threads() == before
    found = result["kernels"]
    assert len(found) == 2 * 2 * 2 and not result["skipped"] and seen[0] == (0, 8) and seen[-1] == (8, 8)
    assert [b["threads"] for b in result["bounds"]] == [1, 2]
    for entry in found:
        assert set(entry) >= KEYS
        assert entry["seconds"] > 0 and entry["bound_fraction"] > 0 and entry["kernel"]
        n_bytes = entry["bytes_per_second"] * entry["seconds"]
        assert n_bytes == pytest.approx(entry["bits_per_weight"] * 64 * 128 / 8)
        assert entry["tokens_per_second"] * entry["seconds"] == pytest.approx(entry["batch"])
        assert entry["bound_fraction"] >= 0.99 * min(entry["bandwidth_fraction"], entry["peak_fraction"])
        assert entry["seconds_low"] <= entry["seconds"] <= entry["seconds_high"]
    assert [e["batch"] for e in found[:2]] == [1, 3]
    assert {e["format"] for e in found} == {"int4-g32", "mine"}


def test_the_bound_is_the_longer_of_two_times(monkeypatch):
    monkeypatch.setattr(kernels, "bandwidth", lambda: 1e6)
    monkeypatch.setattr(_native, "measure_int8_peak", lambda seconds: 1e9)
    monkeypatch.setattr(kernels, "seconds_per_call", lambda calls: 0.01)
    memory = kernels.time_product([], np.zeros((1, 1)), 8, n_bytes=5000, work=2_000_000, integer=True)
    assert memory["bound"] == "memory" and memory["bound_fraction"] == pytest.approx(0.5)
    assert memory["peak_fraction"] == pytest.approx(0.2) and memory["bytes_per_second"] == 500_000
    work = kernels.time_product([], np.zeros((1, 1)), 8, n_bytes=1000, work=2_000_000, integer=True)
    assert work["bound"] == "arithmetic" and work["bound_fraction"] == pytest.approx(0.2)
    assert work["bandwidth_fraction"] == pytest.approx(0.1)


def test_sixteen_bit_activations_count_both_limbs(monkeypatch):
    seen = []

    def note(copies, x, activation_bits, n_bytes, work, integer):
        seen.append((activation_bits, work, integer))
        return {"seconds": 1.0}

    monkeypatch.setattr(kernels, "time_product", note)
    for name, bits in (("int4-g32", 8), ("int4-g32", 16), ("bf16", 16)):
        kernels.measure_batches(parse_format(name), (64, 128), [2], bits)
    macs = 64 * 128 * 2
    assert seen == [(8, macs, True), (16, 2 * macs, True), (16, macs, False)]


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    real = _native.matmul

    def wrong(x, matrix, activation_bits=8):
        y = np.array(real(x, matrix, activation_bits))
        y[-1] = 0
        return y

    kernels.check(parse_format("int4-g32"), 128, [1, 5], 8)
    monkeypatch.setattr(_native, "matmul", wrong)
    with pytest.raises(ArithmeticError, match="int4-g32, 128 inputs, batch 1"):
        kernels.check(parse_format("int4-g32"), 128, [1], 8)
    with pytest.raises(ArithmeticError, match="batch 5"):
        kernels.check(parse_format("int4-g32"), 128, [5], 8)


def test_calls_are_counted():
    calls = []
    seconds = kernels.seconds_per_call([lambda: calls.append(1), lambda: calls.append(2)])
    assert 0 < seconds < 1e-3 and len(calls) >= 4 and calls.count(1) == calls.count(2)


def test_a_format_that_does_not_fit_is_skipped_and_the_others_go_on():
    result = bench_kernels(["int4-g64", "int8-g32"], ["64x96"], [1])
    assert [e["format"] for e in result["kernels"]] == ["int8-g32"]
    (skipped,) = result["skipped"]
    assert skipped["format"] == "int4-g64" and skipped["shape"] == "64x96" and "96" in skipped["why"]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"formats": ["int44"]}, FormatError, "44"),
        ({"formats": []}, RequestError, "nothing to measure"),
        ({"shapes": ["64"]}, RequestError, "OUTxIN"),
        ({"batches": [0]}, RequestError, "batch 0"),
        ({"batches": [2**20]}, RequestError, "batch 1048576"),
        ({"threads": [0]}, RequestError, "threads 0"),
        ({"threads": [2000]}, RequestError, "threads 2000"),
        ({"activation_bits": 4}, RequestError, "activation_bits=4"),
        ({"shapes": ["10000000x100000"]}, RequestError, "are available"),
        ({"shapes": ["32x100000000"]}, RequestError, "are available"),
        ({"shapes": ["268435456x64"], "batches": [60000]}, RequestError, "are available"),
    ],
)
def test_refusals_come_before_any_measurement(monkeypatch, given, error, words):
    monkeypatch.setattr(kernels, "limits", lambda: pytest.fail("measured something"))
    with pytest.raises(error, match=words):
        bench_kernels(**{"formats": ["int4-g64"], "shapes": ["64x64"], "batches": [1], **given})


def entry(fmt, batch, fraction, shape=(64, 64), threads=2):
    return {
        "format": fmt,
        "out_features": shape[0],
        "in_features": shape[1],
        "batch": batch,
        "threads": threads,
        "bound_fraction": fraction,
        "tokens_per_second": 1000.0 * batch,
    }


@pytest.mark.parametrize("batches", [(1,), (1, 512), (1, 2, 4, 8)])
def test_pictures(tmp_path, batches):
    pytest.importorskip("matplotlib")
    found = [entry(f, b, 0.5, threads=t) for f in ("int4", "nf4") for b in batches for t in (1, 2)]
    path = tmp_path / "out.png"
    plot.check(str(path))
    plot.draw_kernels({"cpu": "A", "isa": "any", "kernels": found}, str(path))
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_pictures_that_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="must end in one of"):
        plot.check(str(tmp_path / "out.gif"))
    with pytest.raises(RequestError, match="no such folder"):
        plot.check(str(tmp_path / "none" / "out.png"))
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(plot.UnsupportedError, match=r"lowbit\[plot\]"):
        plot.check(str(tmp_path / "out.png"))
    with pytest.raises(RequestError, match="nothing was measured"):
        plot.draw_kernels({"cpu": "A", "isa": "any", "kernels": []}, "x.png")
