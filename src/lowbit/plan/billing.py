"""Joules of a token from a machine's power, and what a million tokens cost at a site (footprint.py).

A published device draws its typical power while tokens are generated and its most while prompts are read;
where only the most is published that stands for both, and `source` calls it an estimate. A machine that shows
no counter
and of which nothing is given has no joules: None, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lowbit.plan.devices import Device
from lowbit.plan.footprint import Embodied, Site, per_million_tokens

SERVER_EMBODIED_KG, SERVER_DEVICES = 5700.0, 8  # of a GPU server without its GPUs, shared by so many


@dataclass(frozen=True)
class Bill:
    """Of a generated token, or of a million of them; None: unknown. sources: where each comes from."""

    joules_per_token: float | None
    grams_per_million: float | None
    litres_per_million: float | None
    money_per_million: float | None
    sources: dict[str, str]


@dataclass(frozen=True)
class Watts:
    """While tokens are generated, and while prompts are read."""

    token: float
    prompt: float
    source: str


def watts_of(device: Device | None, given: float | None, known: dict[str, object]) -> Watts | str:
    """What is known of the power of a device or of this machine, else why nothing is."""
    if given is not None:
        return Watts(given, given, "given (--watts)")
    if device is not None:
        if device.typical_watts is not None:
            most = device.most_watts or device.typical_watts
            return Watts(device.typical_watts, most, f"specification: {device.power_source}")
        if device.most_watts is not None:
            return Watts(
                device.most_watts, device.most_watts, "estimated_tdp: the most that the data sheet allows"
            )
        return "unavailable: no power is published"
    busy = known.get("busy_watts")
    if isinstance(busy, (int, float)) and busy > 0:
        return Watts(float(busy), float(busy), str(known.get("source", "profile")))
    return "unavailable: this machine shows no energy counter; give --watts"


def embodied_of(device: Device | None) -> Embodied | None:
    """Of making the device and, of a GPU, its share of a server."""
    if device is None or device.embodied_kg is None:
        return None
    kilograms = device.embodied_kg
    if device.kind == "gpu" and "server" not in device.embodied_source:
        kilograms += SERVER_EMBODIED_KG / SERVER_DEVICES
    return Embodied(1000 * kilograms)


def bill(
    decode_seconds: float,
    prompt_seconds: float,
    answer: int,
    users: int,
    devices: int,
    device: Device | None,
    site: Site,
    watts: Watts | str,
) -> Bill:
    """Of one generated token, its share of the prompt included.

    decode_seconds: of a step that gives `users` streams a token; prompt_seconds: of reading one prompt
    """
    token, prompt = decode_seconds / users, prompt_seconds / answer
    price, price_source = site.machine_price, "given (--machine-price)"
    if price is None and device is not None and device.price_per_hour is not None:
        price, price_source = device.price_per_hour, f"specification: {device.price_source}"
    here = replace(site, machine_price=None if price is None else price * devices)
    names = ("joules_per_token", "grams_co2_per_million_tokens", "litres_water_per_million_tokens")
    if isinstance(watts, str):
        sources = dict.fromkeys(names, watts)
        money = None
        if here.machine_price is not None:
            money = per_million_tokens(0.0, token + prompt, replace(here, tariff=None)).money
        sources["money_per_million_tokens"] = price_source if money is not None else f"no price, and {watts}"
        return Bill(None, None, None, money, sources)
    joules = devices * (watts.token * token + watts.prompt * prompt)
    made = embodied_of(device)
    if made is not None:
        made = Embodied(made.grams * devices, made.years)
    found = per_million_tokens(joules, token + prompt, here, made)
    sources = dict.fromkeys(names, f"{watts.source}; {site.source}")
    if made is not None and device is not None:
        sources[names[1]] += f"; embodied: {device.embodied_source}"
    if found.money is None:
        sources["money_per_million_tokens"] = "no price and no tariff; give --machine-price or --tariff"
    else:
        sources["money_per_million_tokens"] = (
            price_source if price is not None else "electricity at the tariff given"
        )
    return Bill(joules, found.grams_co2, found.litres_water, found.money, sources)
