"""Energy counters: wrap-around, what is summed, still counters, estimates and absence."""

import sys
import time
import types

import pytest

from lowbit.errors import RequestError
from lowbit.measure import energy
from lowbit.measure.energy import EnergyMeter, RaplCounter, estimate


def _zone(root, name, label, microjoules, wrap=1_000_000):
    zone = root / name
    zone.mkdir(parents=True)
    (zone / "name").write_text(label + "\n")
    (zone / "energy_uj").write_text(f"{microjoules}\n")
    (zone / "max_energy_range_uj").write_text(f"{wrap}\n")
    return zone / "energy_uj"


def test_packages_and_memory_are_summed_and_nothing_twice(tmp_path):
    package = _zone(tmp_path, "intel-rapl:0", "package-0", 100)
    memory = _zone(tmp_path, "intel-rapl:0:2", "dram", 0)
    core = _zone(tmp_path, "intel-rapl:0:0", "core", 0)
    psys = _zone(tmp_path, "intel-rapl:1", "psys", 0)
    other = _zone(tmp_path, "intel-rapl:2", "package-1", 5)
    counter = RaplCounter(tmp_path)
    for path, value in ((package, 600_100), (memory, 30_000), (core, 500_000), (psys, 900_000), (other, 5)):
        path.write_text(str(value))
    assert counter.read() == pytest.approx(0.63)


def test_a_counter_may_pass_its_end(tmp_path):
    path = _zone(tmp_path, "intel-rapl:0", "package-0", 999_990)
    counter = RaplCounter(tmp_path)
    path.write_text("9")  # 999990 .. 1000000, then 0 .. 9: 20 steps
    assert counter.read() == pytest.approx(20e-6)
    path.write_text("19")
    assert counter.read() == pytest.approx(30e-6)


def test_the_meter_reports_what_the_counter_gained(tmp_path):
    path = _zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with EnergyMeter(powercap=tmp_path) as meter:
        path.write_text("250000")
        time.sleep(0.06)
    report = meter.report
    assert (report.source, report.joules, report.interval) == ("rapl", pytest.approx(0.25), None)
    assert report.window_seconds >= 0.06 and report.core_seconds >= 0


def test_a_still_counter_is_absent_not_zero(tmp_path):
    _zone(tmp_path, "intel-rapl:0", "package-0", 0)
    with EnergyMeter(powercap=tmp_path) as meter:
        time.sleep(0.06)
    assert meter.report.source == "unavailable"
    assert meter.report.joules is None
    assert "stands still" in meter.report.reason
    with EnergyMeter(powercap=tmp_path, watts=100) as meter:
        time.sleep(0.06)
    assert meter.report.source == "estimated_tdp"
    assert "stands still" in meter.report.reason


def test_without_counter_and_power_nothing_is_claimed(tmp_path):
    with EnergyMeter(powercap=tmp_path / "none") as meter:
        pass
    assert meter.report.to_json()["joules"] is None
    assert "no energy counter" in meter.report.reason


def test_an_estimate_has_an_interval_from_used_cores_to_full_power(monkeypatch):
    monkeypatch.setattr(energy.os, "cpu_count", lambda: 4)
    report = estimate(100.0, window=10.0, cores=20.0)  # half of the machine
    assert report.interval == (pytest.approx(500.0), pytest.approx(1000.0))
    assert report.joules == pytest.approx(650.0)
    assert report.source == "estimated_tdp"


def test_a_meter_file(tmp_path):
    path = tmp_path / "joules"
    path.write_text("1000.5")
    with EnergyMeter(meter=path) as meter:
        path.write_text("1003.0")
    assert (meter.report.source, meter.report.joules) == ("meter", 2.5)
    path.write_text("a lot")
    with pytest.raises(RequestError, match="one number"):
        EnergyMeter(meter=path)


def test_an_nvidia_card(monkeypatch):
    energies = iter([0, 5_000, 12_000])
    fake = types.SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda card: next(energies),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    with EnergyMeter(card=1) as meter:
        pass
    assert (meter.report.source, meter.report.scope, meter.report.joules) == ("nvml_counter", "card 1", 7.0)


def test_a_power_that_cannot_be_is_refused():
    with pytest.raises(RequestError, match="watts=-5"):
        EnergyMeter(watts=-5)
