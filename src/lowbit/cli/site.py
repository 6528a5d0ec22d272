"""Options for energy and for the site that pays for it, shared by the verbs that speak of them."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowbit.measure.energy import EnergyMeter
    from lowbit.plan.footprint import Site

_NUMBERS = {
    "carbon_intensity": ("G", "grams of CO2 per kWh of electricity"),
    "pue": ("X", "energy of the building over that of its machines, 1 or more"),
    "water_on_site": ("L", "litres that cooling evaporates per kWh"),
    "water_off_site": ("L", "litres that power plants evaporate per kWh"),
    "tariff": ("P", "price of a kWh"),
    "machine_price": ("P", "price of an hour of the machine"),
}


def add_site(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the site")
    group.add_argument("--country", metavar="ABC", help="carbon intensity of this country, by CodeCarbon")
    for name, (metavar, text) in _NUMBERS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=float, metavar=metavar, help=text)
    group.add_argument("--currency", metavar="ABC", help="of the prices (default: USD)")


def add_meter(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("energy")
    group.add_argument("--energy", action="store_true", help="measure joules per token as well")
    group.add_argument("--watts", type=float, help="the machine's power under full load, for an estimate")
    group.add_argument("--meter", metavar="FILE", help="a file in which a meter keeps its joules")


def site_of(args: argparse.Namespace) -> Site:
    from lowbit.plan.footprint import Site

    site = Site()
    if args.country:
        from lowbit.measure.site import country_site

        site = country_site(args.country, site)
    names = {field.name for field in fields(Site)}
    given = {name: getattr(args, name) for name in (*_NUMBERS, "currency") if getattr(args, name) is not None}
    assert set(given) <= names
    return replace(site, **given, source="as given") if given and not args.country else replace(site, **given)


def meter_of(args: argparse.Namespace) -> EnergyMeter:
    from lowbit.measure.energy import EnergyMeter

    return EnergyMeter(Path(args.meter) if args.meter else None, None, args.watts)
