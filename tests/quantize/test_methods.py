"""The table of methods: every one of them runs, its options are parsed and refused."""

import numpy as np
import pytest

from lowbit.errors import RequestError
from lowbit.formats import parse_format
from lowbit.quantize.methods import METHODS, parse_method
from lowbit.quantize.statistics import Statistics

# What a method is tried with; the others as they are, with int4-g64.
OWN = {
    "bcq": ("bcq", "bcq4-g64"),
    "hqq": ("hqq", "int4a-g64"),
    "shiftadd": ("shiftadd", "bcq4-g64-e8m0"),
    "dbllm": ("dbllm:objective=weights", "dual-g16"),
    "ptqtp": ("ptqtp", "trit3-g64"),
    "llmfp4": ("llmfp4", "e2m1-g32"),
    "lossless": ("lossless:rounded=yes", "df11"),
}

rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def case():
    """(weight [48, 128], Statistics of 512 correlated inputs)."""
    x = (rng.normal(size=(512, 128)) @ rng.normal(size=(128, 128)) * rng.gamma(1, 1, 128)).astype(np.float32)
    weight = rng.normal(size=(48, 128)).astype(np.float32)
    return weight, Statistics(x.T @ x / len(x), np.abs(x).max(axis=0), len(x))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_a_matrix_near_the_weight(name, case):
    weight, statistics = case
    text, format = OWN.get(name, (name, "int4-g64"))
    matrix = parse_method(text)(weight, parse_format(format), statistics)
    assert matrix.shape == weight.shape
    assert np.square(matrix.dequantize() - weight).sum() < 0.1 * np.square(weight).sum()
    assert METHODS[name].summary and METHODS[name].source


def test_calibrated_methods_refuse_to_run_without_statistics(case):
    with pytest.raises(RequestError, match="calibration"):
        parse_method("gptq")(case[0], parse_format("int4-g64"))


def test_options_are_parsed_by_the_type_of_their_default():
    choice = parse_method("gptq:order=activation,damping=0.05")
    assert choice.options == {"order": "activation", "damping": 0.05}
    assert str(choice) == "gptq:order=activation,damping=0.05"
    assert str(parse_method("rtn")) == "rtn"


@pytest.mark.parametrize(
    "text", ["", "gptqq", "gptq:damp=1", "gptq:damping", "gptq:damping=much", "rtn:order=given"]
)
def test_bad_choices(text):
    with pytest.raises(RequestError, match="quantize: method"):
        parse_method(text)
