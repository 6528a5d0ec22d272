"""What the tests of kernels share."""

import json
import os
import subprocess
import sys

import pytest

from lowbit import _native


@pytest.fixture
def same_on_every_isa():
    """A check that a file, run as a script on each other instruction set, prints these digests as JSON."""

    def check(path, expected):
        for isa in _native.supported_isas():
            if isa == _native.isa():
                continue
            done = subprocess.run(
                [sys.executable, str(path)],
                env={**os.environ, "LOWBIT_ISA": isa},
                capture_output=True,
                text=True,
                check=True,
            )
            found = json.loads(done.stdout)
            assert found.pop("isa") == isa
            assert [name for name in expected if found[name] != expected[name]] == [], isa

    return check
