"""What a page of 4- or 2-bit keys and values stores, and what a query sees: native/kv_pages.h in NumPy."""

import numpy as np

PAGE = 64
SCALE_BIAS = 17
TRIED = {(4, False): 1, (4, True): 1, (2, False): 4, (2, True): 5}  # scales, by bits and whether of values


def scale_byte(x: np.ndarray) -> np.ndarray:
    """float32 >= 0 -> byte of the smallest scale that is at least x."""
    pattern = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.int64)
    return np.clip(((pattern + 0xFFFFF) >> 20) - (127 - SCALE_BIAS) * 8, 0, 254).astype(np.uint8)


def scale_of(byte: np.ndarray) -> np.ndarray:
    """Byte -> (1 + m / 8) * 2^(e - 17), float32, for e * 8 + m."""
    exponent, mantissa = np.divmod(np.asarray(byte, np.int64), 8)
    return np.ldexp(1 + mantissa / 8, exponent - SCALE_BIAS).astype(np.float32)


def round_groups(x: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """float32 numbers as codes, a scale (and a least value) for each line along the last axis.

    Of the smallest scale that reaches all of a line and a few smaller ones, the one with the least squared
    error is taken, the larger one on ties.
    """
    top = np.float32(2**bits - 1)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    middle = np.float32(0.5) * (low + high)
    reach = np.maximum(np.abs(low), np.abs(high)) if symmetric else high - low
    largest = scale_byte(reach / top).astype(np.int64)
    best, best_error = np.zeros_like(x), np.full_like(low, np.inf)
    for tried in range(TRIED[bits, symmetric]):
        scale = scale_of(np.maximum(largest - tried, 0))
        if symmetric:
            codes = np.clip(np.rint(x * (np.float32(0.5) / scale) + np.float32(0.5) * top), 0, top)
            rounded = scale * (2 * codes - top)
        else:
            least = (middle - scale * (np.float32(0.5) * top)).astype(np.float16).astype(np.float32)
            codes = np.clip(np.rint((x - least) * (np.float32(1) / scale)), 0, top)
            rounded = scale * codes + least
        error = ((x - rounded) ** 2).sum(-1, keepdims=True)
        best = np.where(error < best_error, rounded, best)
        best_error = np.minimum(error, best_error)
    return best


def as_codes(keys: np.ndarray, values: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """keys and values [n, heads, dim] rounded to float16, complete pages read as codes; float64.

    Keys share a scale and a least value per channel of a page, values a scale per token. The first key stays
    as it is, and its page is rounded as if the second stood in its place.
    """
    keys, values = keys.astype(np.float16).astype(np.float32), values.astype(np.float16).astype(np.float32)
    whole = len(keys) // PAGE * PAGE
    if whole:
        first = keys[0].copy()
        keys[0] = keys[1]
        pages = np.moveaxis(keys[:whole].reshape(-1, PAGE, *keys.shape[1:]), 1, -1)
        keys[:whole] = np.moveaxis(round_groups(pages, bits, False), -1, 1).reshape(whole, *keys.shape[1:])
        keys[0] = first
        # The zeros that pad a token to a multiple of 16 channels count in its error.
        padded = np.pad(values[:whole], ((0, 0), (0, 0), (0, -values.shape[2] % 16)))
        values[:whole] = round_groups(padded, bits, True)[..., : values.shape[2]]
    return keys.astype(np.float64), values.astype(np.float64)
