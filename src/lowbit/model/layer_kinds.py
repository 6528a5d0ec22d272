"""What differs from layer to layer: which are rotated, and which see a window."""

from __future__ import annotations

import reprlib

from lowbit.errors import UnsupportedError
from lowbit.model.family import Family
from lowbit.model.fields import Fields

MAX_LAYERS = 1 << 12
MAX_POSITIONS = 1 << 28


def read_rope_layers(fields: Fields, family: Family, n_layers: int) -> tuple[bool, ...]:
    """no_rope_layers holds 1 where a layer IS rotated; absent, every no_rope_layer_interval-th is not."""
    if family.positions == "learned":
        return (False,) * n_layers
    if family.rope_layers == "all":
        return (True,) * n_layers
    interval = fields.integer("no_rope_layer_interval", 1, MAX_LAYERS)
    flags = fields.items("no_rope_layers", int, MAX_LAYERS)
    if flags is None:
        return tuple((layer + 1) % interval != 0 for layer in range(n_layers))
    if len(flags) < n_layers or any(flag not in (0, 1) for flag in flags):
        raise fields.fail("no_rope_layers", flags, f"at least {n_layers} values of 0 or 1")
    return tuple(flag == 1 for flag in flags[:n_layers])


def read_windows(
    fields: Fields, family: Family, n_layers: int, rope_layers: tuple[bool, ...]
) -> tuple[int, ...]:
    """The sliding window of each layer, 0 where it sees everything."""
    kinds = _layer_types(fields, n_layers)
    window = 0
    if family.window == "pattern":
        window = fields.integer("sliding_window", 1, MAX_POSITIONS)
        pattern = fields.integer("sliding_window_pattern", 1, MAX_LAYERS)
        if kinds is None:
            return tuple(window if (layer + 1) % pattern else 0 for layer in range(n_layers))
    elif family.window != "none":
        enabled = family.window == "all" or fields.boolean("use_sliding_window")
        given = fields.raw("sliding_window")
        window = fields.integer("sliding_window", 1, MAX_POSITIONS) if enabled and given is not None else 0

    if family.window in ("all", "switch"):
        windows = (window,) * n_layers
        if (
            kinds is not None
            and kinds != (["sliding_attention"] if window else ["full_attention"]) * n_layers
        ):
            raise UnsupportedError(
                f"{fields.where}: family {family.name} has one window for all layers, but layer_types names "
                "several or another"
            )
        return windows
    if kinds is not None:
        if "sliding_attention" in kinds and not window:
            raise fields.fail(
                "layer_types", "sliding_attention", "used with a sliding_window that is enabled"
            )
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    if not window:
        return (0,) * n_layers
    if family.window == "no_rope":
        return tuple(0 if rotated else window for rotated in rope_layers)
    first = fields.integer("max_window_layers", 0, MAX_LAYERS)
    return tuple(window if layer >= first else 0 for layer in range(n_layers))


def _layer_types(fields: Fields, n_layers: int) -> list[str] | None:
    kinds = fields.items("layer_types", str, MAX_LAYERS)
    for kind in kinds or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(
                f"{fields.where}: layer_types holds {reprlib.repr(kind)}; lowbit runs full_attention and "
                "sliding_attention"
            )
    if kinds is not None and len(kinds) != n_layers:
        raise fields.fail("layer_types", kinds, f"one entry for each of {n_layers} layers")
    return kinds
