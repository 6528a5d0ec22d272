"""What a number is: formats, their levels, rounding to them, and schemes that assign them to tensors."""

from lowbit.formats.catalogue import DESCRIPTIONS, FORMATS
from lowbit.formats.emulate import emulate
from lowbit.formats.format import Format
from lowbit.formats.parse import parse_format
from lowbit.formats.scheme import Scheme

__all__ = ["DESCRIPTIONS", "FORMATS", "Format", "Scheme", "emulate", "parse_format"]
