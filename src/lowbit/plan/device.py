"""A step on a published device: the roofline of each operation, without measurement.

    t(operation) = max(F / (eta_c peak), B / (eta_m bandwidth)) + dequantisation + launch
    all-reduce of M bytes over N devices: start + 2 (N - 1) (latency + M / (N link))

`peak` is that of the type the operation computes in: weights of few bits meet 16-bit activations at the
16-bit rate, unless the device and the scheme have int8 or fp8 for both. The etas are what good software
reaches; they were set once on TensorRT-LLM's published LLaMA-7B figures (docs/planning.md shows which) and
hold for every device of a kind. No interval is given: a specification says nothing about its own error.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from lowbit.errors import RequestError
from lowbit.formats import Format
from lowbit.plan.cost import StepCost
from lowbit.plan.devices import DEVICES, Device
from lowbit.plan.machine import Part
from lowbit.plan.memory import plain_kv_bytes, stored_bytes
from lowbit.plan.network import Matrix, Network
from lowbit.plan.work import Runs, distinct_experts, tensor_name

# Share of the peak by type, share of the bandwidth, seconds to start an operation.
COMPUTE = {"fp16": 0.70, "bf16": 0.70, "fp8": 0.45, "int8": 0.45, "int4": 0.45, "fp32": 0.70}
BANDWIDTH, LAUNCH_SECONDS = 0.80, 5e-6
ATTENTION_COMPUTE = 0.45  # of the 16-bit peak
ALLREDUCE_START, LINK_LATENCY, LINK_SHARE = 8e-6, 2e-6, 0.8
UNPACK_OPERATIONS = 2.0  # fp32 operations for a weight that is unpacked
OPERATIONS = 8  # started in a layer: two norms, qkv, rotation, attention, o, gate and up, activation and down


@dataclass(frozen=True)
class SpecifiedMachine:
    """A device of the table, or several alike."""

    device: Device
    source: str = "specification"

    @property
    def name(self) -> str:
        return self.device.name

    @property
    def memory_bytes(self) -> float:
        return self.device.memory

    def step(self, cost: StepCost, runs: Runs) -> Part:
        """Seconds of a step, by what they are spent on."""
        n, device, share = cost.network, self.device, cost.devices
        tokens = runs.tokens
        wanted = sum(w for _, _, w in runs.prompts) + len(runs.contexts)
        products = sum(
            self.product(matrix, fmt, tokens, cost.scheme.activations, share) * count
            for (layer, formats), count in cost.work.layers.items()
            for matrix, fmt in zip(layer.matrices, formats)
        )
        head = Matrix("head", n.vocab, n.hidden, "head")
        products += self.product(head, cost.work.head, max(wanted, 1), cost.scheme.activations, share)
        attention = self._attention(n, runs, cost.kv_bits, share)
        other = n.n_layers * OPERATIONS * LAUNCH_SECONDS
        if share > 1:
            if device.link is None:
                raise RequestError(
                    f"plan: {device.name} has no published link to others; plan it for 1 device"
                )
            size = tokens * n.hidden * 2
            other += 2 * n.n_layers * allreduce_seconds(size, share, device.link * LINK_SHARE)
        if cost.pipeline > 1 and device.link:
            other += (cost.pipeline - 1) * (LINK_LATENCY + tokens * n.hidden * 2 / (device.link * LINK_SHARE))
        return Part(products, attention, other)

    def product(self, matrix: Matrix, fmt: Format, tokens: float, activations: str, share: int) -> float:
        """Seconds of a matrix in a step with so many tokens, on `share` devices together."""
        kind = self.compute_type(fmt, activations)
        operations = 2.0 * tokens * matrix.weights * (matrix.active if matrix.experts else 1)
        read = stored_bytes(fmt, matrix.out_features, matrix.in_features)
        touched = distinct_experts(matrix.experts, matrix.active, tokens) if matrix.experts else 1.0
        arithmetic = operations / (COMPUTE[kind] * self.device.peaks[kind])
        memory = touched * read / (BANDWIDTH * self.device.bandwidth)
        unpack = 0.0
        if fmt.bits < 16 and kind in ("fp16", "bf16", "fp32") and "fp32" in self.device.peaks:
            unpack = touched * matrix.weights * UNPACK_OPERATIONS / self.device.peaks["fp32"]
        return (max(arithmetic, memory) + unpack) / share

    def _attention(self, n: Network, runs: Runs, kv_bits: int, share: int) -> float:
        """Prompts: 2 H d S^2 operations of a causal half; tokens: 4 H d context, and keys and values read
        once.
        """
        peak = (
            self.device.peaks.get("bf16") or self.device.peaks.get("fp16") or min(self.device.peaks.values())
        )
        width = n.latent * 2 if n.latent else n.head_dim + n.value_dim
        per_token = plain_kv_bytes(n, kv_bits) / n.n_layers
        operations = read = 0.0
        for queries, before, _ in (*runs.prompts, *((1, context, True) for context in runs.contexts)):
            for layer in n.layers:
                end = before + queries
                seen = min(end, layer.window) if layer.window else end
                keys = queries * before + queries * (queries + 1) / 2
                if layer.window:
                    keys = min(keys, float(queries * layer.window))
                operations += 2 * n.heads * width * keys
                read += seen * per_token
        arithmetic = operations / (ATTENTION_COMPUTE * peak)
        return max(arithmetic, read / (BANDWIDTH * self.device.bandwidth)) / share

    def compute_type(self, fmt: Format, activations: str) -> str:
        """The type that a product of these weights is computed in."""
        peaks = self.device.peaks
        floats = "bf16" if fmt.float_type == "bf16" and "bf16" in peaks else "fp16"
        if fmt.name.startswith(("e4m3", "e5m2", "mxfp8")) and "fp8" in peaks:
            return "fp8"
        even = fmt.name.startswith("int8")
        if activations == "int8" and even and "int8" in peaks:
            return "int8"
        if floats in peaks:
            return floats
        return next(kind for kind in ("bf16", "fp16", "int8", "fp32") if kind in peaks)


def allreduce_seconds(size: float, devices: int, link: float) -> float:
    """Ring: start + 2 (N - 1) (latency + M / (N link))."""
    return ALLREDUCE_START + 2 * (devices - 1) * (LINK_LATENCY + size / (devices * link))


def device_named(name: str) -> Device:
    """Raises RequestError that names the known ones for any other."""
    key = name.lower().replace(" ", "-").replace("_", "-")
    aliases = {
        "4090": "rtx4090",
        "rtx-4090": "rtx4090",
        "pi5": "raspberry-pi-5",
        "raspberry-pi5": "raspberry-pi-5",
    }
    key = aliases.get(key, key)
    if key in DEVICES:
        return DEVICES[key]
    close = difflib.get_close_matches(key, DEVICES, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise RequestError(
        f"plan: device {name!r} is not known{hint} Known are {', '.join(DEVICES)}, and `this`, which "
        "is measured "
        "by `lowbit doctor --profile`; a device of your own is a row of lowbit/plan/devices.py"
    )


def needed_devices(total_bytes: float, device: Device) -> int:
    """The least power of two of devices that hold so much, a tenth left free."""
    count = 1
    while total_bytes > 0.9 * device.memory * count and count < 1 << 10:
        count *= 2
    return count


def stored_total(network: Network, cost: StepCost) -> int:
    """Bytes of the layers' weights as they are read in a step with many tokens."""
    return sum(
        matrix.copies
        * stored_bytes(
            cost.scheme.format_for(tensor_name(number, matrix.name)), matrix.out_features, matrix.in_features
        )
        for number, layer in enumerate(network.layers)
        for matrix in layer.matrices
    )
