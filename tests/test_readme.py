"""The examples of README and CONTRIBUTING run, and do what they say."""

import re
from pathlib import Path

import numpy as np

from lowbit.formats import parse_format
from lowbit.quantize import methods, round_to_nearest

ROOT = Path(__file__).resolve().parents[1]


def example(page):
    text = (ROOT / page).read_text()
    section = text[text.index("<!-- example:begin") : text.index("<!-- example:end -->")]
    return compile(re.search(r"```python\n(.*?)```", section, re.S).group(1), page, "exec")


def test_the_example_runs(capsys):
    exec(example("README.md"), {})
    bits, difference = (float(line) for line in capsys.readouterr().out.split())
    assert bits == 3.25
    assert 0 < difference < 1


def test_the_method_of_the_example_runs(monkeypatch):
    names = {}
    exec(example("CONTRIBUTING.md"), names)
    monkeypatch.setitem(methods.METHODS, "clipped", methods.Method(names["clipped"], False, "cut", "here"))
    weight = np.random.default_rng(0).standard_t(3, (8, 128)).astype(np.float32)
    fmt = parse_format("int3-g64")
    cut = methods.parse_method("clipped:sigmas=2.0")(weight, fmt).dequantize()
    whole = methods.parse_method("clipped:sigmas=100")(weight, fmt).dequantize()
    np.testing.assert_array_equal(whole, round_to_nearest(weight, fmt).dequantize())
    assert np.abs(cut).max() < np.abs(whole).max()
