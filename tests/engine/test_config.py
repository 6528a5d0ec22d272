"""How many blocks of keys and values an engine takes."""

import pytest

from lowbit.engine import config
from lowbit.engine.config import EngineConfig
from lowbit.errors import RequestError

BLOCK = 3 << 20


def test_blocks_as_given():
    assert EngineConfig(kv_blocks=7).blocks(BLOCK, 256, 4096) == 7
    assert EngineConfig(kv_bytes=10 * BLOCK + 5).blocks(BLOCK, 256, 4096) == 10
    with pytest.raises(RequestError, match=r"kv_bytes=100 is less than a block of 3145728 bytes"):
        EngineConfig(kv_bytes=100).blocks(BLOCK, 256, 4096)
    with pytest.raises(RequestError, match="give one"):
        EngineConfig(kv_bytes=BLOCK, kv_blocks=1)


@pytest.mark.parametrize(
    "free, blocks",
    [(None, 4 * 17), (1 << 40, 4 * 17), (20 * BLOCK, 10), (BLOCK, 1), (0, 1)],
)
def test_blocks_from_free_memory(monkeypatch, free, blocks):
    """Half of it, and no more than max_sequences full contexts need."""
    monkeypatch.setattr(config, "free_memory_bytes", lambda: free)
    assert EngineConfig(max_sequences=4).blocks(BLOCK, 256, 4097) == blocks


def test_free_memory_is_that_of_the_narrower_limit(monkeypatch):
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    2000 kB\n"}
    monkeypatch.setattr(config, "_read", files.get)
    assert config.free_memory_bytes() == 2000 * 1024
    files["/sys/fs/cgroup/memory.max"], files["/sys/fs/cgroup/memory.current"] = "max\n", "5\n"
    assert config.free_memory_bytes() == 2000 * 1024
    files["/sys/fs/cgroup/memory.max"] = "1005\n"
    assert config.free_memory_bytes() == 1000
    files["/sys/fs/cgroup/memory.current"] = "905\n"
    files["/sys/fs/cgroup/memory.stat"] = "anon 5\nfile 900\ninactive_file 600\nactive_file 200\n"
    assert config.free_memory_bytes() == 900
    files.clear()
    assert config.free_memory_bytes() is None


@pytest.mark.parametrize(
    "name", ["kv_blocks", "kv_bytes", "max_sequences", "chunk_tokens", "max_queued_tokens"]
)
def test_limits_are_positive(name):
    with pytest.raises(RequestError, match=f"{name}=0 must be at least 1"):
        EngineConfig(**{name: 0})


def test_the_target_is_positive():
    with pytest.raises(RequestError, match="target_seconds_between_tokens=0"):
        EngineConfig(target_seconds_between_tokens=0)
