"""Published devices: what their makers say, row by row with the source. Nothing here was measured by us.

peaks: dense operations per second (a multiply-add counts two) by type of number; sparse figures are halved.
bandwidth of memory and of the link to the next device (one direction), bytes per second. Power in watts:
idle, typical while tokens are generated, most. Price in US dollars per hour, rented, where one is published;
embodied kilograms of CO2 equivalent of the device. None: not published, and then what needs it stays unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

T, G = 1e12, 1e9


@dataclass(frozen=True)
class Device:
    """One row. efficiency: (of the peak, of the bandwidth) that good software reaches, see device.py."""

    name: str
    kind: str  # "gpu" | "tpu" | "soc" | "cpu" | "npu" | "fpga" | "pim"
    peaks: MappingProxyType[str, float]
    bandwidth: float
    memory: float
    source: str
    idle_watts: float | None = None
    typical_watts: float | None = None
    most_watts: float | None = None
    link: float | None = None
    price_per_hour: float | None = None
    price_source: str = ""
    embodied_kg: float | None = None
    embodied_source: str = ""
    power_source: str = ""
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**fields, "peaks": dict(self.peaks), "flag": "specification"}


def _row(
    name: str, kind: str, peaks: dict[str, float], bandwidth: float, memory: float, source: str, **more: Any
) -> Device:
    return Device(name, kind, MappingProxyType(peaks), bandwidth, memory, source, **more)


_PHASES = "idle, token and prompt phases: POLCA, arXiv:2308.12908, as in the project's planning notes"
_LAMBDA = "Lambda on-demand price list, 2025"

DEVICES: dict[str, Device] = {
    row.name: row
    for row in (
        _row(
            "h200",
            "gpu",
            {"fp16": 989.4 * T, "bf16": 989.4 * T, "fp8": 1978.9 * T, "int8": 1978.9 * T, "fp32": 66.9 * T},
            4.8e12,
            141 * G,
            "NVIDIA H200 Tensor Core GPU data sheet (SXM)",
            most_watts=700.0,
            link=450 * G,
            note="SXM, 141 GB HBM3e",
        ),
        _row(
            "h100",
            "gpu",
            {"fp16": 989.4 * T, "bf16": 989.4 * T, "fp8": 1978.9 * T, "int8": 1978.9 * T, "fp32": 66.9 * T},
            3.35e12,
            80 * G,
            "NVIDIA H100 Tensor Core GPU architecture white paper and data sheet (SXM5)",
            idle_watts=75.0,
            typical_watts=380.0,
            most_watts=700.0,
            power_source=_PHASES,
            link=450 * G,
            price_per_hour=2.99,
            price_source=_LAMBDA,
            embodied_kg=164.0,
            embodied_source="NVIDIA product carbon footprint of HGX H100, 1312 kg over 8",
            note="SXM5, 80 GB HBM3",
        ),
        _row(
            "a100",
            "gpu",
            {"fp16": 312 * T, "bf16": 312 * T, "int8": 624 * T, "fp32": 19.5 * T},
            2.039e12,
            80 * G,
            "NVIDIA A100 Tensor Core GPU data sheet (80 GB SXM)",
            idle_watts=63.0,
            typical_watts=250.0,
            most_watts=400.0,
            power_source=_PHASES,
            link=300 * G,
            price_per_hour=1.79,
            price_source=_LAMBDA,
            embodied_kg=318.0,
            embodied_source=(
                "Chien et al., HotCarbon 2023 (doi:10.1145/3604930.3605705): a GPU and "
                "its share of the server"
            ),
            note="SXM4, 80 GB HBM2e",
        ),
        _row(
            "l40s",
            "gpu",
            {"fp16": 362.05 * T, "bf16": 362.05 * T, "fp8": 733 * T, "int8": 733 * T, "fp32": 91.6 * T},
            864 * G,
            48 * G,
            "NVIDIA L40S data sheet",
            most_watts=350.0,
            link=32 * G,
            note="PCIe 4.0 x16",
        ),
        _row(
            "rtx4090",
            "gpu",
            {
                "fp16": 330.3 * T,
                "bf16": 165.2 * T,
                "fp8": 660.6 * T,
                "int8": 660.6 * T,
                "int4": 1321.2 * T,
                "fp32": 82.6 * T,
            },
            1008 * G,
            24 * G,
            "NVIDIA Ada GPU architecture white paper, appendix A",
            most_watts=450.0,
            link=32 * G,
            note="fp16 with fp16 accumulation",
        ),
        _row(
            "tpu-v5e",
            "tpu",
            {"bf16": 197 * T, "int8": 394 * T},
            819 * G,
            16 * G,
            "Google Cloud documentation, TPU v5e: 197 TFLOPS bf16, 16 GB, 819 GB/s, 400 GB/s between chips",
            link=50 * G,
            price_per_hour=1.20,
            price_source="Google Cloud TPU price list, us-central1, on demand",
            note="400 GB/s over four ports, both directions",
        ),
        _row(
            "m2-ultra",
            "soc",
            {"fp16": 27.2 * T, "fp32": 27.2 * T},
            800 * G,
            192 * G,
            "Apple press release of 5 June 2023 (800 GB/s, 192 GB); 76-core GPU at 1.4 GHz: 27.2 TFLOPS",
            note="GPU; its fp16 has the rate of fp32",
        ),
        _row(
            "m4-max",
            "soc",
            {"fp16": 18.4 * T, "fp32": 18.4 * T},
            546 * G,
            128 * G,
            "Apple press release of 30 October 2024 (546 GB/s, 128 GB); 40-core GPU: 18.4 TFLOPS",
        ),
        _row(
            "raspberry-pi-5",
            "cpu",
            {"int8": 0.614 * T, "fp16": 0.307 * T, "fp32": 0.154 * T},
            17.1 * G,
            8 * G,
            "Raspberry Pi 5 product brief (4 x Cortex-A76, 2.4 GHz, 32-bit LPDDR4X-4267: 17.1 GB/s); "
            "peaks: two "
            "128-bit pipes a core, sdot and fmla",
            idle_watts=3.3,
            typical_watts=9.8,
            most_watts=12.0,
            power_source=(
                "J. Geerling's measurements of the 4 GB board, August 2024 (idle, all "
                "cores); 12 W: product brief"
            ),
        ),
        _row(
            "a17-pro-npu",
            "npu",
            {"int8": 35 * T, "fp16": 17.5 * T},
            51.2 * G,
            8 * G,
            "Apple, iPhone 15 Pro technical specifications (35 TOPS); LPDDR5-6400 of 64 bit: 51.2 GB/s",
            note="fp16 taken as half of int8",
        ),
        _row(
            "snapdragon-x-npu",
            "npu",
            {"int8": 45 * T, "fp16": 22.5 * T},
            135 * G,
            32 * G,
            "Qualcomm Snapdragon X Elite product brief (Hexagon, 45 TOPS; LPDDR5X-8448, 135 GB/s)",
            note="fp16 taken as half of int8",
        ),
        _row(
            "u280-flightllm",
            "fpga",
            {"int8": 24.5 * T, "fp16": 4.9 * T},
            460 * G,
            40 * G,
            "AMD Alveo U280 data sheet DS963 (24.5 TOPS int8, 8 GB HBM2 at 460 GB/s, 32 GB DDR4); "
            "design: FlightLLM, "
            "arXiv:2401.03868",
            most_watts=225.0,
            note="weights beyond 8 GB would come from DDR4 at 38 GB/s, which is not modelled",
        ),
        _row(
            "gddr6-aim",
            "pim",
            {"bf16": 16 * T},
            8.192e12,
            16 * G,
            "SK hynix GDDR6-AiM, Hot Chips 35 (2023): 512 GB/s inside a chip, 1 GHz units, bf16; a "
            "card of 16 chips "
            "of 1 GB with 1 TFLOPS each (ISSCC 2022, paper 11.1)",
            note="inside the banks: for matrix-vector products of decoding; prompts belong on another device",
        ),
    )
}
