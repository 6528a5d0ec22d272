"""What may be asked of Auto, and how bytes are written."""

import pytest

from lowbit.errors import FormatError, UnsupportedError
from lowbit.formats import parse_format
from lowbit.formats.auto import Auto, parse_bytes, timings_of


def test_names_become_formats_and_repetitions_one():
    auto = Auto(bits=3.2, choices="int2-g64,int3-g64, int2-g64")
    assert auto.choices == (parse_format("int2-g64"), parse_format("int3-g64")) == auto.formats
    assert auto == Auto(bits=3.2, choices=["int2-g64", "int3-g64"])
    assert len(Auto(bits=3).formats) > 2


def test_the_embedding_takes_what_a_scheme_gives_it():
    assert Auto(bits=3).embedding_formats == (parse_format("int6-g32"),)
    assert Auto(bits=8.5, choices="int8-g32").embedding_formats == (parse_format("int8-g32"),)
    both = Auto(bytes="60MB", embedding="int4-g32,int8-g32")
    assert both.embedding_formats == (parse_format("int4-g32"), parse_format("int8-g32"))
    scheme = Auto(bits=3, embedding="int4-g32", activations="int16").scheme(parse_format("int3-g32"), {})
    assert (scheme.embedding, scheme.activations) == (parse_format("int4-g32"), "int16")


@pytest.mark.parametrize(
    "text, count",
    [("60MB", 60_000_000), ("57.5 MiB", 60293120), (123, 123), ("2gb", 2 * 10**9), ("7 B", 7), ("1e3", None)]
    + [(bad, None) for bad in ("", "MB", "-1", "0", "3 apples", True, 0.5)],
)
def test_bytes(text, count):
    if count is None:
        with pytest.raises(FormatError, match="bytes="):
            parse_bytes(text)
    else:
        assert parse_bytes(text) == count == Auto(bytes=text).bytes


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "give one of them"),
        ({"bits": 3, "bytes": 5}, "give one of them"),
        ({"bits": 0}, "above 0"),
        ({"bits": float("nan")}, "above 0"),
        ({"bits": 3, "choices": []}, "no choices"),
        ({"bits": 3, "choices": "int2-g64,int99"}, "bits=99"),
        ({"bits": 3, "choices": ["df11"]}, "leave it out"),
        ({"bits": 3, "embedding": ["int4-g32", "int8-g32"]}, "budget in bytes"),
        ({"bits": 3, "sensitivity": "guess"}, "use one of fisher"),
        ({"bytes": 9, "embedding": "int4-g32,int8-g32", "sensitivity": "output"}, "compares no layer"),
        ({"bits": 3, "together": "model"}, "use one of matrix"),
        ({"bits": 3, "samples": 0}, "at least 1"),
        ({"bits": 3, "seconds": 0}, "above 0"),
        ({"bits": 3, "seconds": 1}, "belong together"),
        ({"bits": 3, "timings": {}}, "belong together"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(FormatError, match=message):
        Auto(**arguments)


def test_activations_are_those_of_a_scheme():
    with pytest.raises(UnsupportedError, match="activations"):
        Auto(bits=3, activations="int5")


def test_timings_are_the_fastest_products_with_one_token():
    def entry(seconds, batch=1, format="int4-g32"):
        return {
            "format": format,
            "out_features": 64,
            "in_features": 32,
            "batch": batch,
            "seconds": seconds,
            "threads": 2,
        }

    kernels = [entry(3e-6), entry(2e-6), entry(1e-6, 512), entry(5e-6, format="nf4-g64")]
    found = timings_of({"kernels": kernels, "cpu": "x"})
    assert found == {("int4-g32", 64, 32): 2e-6, ("nf4-g64", 64, 32): 5e-6}
    for bad in ({}, {"kernels": [{"batch": 1}]}, {"kernels": 7}, {"kernels": [entry(1e-6, 512)]}):
        with pytest.raises(FormatError, match=r"bench kernels|--batch 1"):
            timings_of(bad)
