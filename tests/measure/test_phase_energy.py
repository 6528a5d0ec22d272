"""Joules per token of prompt and answer, with their footprint, and what `lowbit bench --energy` says."""

import itertools
import json

import pytest

import lowbit
from lowbit.cli import main
from lowbit.measure.energy import EnergyMeter
from lowbit.measure.phase_energy import phase_energy
from lowbit.plan.footprint import Site


class _Ticking:
    """A meter that gains 10 J with every reading."""

    source, scope = "meter", "a test"

    def __init__(self):
        self._joules = itertools.count(0, 10)

    def read(self):
        return float(next(self._joules))


def _meter():
    meter = EnergyMeter(watts=None)
    meter._counter = _Ticking()
    return meter


def test_joules_of_a_window_are_shared_by_its_tokens(tiny_model):
    model = lowbit.load(tiny_model)
    found = phase_energy(model, _meter, Site(tariff=0.5), prefill=16, decode=8, seconds=0.01)
    for phase in ("prefill", "decode"):
        row = found[phase]
        assert row["joules_per_token"] == pytest.approx(10 / row["tokens"])
        kwh = row["joules_per_token"] / 3.6
        assert row["per_million_tokens"]["kwh"] == pytest.approx(kwh)
        assert row["per_million_tokens"]["money"] == pytest.approx(kwh * 0.5)
    assert found["prefill"]["tokens"] % 16 == 0


def test_bench_says_where_the_energy_comes_from(tiny_model, capsys):
    common = [
        "bench",
        str(tiny_model),
        "--prefill",
        "8",
        "--decode",
        "4",
        "--repeats",
        "1",
        "--no-first-token",
    ]
    assert main([*common, "--energy", "--watts", "50", "--pue", "1.5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    energy = result["energy"]
    assert energy["decode"]["energy"]["source"] in ("estimated_tdp", "rapl")
    assert energy["site"]["pue"] == 1.5
    parts = result["memory_bytes"]
    assert sum(parts.values()) >= result["peak_rss_bytes"]
    assert parts["weights"] > 0 and parts["keys and values"] > 0
    assert main([*common, "--watts", "50"]) == 2
    assert "--energy" in capsys.readouterr().err


def test_a_country_comes_from_codecarbon(tiny_model):
    pytest.importorskip("codecarbon", reason="CodeCarbon is not installed: pip install codecarbon")
    from lowbit.errors import RequestError
    from lowbit.measure.site import country_site

    site = country_site("fra", Site(pue=1.3))
    assert 10 < site.carbon_intensity < 120  # mostly nuclear
    assert site.pue == 1.3 and "France" in site.source
    with pytest.raises(RequestError, match="XXX"):
        country_site("XXX", Site())
