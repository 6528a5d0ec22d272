"""Carbon intensity of a country's electricity, from CodeCarbon's tables where that package is installed."""

from __future__ import annotations

from dataclasses import replace

from lowbit.errors import RequestError, UnsupportedError
from lowbit.plan.footprint import Site


def country_site(code: str, site: Site) -> Site:
    """`site` with the carbon intensity of a country, by its three letters (ISO 3166-1 alpha-3)."""
    try:
        from codecarbon.input import DataSource
    except ImportError as error:
        raise UnsupportedError(
            "energy: factors of countries come from CodeCarbon, which is not installed; "
            "pip install 'lowbit[energy]', or give --carbon-intensity"
        ) from error
    table = DataSource().get_global_energy_mix_data()
    row = table.get(code.upper())
    if row is None:
        known = ", ".join(sorted(table)[:5])
        raise RequestError(f"energy: country {code!r} is not in CodeCarbon's table; it has {known}, ...")
    source = f"CodeCarbon, {row['country_name']} {row['year']}"
    return replace(site, carbon_intensity=float(row["carbon_intensity"]), source=source)
