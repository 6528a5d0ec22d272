"""Frames, keys and slots, each alone."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("msgspec", reason="msgspec of lowbit[serve] is not installed")

from lowbit.engine.request import Output, Timings
from lowbit.server import wire, worker
from lowbit.server.errors import ApiError
from lowbit.server.limits import Keys, Limits, Slots

FRAMES = [
    wire.Configure("path", {"threads": 1}, {}),
    wire.Add("7", [1, 2, 3], {"seed": 2**64 - 1, "logit_bias": {5: 1.5}}, "t", -3, ("regex", "a"), 0, True),
    wire.Cancel("7"),
    wire.Cancel("7", "stop"),
]
REPORTS = [
    wire.Loaded({"context": 9}, {}),
    wire.Failed("why", True),
    wire.Step(),
    wire.Step(
        [wire.Delta("1", [5], [-0.5], [[(5, -0.5), (6, -1.0)]]), wire.Delta("2", finish="eos")], {"a": 1}
    ),
]


@pytest.mark.parametrize(("kind", "frames"), [(wire.Command, FRAMES), (wire.Report, REPORTS)])
@pytest.mark.parametrize("size", [1, 3, 64, 1 << 20])
def test_frames_arrive_whole_however_they_are_cut(kind, frames, size):
    data = b"".join(map(wire.encode, frames))
    reader, found = wire.FrameReader(kind), []
    for at in range(0, len(data), size):
        found += reader.feed(data[at : at + size])
    assert found == frames


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff\xff", b"\x01\0\0\0\xc1", wire.encode(wire.Failed("no command"))]
)
def test_bytes_that_are_no_command(data):
    with pytest.raises(ValueError):
        wire.FrameReader(wire.Command).feed(data)


class Core:
    """Says what it is told, a step at a time."""

    def __init__(self, steps):
        self.steps = list(steps)

    @property
    def idle(self):
        return not self.steps

    def step(self):
        return self.steps.pop(0)

    def stats(self):
        return {}


class Channel:
    def __init__(self):
        self.frames = []

    def receive(self, seconds):
        if seconds:
            raise EOFError
        return []

    def send(self, frame):
        self.frames.append(frame)


def frames(steps, interval):
    """The deltas of each frame that a worker sends for these steps."""
    channel = Channel()
    with pytest.raises(EOFError):
        worker.Worker(Core(steps), channel, interval=interval).run()
    return [frame.deltas for frame in channel.frames if frame.deltas]


def test_fast_steps_share_a_frame(monkeypatch):
    """First tokens and ends are sent at once, and nothing is lost in between."""
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: 100.0))
    words = [Output("a", [i], [-i / 2], [[(i, -i / 2)]]) for i in range(5)]
    end = Output("a", [9], [0.0], [[]], finish_reason="length", timings=Timings(generated_tokens=6))
    other = Output("b", [7], [0.0], [[]])
    steps = [[words[0]], [words[1]], [words[2], other], [words[3]], [words[4]], [end]]
    shared = frames(steps, 1000.0)
    assert [[delta.ids for delta in deltas] for deltas in shared] == [[[0]], [[1, 2], [7]], [[3, 4, 9]]]
    assert shared[1][0].logprobs == [-0.5, -1.0] and shared[1][0].tops == [[(1, -0.5)], [(2, -1.0)]]
    assert shared[2][0].finish == "length" and shared[2][0].timings["generated_tokens"] == 6
    each = frames(steps, 0.0)
    assert [[delta.ids for delta in deltas] for deltas in each] == [
        [[0]],
        [[1]],
        [[2], [7]],
        [[3]],
        [[4]],
        [[9]],
    ]
    assert words[1].ids == [1]  # the engine's own lists are left alone


def test_keys():
    keys = Keys(["one", "two"])
    assert len({keys.tenant(b"Bearer one"), keys.tenant(b"bearer  two")}) == 2
    assert "one" not in keys.tenant(b"Bearer one")
    for wrong in (None, b"", b"Bearer", b"Bearer three", b"Basic one", b"Bearer one two", b"one"):
        with pytest.raises(ApiError) as caught:
            keys.tenant(wrong)
        assert caught.value.status == 401
    assert Keys().tenant(None) == Keys().tenant(b"Bearer anything") == ""


def test_slots():
    slots = Slots(Limits(requests=4), tenants=2)
    slots.take("a")
    slots.take("a")
    with pytest.raises(ApiError, match="2 requests"):
        slots.take("a")
    slots.take("b")
    slots.take("c")
    with pytest.raises(ApiError, match="4 requests"):
        slots.take("d")
    slots.give_back("a")
    slots.take("d")
    assert slots.held == 4
    alone = Slots(Limits(requests=4), tenants=1)
    for _ in range(4):
        alone.take("")


APART = """
import os, sys
from pathlib import Path
import numpy as np
from lowbit import _native, quantize, matmul
from lowbit.server.worker import keep_apart
_native.set_threads(2)
matrix = quantize(np.ones((2048, 2048), np.float32), "int4-g32")
for _ in range(40):
    matmul(np.ones((64, 2048), np.float32), matrix)
keep_apart(int(sys.argv[1]))
tasks = [int(task.name) for task in Path("/proc/self/task").iterdir()]
print(sorted(tuple(os.sched_getaffinity(task)) for task in tasks))
"""


def test_computing_threads_keep_to_processors_of_their_own():
    if not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs Linux and two processors")
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("the kernel does not tell what threads have used")
    some = sorted(os.sched_getaffinity(0))[:2]
    root = Path(worker.__file__).parents[2]

    def run(threads):
        told = subprocess.run(
            [sys.executable, "-c", APART, str(threads)],
            env={**os.environ, "PYTHONPATH": str(root), "OPENBLAS_NUM_THREADS": "1"},
            preexec_fn=lambda: os.sched_setaffinity(0, some),
            capture_output=True,
            text=True,
        )
        assert told.returncode == 0, told.stderr
        return eval(told.stdout)

    assert {(some[0],), (some[1],)} <= set(run(2))
    assert set(run(1)) == set(run(3)) == {tuple(some)}  # fewer or more threads than processors
