"""The kernels compile for Ampere and Hopper, with tensor cores, on a machine that has no card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")
FORMATS = ("int4-g64", "ternary", "int3-g16-m4", "bitmod4-g128", "nvfp4", "mxfp4", "int7-g64", "bf16")


pytest.importorskip("triton", reason="needs Triton: pip install triton")


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma.sync"), (90, "wgmma")])
def test_kernels_compile(capability, instruction, tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability), *FORMATS],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for name in ("codes_product", "floats_product", "segments_product"):
        assert set(found[name]) == {instruction}, name
    assert {"reduce", "entries_product", "codes_rows", "paged_attention", "store_pages"} <= {*found}
