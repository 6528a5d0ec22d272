"""`lowbit bench kernels`: its object, its table, formats of one's own, and what it refuses."""

import pytest

from lowbit.measure import kernels, products

KEYS = {
    "format", "bits_per_weight", "out_features", "in_features", "batch", "threads", "kernel", "seconds",
    "bytes_per_second", "bound_fraction",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module, name, value in (
        (kernels, "ROUND_SECONDS", 0.001),
        (kernels, "BOUND_SECONDS", 0.001),
        (kernels, "ROUNDS", 1),
        (kernels, "LEAST_BANDWIDTH_BYTES", 2**20),
        (kernels, "BANDWIDTH_CACHES", 0),
        (products, "LEAST_COLD_BYTES", 2**16),
        (products, "COLD_CACHES", 0),
    ):
        monkeypatch.setattr(module, name, value)


def test_one_object(lowbit):
    done = lowbit(
        "bench", "kernels", "--formats", "int4-g32,nf4-g64", "--shapes", "64x128", "--batch", "1,4", "--json"
    )
    assert done.code == 0, done.err
    result = done.json()
    assert len(result["kernels"]) == 4 and all(set(entry) >= KEYS for entry in result["kernels"])
    assert {(e["format"], e["batch"]) for e in result["kernels"]} == {
        (f, b) for f in ("int4-g32", "nf4-g64") for b in (1, 4)
    }
    assert result["bounds"][0]["bandwidth_bytes_per_second"] > 0 and result["isa"] and result["skipped"] == []


def test_table(lowbit):
    done = lowbit(
        "bench", "kernels", "--formats", "int4-g32,int2-g64", "--shapes", "32x96", "--threads", "1,2"
    )
    assert done.code == 0, done.err
    assert "of bound" in done.out and "GB/s" in done.out and "32x96" in done.out
    assert "skipped int2-g64 32x96" in done.out and "1 threads" not in done.out


@pytest.mark.parametrize(
    "text",
    [
        "FORMAT = Format.codebook(L, group_size=32, name='mine')",
        "a = Format.codebook(L, group_size=32, name='mine')",
    ],
)
def test_a_format_of_one_s_own(lowbit, tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(f"from lowbit import Format\nL = [-1, -0.3, 0.1, 0.8]\n{text}\n")
    done = lowbit("bench", "kernels", "--format-file", path, "--shapes", "32x64", "--batch", "1", "--json")
    assert done.code == 0, done.err
    (entry,) = done.json()["kernels"]
    assert entry["format"] == "mine" and 2.4 < entry["bits_per_weight"] < 2.7
    both = ("--formats", "int8-g32", "--format-file", path, "--shapes", "32x64", "--batch", "1", "--json")
    assert [e["format"] for e in lowbit("bench", "kernels", *both).json()["kernels"]] == ["int8-g32", "mine"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--formats", "int44"), "44"),
        (("--formats", ","), "nothing to measure"),
        (("--shapes", "64"), "OUTxIN"),
        (("--shapes", "100000000x100000000"), "are available"),
        (("--batch", "0"), "at least 1"),
        (("--batch", "1,two"), "'two'"),
        (("--threads", "-1"), "at least 1"),
        (("--activation-bits", "4"), "invalid choice"),
        (("--format-file", "missing.py"), "missing.py"),
        (("--format-file", "empty.py"), "makes no Format"),
        (("--format-file", "broken.py"), "ZeroDivisionError"),
        (("--plot", "out.gif"), "must end in"),
        (("model",), "unrecognized"),
    ],
)
def test_refusals(lowbit, tmp_path, more, words):
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    done = lowbit("bench", "kernels", *more, "--json")
    assert done.code == 2 and done.err.count("\n") == 1 and words in done.err, done.err
    assert done.json()["error"]["message"]


def test_help_names_the_subverb(lowbit):
    assert "bench kernels" in lowbit("help").out
    assert "lowbit bench kernels" in " ".join(lowbit("bench", "--help").out.split())
    assert "--format-file" in lowbit("bench", "kernels", "--help").out
    assert lowbit("bench", "./kernels").code == 2  # a model of that name
