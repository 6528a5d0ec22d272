"""From joules to carbon, water and money: what a million tokens cost at a site.

    kWh of the machines       = joules / 3.6e6
    kWh of the building       = kWh of the machines * PUE
    grams of CO2              = kWh of the building * carbon intensity + embodied grams of the machine's hours
    litres of water           = kWh of the machines * (on-site WUE + PUE * off-site WUE)
    money                     = machine hours * price per hour + kWh of the building * tariff

Off-site water is what power plants evaporate per kWh that they deliver. Every factor is an input; where
none is given, a mean of the world (473 g and 3.908 L per kWh) stands in, and `source` says so.
Sources of the terms: ISO/IEC 30134-2 (PUE) and 30134-9 (WUE).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from lowbit.errors import RequestError

JOULES_PER_KWH = 3.6e6
SECONDS_PER_HOUR = 3600.0
HOURS_PER_YEAR = 8766.0
WORLD_GRAMS_PER_KWH = 473.0
WORLD_LITRES_PER_KWH = 3.908


@dataclass(frozen=True)
class Site:
    """Where the machine stands. Defaults: a machine at home on the world's mean electricity, without price.

    pue: energy of the building over that of its machines, at least 1
    carbon_intensity: grams of CO2 equivalents per kWh
    water_on_site: litres that cooling evaporates per kWh of the machines
    water_off_site: litres that power plants evaporate per kWh that they deliver
    tariff: money per kWh; machine_price: money per hour of the machine; None: not counted
    """

    pue: float = 1.0
    carbon_intensity: float = WORLD_GRAMS_PER_KWH
    water_on_site: float = 0.0
    water_off_site: float = WORLD_LITRES_PER_KWH
    tariff: float | None = None
    machine_price: float | None = None
    currency: str = "USD"
    source: str = "world mean, no cooling"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) or value is None:
                continue
            least = 1.0 if field.name == "pue" else 0.0
            if not math.isfinite(value) or value < least:
                raise RequestError(f"site: {field.name}={value}; it must be a number of at least {least:g}")


@dataclass(frozen=True)
class Embodied:
    """What making the machine emitted, spread evenly over its life."""

    grams: float
    years: float = 3.0

    @property
    def grams_per_hour(self) -> float:
        return self.grams / (self.years * HOURS_PER_YEAR)


@dataclass(frozen=True)
class Footprint:
    """Of one million tokens; money is None where neither a tariff nor a price is known."""

    kwh: float  # of the machines
    grams_co2: float
    litres_water: float
    money: float | None
    currency: str
    source: str


def per_million_tokens(
    joules_per_token: float,
    seconds_per_token: float,
    site: Site | None = None,
    embodied: Embodied | None = None,
) -> Footprint:
    """The footprint of a million tokens.

    joules_per_token: of the machine, at its plug. seconds_per_token: machine time, 1 / (tokens per second
    of all users); it pays the machine's price and wears off what making it emitted.
    """
    site = site or Site()
    for name, value in (("joules_per_token", joules_per_token), ("seconds_per_token", seconds_per_token)):
        if not math.isfinite(value) or value < 0:
            raise RequestError(f"footprint: {name}={value}; it must be a finite number of at least 0")
    kwh = joules_per_token * 1e6 / JOULES_PER_KWH
    hours = seconds_per_token * 1e6 / SECONDS_PER_HOUR
    money = None
    if site.tariff is not None or site.machine_price is not None:
        money = kwh * site.pue * (site.tariff or 0.0) + hours * (site.machine_price or 0.0)
    grams = kwh * site.pue * site.carbon_intensity + (embodied.grams_per_hour * hours if embodied else 0.0)
    water = kwh * (site.water_on_site + site.pue * site.water_off_site)
    return Footprint(kwh, grams, water, money, site.currency, site.source)
