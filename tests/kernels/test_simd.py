"""The vector operations of every instruction set against the scalar set, bit for bit.

The self-test in native/tests is plain C++: it is built here for this machine, and for AArch64 when a cross
compiler and an emulator are installed. Set LOWBIT_TEST_PRODUCTS=1 to compare whole matrix products too, which
takes minutes to compile; build/selftest-* keeps what was built.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
X86 = {"scalar", "avx2", "avxvnni", "avx512"}
AARCH64 = {"scalar", "neon", "neondot"}
CROSS_PACKAGES = "g++-aarch64-linux-gnu and qemu-user"


def build(target: str, machine: str, folder: Path) -> Path:
    """Build an executable of native/tests and return its path; skip where the tools are missing."""
    compiler = "aarch64-linux-gnu-g++" if machine == "aarch64" else "c++"
    if not shutil.which("cmake") or not (shutil.which(compiler) or os.environ.get("CXX")):
        pytest.skip("needs cmake and a C++ compiler (Debian: cmake and g++)")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    toolchain = [f"-DCMAKE_TOOLCHAIN_FILE={ROOT / 'cmake' / 'aarch64-toolchain.cmake'}"]
    configure = ["cmake", "-S", str(ROOT / "native" / "tests"), "-B", str(folder), *generator]
    run([*configure, *(toolchain if machine == "aarch64" else []), "-DLOWBIT_SELFTEST_LEVEL=-O1"])
    run(["cmake", "--build", str(folder), "--target", target])
    return folder / target


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, f"{command} returned {done.returncode}:\n{done.stdout}{done.stderr}"
    return done


def emulator(machine: str) -> list[str]:
    """The command in front of an executable of `machine`; skip where it cannot run here."""
    if machine == "native":
        return []
    if not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64"):
        pytest.skip(f"needs a cross compiler and an emulator for AArch64 (Debian: {CROSS_PACKAGES})")
    return ["qemu-aarch64"]


@pytest.fixture(scope="module", params=["native", "aarch64"])
def selftest(request, tmp_path_factory) -> tuple[str, list[str]]:
    """(machine, command) of the built self-test of operations."""
    machine = request.param
    command = emulator(machine)
    return machine, [*command, str(build("isa_selftest", machine, tmp_path_factory.mktemp(machine)))]


def sets_that_passed(output: str) -> set[str]:
    return {line.split(":")[0] for line in output.splitlines() if "equal scalar" in line}


def test_operations_equal_the_scalar_set(selftest):
    machine, command = selftest
    found = sets_that_passed(run(command).stdout)
    if machine == "aarch64":  # the emulated CPU has every extension
        assert found == AARCH64
    else:
        assert "scalar" in found and (found <= X86 or found <= AARCH64)
        native = pytest.importorskip("lowbit._native", reason="the native module is not built")
        assert found == set(native.supported_isas())


@pytest.mark.parametrize("operation", ["dot4", "store_fp16", "reduce_max", "load_n", "lookup256"])
def test_a_flipped_bit_is_found(selftest, operation):
    machine, command = selftest
    if machine == "aarch64" and operation != "dot4":
        pytest.skip("one operation is enough under emulation")
    done = subprocess.run([*command, "--spoil", operation], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{operation} differs from scalar" in done.stdout
    assert "equal scalar" not in done.stdout


def test_an_unknown_argument_is_refused(selftest):
    _, command = selftest
    assert subprocess.run([*command, "--help"], capture_output=True).returncode == 2


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("LOWBIT_TEST_PRODUCTS") != "1",
    reason="compiles every matrix kernel, some minutes; set LOWBIT_TEST_PRODUCTS=1",
)
@pytest.mark.parametrize("machine", ["native", "aarch64"])
def test_products_are_equal_on_every_instruction_set(machine):
    command = emulator(machine)
    command = [*command, str(build("matmul_selftest", machine, ROOT / "build" / f"selftest-{machine}"))]
    isas = run([*command, "--isas"]).stdout.split()
    sums = {isa: run(command, LOWBIT_ISA=isa).stdout for isa in isas}
    assert len(isas) > 1 and sums["scalar"].count("\n") > 300
    for isa in isas:
        differing = [
            (a, b) for a, b in zip(sums["scalar"].splitlines(), sums[isa].splitlines(), strict=True) if a != b
        ]
        assert not differing, f"{isa} differs from scalar: {differing[:3]}"
