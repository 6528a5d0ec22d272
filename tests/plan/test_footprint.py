"""Carbon, water and money against sums done by hand."""

import math

import pytest

from lowbit.errors import RequestError
from lowbit.plan.footprint import Embodied, Site, per_million_tokens


def test_one_joule_a_token_at_the_worlds_mean():
    # 1 MJ = 0.27778 kWh; x 1.2 x 473 g = 157.7 g; x (0.5 + 1.2 x 3.908) L = 1.4416 L
    found = per_million_tokens(1.0, 0.0, Site(pue=1.2, water_on_site=0.5))
    assert found.kwh == pytest.approx(0.277778, abs=1e-6)
    assert found.grams_co2 == pytest.approx(157.7, abs=0.05)
    assert found.litres_water == pytest.approx(1.4416, abs=1e-4)
    assert found.money is None


def test_money_is_machine_hours_and_energy():
    # 100 tokens/s: 2.7778 h a million at 4 an hour = 11.111; 3.6 J/token = 1 kWh x 1.5 x 0.3 = 0.45
    found = per_million_tokens(3.6, 0.01, Site(pue=1.5, tariff=0.3, machine_price=4.0, currency="EUR"))
    assert found.money == pytest.approx(11.1111 + 0.45, abs=1e-4)
    assert found.currency == "EUR"


def test_making_the_machine_counts_by_the_hour():
    # 164 kg over 3 years of 8766 h: 6.2362 g/h; 1000 tokens/s: 0.27778 h
    found = per_million_tokens(0.0, 0.001, embodied=Embodied(164_000))
    assert found.grams_co2 == pytest.approx(6.2362 * 0.277778, rel=1e-4)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_factors_that_cannot_be_are_refused(value):
    with pytest.raises(RequestError, match="carbon_intensity"):
        Site(carbon_intensity=value)
    with pytest.raises(RequestError, match="joules_per_token"):
        per_million_tokens(value, 0.0)
    with pytest.raises(RequestError, match="pue"):
        Site(pue=0.9)
