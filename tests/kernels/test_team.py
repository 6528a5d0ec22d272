"""Threads: their number, fork, and the instruction set chosen at start."""

import os
import subprocess
import sys

import numpy as np
import pytest

from lowbit import _native
from lowbit.formats import parse_format
from lowbit.kernels import matmul
from lowbit.quantize import round_to_nearest

SHOW = "from lowbit import _native; print(_native.isa(), _native.threads())"


def start(code, **variables):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True
    )


def test_threads_follow_affinity_and_the_environment():
    assert 1 <= _native.default_threads() <= len(os.sched_getaffinity(0))
    assert start(SHOW, LOWBIT_THREADS="3").stdout.split()[1] == "3"
    one = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); {SHOW}"
    assert start(one, LOWBIT_THREADS="").stdout.split()[1] == "1"


def test_instruction_set_is_chosen_by_name():
    for isa in _native.supported_isas():
        assert start(SHOW, LOWBIT_ISA=isa).stdout.split()[0] == isa
    wrong = start(SHOW, LOWBIT_ISA="sse9")
    assert wrong.returncode != 0
    assert "sse9" in wrong.stderr and "scalar" in wrong.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_products_work_after_fork(rng):
    matrix = round_to_nearest(rng.normal(size=(64, 64)).astype(np.float32), parse_format("int4-g32"))
    x = rng.normal(size=(3, 64)).astype(np.float32)
    expected = matmul(x, matrix)  # starts the threads, which the child does not inherit
    child = os.fork()
    if child == 0:
        os._exit(0 if (matmul(x, matrix) == expected).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_idle_threads_sleep():
    code = (
        "import time; from lowbit import _native; _native.set_threads(4); time.sleep(.2)\n"
        "begin = time.process_time(); time.sleep(.5); print(time.process_time() - begin)"
    )
    assert float(start(code).stdout) < 0.1
