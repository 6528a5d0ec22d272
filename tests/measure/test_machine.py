"""The doctor's findings on machines of every kind."""

import pytest

from lowbit.measure import describe_machine, find_problems, machine, peak_rss_bytes

HEALTHY = {
    "cpu": "a CPU",
    "isa": "avx512",
    "supported_isas": ["scalar", "avx2", "avx512"],
    "threads": 4,
    "cpus": 4,
    "cgroup_cpus": None,
    "memory_bytes": 16 * 2**30,
    "memory_available_bytes": 8 * 2**30,
    "load_average": 0.1,
    "native_error": None,
}


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("LOWBIT_ISA", raising=False)
    monkeypatch.delenv("LOWBIT_THREADS", raising=False)
    monkeypatch.setattr(machine, "_read", lambda path: None)


def test_a_healthy_machine_has_no_problems():
    assert find_problems(HEALTHY) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"native_error": "no such file", "isa": None, "threads": 0}, ["native module", "make build"]),
        ({"isa": "avx2", "supported_isas": ["scalar", "avx2"]}, ["VNNI"]),
        ({"isa": "scalar", "supported_isas": ["scalar"]}, ["AVX2"]),
        ({"cgroup_cpus": 1.5}, ["4 threads on 1.5", "--threads 2"]),
        ({"cpus": 2, "threads": 3}, ["3 threads on 2"]),
        ({"memory_available_bytes": 2**28}, ["0.25 GiB"]),
        ({"load_average": 9.0}, ["load average is 9.0"]),
    ],
)
def test_each_problem_is_found_and_has_a_remedy(change, words):
    problems = find_problems({**HEALTHY, **change})
    assert len(problems) == 1
    for word in words:
        assert word in problems[0]


def test_environment_overrides_are_named(monkeypatch):
    monkeypatch.setenv("LOWBIT_ISA", "avx2")
    assert "LOWBIT_ISA" in find_problems({**HEALTHY, "isa": "avx2"})[0]
    monkeypatch.delenv("LOWBIT_ISA")
    monkeypatch.setenv("LOWBIT_THREADS", "1")
    assert "LOWBIT_THREADS" in find_problems({**HEALTHY, "threads": 1})[0]


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"/sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        ({"/sys/fs/cgroup/cpu.max": "max 100000"}, None),
        (
            {
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            2.0,
        ),
        (
            {"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
            None,
        ),
        ({}, None),
    ],
)
def test_cgroup_quota(monkeypatch, files, cpus):
    monkeypatch.setattr(machine, "_read", files.get)
    assert machine.cgroup_cpus() == cpus


def test_memory_is_bounded_by_the_cgroup(monkeypatch):
    files = {
        "/proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 6000 kB",
        "/sys/fs/cgroup/memory.max": "4096000",
        "/sys/fs/cgroup/memory.current": "1024000",
    }
    monkeypatch.setattr(machine, "_read", files.get)
    assert machine.memory_bytes("MemTotal") == 4096000
    assert machine.memory_bytes("MemAvailable") == 4096000 - 1024000
    monkeypatch.setattr(machine, "_read", {"/proc/meminfo": files["/proc/meminfo"]}.get)
    assert machine.memory_bytes("MemTotal") == 8000 * 1024


def test_this_machine_can_be_described():
    info = describe_machine()
    assert set(HEALTHY) <= set(info) and info["cpus"] >= 1
    assert peak_rss_bytes() > 2**20
