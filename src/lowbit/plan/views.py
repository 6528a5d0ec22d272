"""Views of the cost model that explain rather than choose. docs/planning.md has the formulas.

kinetics    what answers of growing length cost: weights are shared by the batch and read once, keys and
    values are
            not, so long answers pay for attention (Kinetics, arXiv:2506.05333)
context     what a longer context does to four things: users that fit, reading a prompt, a token, and
    switching to
            another user's context (arXiv:2405.08944)
idealized   a prompt of p and an answer of o tokens take prompt(p) + beta o on dedicated hardware with an
engine
            that wastes nothing (arXiv:2305.02440): how near the machine at hand comes
"""

from __future__ import annotations

from typing import Any

from lowbit.plan.cost import StepCost
from lowbit.plan.device import SpecifiedMachine
from lowbit.plan.machine import MeasuredMachine
from lowbit.plan.memory import kv_bytes, plain_kv_bytes, weight_bytes
from lowbit.plan.network import Network
from lowbit.plan.work import Runs

ANSWERS = (256, 1024, 4096, 16384, 32768)
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
PCIE_BYTES_PER_SECOND = 25e9  # to host memory and back, for switching on an accelerator


def attention_share(cost: StepCost, context: int, users: int) -> float:
    part = cost.part(Runs((), (context,) * users))
    return part.attention / part.total


def kinetics(cost: StepCost, prompt: int, users: int) -> list[dict[str, Any]]:
    """For each length of answers: seconds, and how much of it attention's reads are.

    equivalent_flops: Kinetics' eFLOPs of one answer: operations plus bytes times the machine's operations per
        byte.
    """
    rows = []
    network = cost.network
    for answer in lengths(ANSWERS, network, prompt):
        mean = cost.answer_seconds(prompt, answer, users)
        context = prompt + answer / 2
        linear = 2.0 * (network.active_weights() + network.vocab * network.hidden) * answer
        attention = 4.0 * network.heads * network.head_dim * sum_seen(network, prompt, answer)
        read = stored_kv_bytes(cost, 1) * context * answer
        rows.append(
            {
                "answer_tokens": answer,
                "seconds": cost.prompt_seconds(prompt) + answer * mean,
                "seconds_per_token": mean,
                "attention_share": attention_share(cost, round(context), users),
                "operations": linear + attention,
                "kv_bytes_read": read,
                "equivalent_operations": linear + attention + read * intensity(cost),
            }
        )
    return rows


def sum_seen(network: Network, prompt: int, answer: int) -> float:
    """Keys that all tokens of an answer visit, summed over layers."""
    return sum(network.seen(prompt + i) for i in (0, answer // 2, answer)) / 3 * answer


def intensity(cost: StepCost) -> float:
    """Operations that the machine does in the time of reading a byte."""
    machine = cost.machine
    if isinstance(machine, SpecifiedMachine):
        peaks = machine.device.peaks
        return max(peaks.get("bf16", 0.0), peaks.get("fp16", 0.0)) / machine.device.bandwidth
    assert isinstance(machine, MeasuredMachine)
    return 2 * machine.profile.int8_multiply_adds_per_second / machine.profile.bandwidth_bytes_per_second


def stored_kv_bytes(cost: StepCost, tokens: int) -> float:
    if isinstance(cost.machine, SpecifiedMachine):
        return plain_kv_bytes(cost.network, cost.kv_bits) * tokens
    return kv_bytes(cost.network, cost.kv_bits, 1 << 16) / (1 << 16) * tokens


def lengths(wanted: tuple[int, ...], network: Network, before: int = 0) -> list[int]:
    return [n for n in wanted if n + before <= network.max_context] or [max(1, network.max_context - before)]


def long_context(cost: StepCost, memory_bytes: float) -> list[dict[str, Any]]:
    """For each context: concurrency, prefill, decode, switching."""
    network = cost.network
    weights = weight_bytes(network, cost.scheme) / cost.devices
    rows = []
    for context in lengths(CONTEXTS, network):
        each = stored_kv_bytes(cost, context) / cost.devices
        free = 0.9 * memory_bytes - weights
        users = max(0, int(free // each))
        machine = cost.machine
        speed = PCIE_BYTES_PER_SECOND
        if isinstance(machine, MeasuredMachine):
            speed = machine.profile.bandwidth_bytes_per_second / 2
        rows.append(
            {
                "context": context,
                "users": users,
                "kv_bytes": each,
                "prefill_seconds": cost.prompt_seconds(context),
                "token_seconds": cost.token_seconds(context),
                "token_seconds_all_users": cost.token_seconds(context, users) if users else None,
                "switch_seconds": 2 * each / speed,
            }
        )
    return rows


def idealized(cost: StepCost, prompt: int, answer: int) -> dict[str, Any]:
    """prompt(p) + beta o against what is predicted, for one user alone.

    ideal: every byte once at the whole bandwidth, every operation at the peak, nothing else.
    """
    network = cost.network
    machine = cost.machine
    if isinstance(machine, SpecifiedMachine):
        bandwidth = machine.device.bandwidth * cost.devices
        peak = max(machine.device.peaks.values()) * cost.devices
    else:
        assert isinstance(machine, MeasuredMachine)
        bandwidth = machine.profile.bandwidth_bytes_per_second
        peak = 2 * machine.profile.int8_multiply_adds_per_second
    weights = network.active_weights() + network.vocab * network.hidden
    share = weights / max(1, network.matrix_weights + network.embedding_weights)
    read = weight_bytes(network, cost.scheme) * min(1.0, share)
    attention = 4.0 * network.heads * network.head_dim * network.seen(prompt) * prompt / 2
    ideal_prompt = max(read / bandwidth, (2.0 * network.active_weights() * prompt + attention) / peak)
    ideal_token = (read + stored_kv_bytes(cost, prompt + answer // 2)) / bandwidth
    predicted_prompt = cost.prompt_seconds(prompt)
    predicted_token = cost.answer_seconds(prompt, answer)
    return {
        "prompt_tokens": prompt,
        "answer_tokens": answer,
        "ideal_prompt_seconds": ideal_prompt,
        "ideal_token_seconds": ideal_token,
        "ideal_seconds": ideal_prompt + answer * ideal_token,
        "prompt_seconds": predicted_prompt,
        "token_seconds": predicted_token,
        "seconds": predicted_prompt + answer * predicted_token,
        "of_ideal": (ideal_prompt + answer * ideal_token) / (predicted_prompt + answer * predicted_token),
    }
