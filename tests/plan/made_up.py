"""A machine with round numbers, so that what a plan says can be checked by hand."""

from lowbit.plan.machine import MeasuredMachine
from lowbit.plan.profile import Profile

SECONDS = {
    "step": 2e-5, "barrier": 2e-6, "block": 5e-9, "hidden": 2e-10, "inner": 5e-10, "heads": 3e-10,
    "token": 1e-5, "vocabulary": 2e-10,
    "decode_key16": 4e-11, "decode_query16": 2e-11, "prompt_query16": 1e-11,
    "decode_key8": 2e-11, "decode_query8": 1e-11, "prompt_query8": 4e-12,
    "decode_key4": 4e-11, "decode_query4": 2e-11, "prompt_query4": 1e-11, "write4": 1e-9,
    "decode_key2": 4e-11, "decode_query2": 2e-11, "prompt_query2": 1e-11, "write2": 1e-9,
}  # fmt: skip


def rates():
    """Bits decide one token (20 GB/s), arithmetic many (200 G multiply-adds/s)."""
    grid = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 48.0, 64.0, 96.0]
    stored = {
        "int2-g32": 2.5,
        "int3-g32": 3.5,
        "int4-g32": 4.5,
        "int6-g32": 6.5,
        "int8-g32": 8.5,
        "bf16": 16.0,
    }
    found = {}
    for name, bits in stored.items():
        found[name, 8] = (grid, [max(bits / 8 / 20e9, t / 200e9) for t in grid])
        if name in ("int4-g32", "int6-g32"):
            found[name, 16] = (grid, [max(bits / 8 / 20e9, 2 * t / 200e9) for t in grid])
    return found


def profile(seconds=None, rates=None, threads=2, residuals=None):
    spread = [0.01 * i - 0.1 for i in range(21)]
    return Profile(
        identity={"cpu": "made up", "isa": "none", "threads": threads},
        bandwidth_bytes_per_second=20e9,
        int8_multiply_adds_per_second=200e9,
        float_multiply_adds_per_second=50e9,
        memory_bytes=16 * 10**9,
        runtime_bytes=80 * 10**6,
        seconds=SECONDS if seconds is None else seconds,
        rates=globals()["rates"]() if rates is None else rates,
        residuals={"decode": spread, "prompt": spread, "format": spread, "memory": spread}
        if residuals is None
        else residuals,
        crossovers={"gemv": 4, "few": 8},
        measured_at="2026-01-01T00:00:00Z",
        seconds_taken=40.0,
        lowbit="0",
    )


def machine(threads=2, **more):
    return MeasuredMachine(profile(threads=threads, **more))
