"""Every sampling parameter is checked at the boundary, with value, limit and remedy."""

import numpy as np
import pytest

from lowbit.engine import SamplingParameters
from lowbit.errors import RequestError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("nan")),
        ("frequency_penalty", 1e9),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", ("",)),
        ("stop", ("a",) * 17),
        ("logprobs", 101),
    ],
)
def test_bad_values_name_the_parameter(name, value):
    with pytest.raises(RequestError, match=name if name != "stop" else "stop"):
        SamplingParameters(**{name: value})


def test_good_values():
    p = SamplingParameters(
        max_tokens=None,
        temperature=np.float32(0.5),
        top_k=np.int64(3),
        seed=2**64 - 1,
        stop="end",
        logprobs=0,
    )
    assert p.stop == ("end",)
