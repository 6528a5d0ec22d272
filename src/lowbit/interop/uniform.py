"""One shape for all layers, where a format has only one: bits and groups that hold as many as possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lowbit.errors import RequestError
from lowbit.formats import parse_format
from lowbit.interop.coded import Shape, shape_of
from lowbit.interop.module import Seen, default_format


def uniform(target: str, layers: Mapping[str, Seen], format: str | None, bits: Sequence[int]) -> Shape:
    """The shape that the user asked for, or one that holds every stored layer, or else the usual one.

    bits: those that the target has.
    """
    if format is not None:
        parsed = parse_format(format)
        wanted = Shape(parsed.bits, parsed.group_size, not parsed.zero_point, True)
        if wanted.bits not in bits or parsed.name not in (wanted.name, *_aliases(wanted)):
            raise RequestError(
                f"export: {target}:{format} is not written; choose "
                f"{', '.join(f'int{n}' for n in bits)} with -g or -row, with or without an a for zero-points"
            )
        return wanted
    stored = [shape_of(matrix) for layer in layers.values() for matrix in layer.matrices]
    known = [shape for shape in stored if shape is not None and shape.bits <= max(bits)]
    if not known:
        parsed = parse_format(default_format(layers))
        return Shape(parsed.bits, parsed.group_size, True, True)
    most = max(shape.bits for shape in known)
    groups = [shape.group for shape in known]
    smallest = min((group for group in groups if group), default=0)
    return Shape(min(n for n in bits if n >= most), smallest, all(shape.symmetric for shape in known), True)


def _aliases(shape: Shape) -> tuple[str, ...]:
    return (shape.name.removesuffix("-g64"),)
