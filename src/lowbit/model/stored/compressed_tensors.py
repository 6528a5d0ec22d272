"""compressed-tensors: what vLLM's llm-compressor writes.

    pack-quantized        weight_packed I32 [out, words]: q + 2^(bits - 1), lowest bits first; weight_shape
                          [2]; weight_scale [out, groups]; asymmetric: weight_zero_point I32, packed along the
                          output in the same way. Before 0.18 codes of 3, 5, 6 and 7 bits left the top bits of
                          a word empty; the number of words tells.
    int-quantized         weight I8 [out, in], weight_scale, weight_zero_point
    float-quantized       weight F8_E4M3 [out, in], weight_scale of a tensor, channel, group or block
    nvfp4-pack-quantized  weight_packed U8 [out, in / 2], low nibble first; weight_scale F8_E4M3 [out, in /
                          16]; weight_global_scale, by which scales are divided
    mxfp4-, mxfp6-, mxfp8-   the elements of OCP MX with weight_scale U8, a power of two less 127

weight_g_idx, which versions before 0.20 wrote for act-order, gathers the inputs. Activations that the scheme
rounds (W8A8) are rounded here to int8 per token and group of 64; scales of static activations are not used.
"""

from __future__ import annotations

import numpy as np

from lowbit.errors import UnsupportedError
from lowbit.model.stored.arrays import Arrays
from lowbit.model.stored.bits import dense_words, padded_words, unpack_dense, unpack_padded
from lowbit.model.stored.compressed_config import Config, Scheme, config
from lowbit.model.stored.fp8 import fp8_matrix
from lowbit.model.stored.grouping import grouping
from lowbit.model.stored.packing import E2M1, E2M3, FP8, code_matrix, size_name
from lowbit.packed import PackedMatrix

__all__ = ["MARKS", "Config", "config", "name", "parts", "read", "shape"]

MARKS = ("weight_packed", "weight")
_BESIDE = (
    "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale",
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "output_zero_point",
)  # fmt: skip


def parts(arrays: Arrays, config: Config) -> tuple[str, ...] | None:
    if arrays.has("weight_packed"):
        return ("weight_packed", *_BESIDE)
    stored = arrays.dtype("weight")
    if (stored in FP8 or stored == "I8") and arrays.has("weight_scale"):
        return ("weight", *_BESIDE)
    return None


def shape(arrays: Arrays, config: Config) -> tuple[int, int]:
    part = "weight_packed" if arrays.has("weight_packed") else "weight"
    found = arrays.shape(part)
    if len(found) != 2:
        raise arrays.damaged(f"{part} has shape {list(found)}, not two dimensions")
    if part == "weight":
        return found[0], found[1]
    scheme = _scheme(arrays, config)
    if scheme.floats:
        return found[0], found[1] * 8 // scheme.bits
    return _stored_shape(arrays)


def name(arrays: Arrays, config: Config) -> str:
    scheme = _scheme(arrays, config)
    if scheme.format in (
        "nvfp4-pack-quantized",
        "mxfp4-pack-quantized",
        "mxfp6-pack-quantized",
        "mxfp8-quantized",
    ):
        return scheme.format.split("-")[0]
    if scheme.block:
        unit = f"{scheme.block[0]}x{scheme.block[1]}"
    else:
        unit = (
            "tensor"
            if scheme.strategy == "tensor"
            else "row"
            if scheme.group_size < 0
            else f"g{scheme.group_size}"
        )
    kind = f"{'fp' if scheme.floats else 'int'}{scheme.bits}{'' if scheme.symmetric else 'a'}"
    return f"{kind}-{unit} ({scheme.format})"


def read(arrays: Arrays, config: Config) -> PackedMatrix:
    """The matrix, exactly."""
    scheme = _scheme(arrays, config)
    out_features, in_features = shape(arrays, config)
    arrays.check_size(out_features, in_features)
    if scheme.format == "nvfp4-pack-quantized":
        return _read_nvfp4(arrays, out_features, in_features)
    if scheme.format in ("mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized"):
        return _read_mx(arrays, scheme, out_features, in_features)
    if scheme.floats:
        block = (1, scheme.group_size) if scheme.group_size > 0 else scheme.block
        return fp8_matrix(arrays, "weight_scale", block)
    return _read_integers(arrays, scheme, config.dense, out_features, in_features)


def _read_integers(
    arrays: Arrays, scheme: Scheme, dense: bool | None, out_features: int, in_features: int
) -> PackedMatrix:
    bits, half = scheme.bits, 1 << (scheme.bits - 1)
    size = in_features if scheme.group_size < 0 else scheme.group_size
    if arrays.has("weight_packed"):
        words = arrays.take("weight_packed", ("I32",), (out_features, None))
        dense = _is_dense(arrays, words.shape[1], bits, in_features, dense)
        codes = (unpack_dense if dense else unpack_padded)(words, bits, in_features)
    else:
        codes = _unsigned(arrays, "weight", bits, (out_features, in_features))
    if scheme.block:
        rows, size = scheme.block
        scales = arrays.floats("weight_scale", (-(-out_features // rows), -(-in_features // size)))
        scales = np.repeat(scales, rows, axis=0)[:out_features]
    else:
        scales = _per_row(arrays, "weight_scale", out_features, -(-in_features // size))
    groups = grouping(in_features, size, _groups(arrays, in_features, scales.shape[1]))
    levels = np.arange(1 << bits, dtype=np.float32)
    label = f"int{bits}{{}}-{size_name(size, in_features)}"
    if not arrays.has("weight_zero_point") or scheme.block:
        if not scheme.symmetric:
            raise UnsupportedError(
                f"load {arrays.stem}: an asymmetric scheme without weight_zero_point for each group; lowbit "
                "reads zero points of groups and channels"
            )
        return code_matrix(codes, bits, levels - half, scales, groups, label.format(""))
    zeros = _zeros(arrays, bits, dense, out_features, scales.shape[1])
    if (zeros == half).all():
        return code_matrix(codes, bits, levels - half, scales, groups, label.format(""))
    return code_matrix(codes, bits, levels, scales, groups, label.format("a"), zero_points=zeros)


def _read_nvfp4(arrays: Arrays, out_features: int, in_features: int) -> PackedMatrix:
    codes = _nibbles(arrays, out_features, in_features)
    groups = grouping(in_features, 16)
    scales = arrays.take("weight_scale", ("F8_E4M3",), (out_features, -(-in_features // 16)))
    if ((scales & 0x7F) == 0x7F).any():
        raise arrays.damaged("weight_scale holds NaN")
    divisor = float(arrays.floats("weight_global_scale", (1,))[0])
    if divisor == 0:
        raise arrays.damaged("weight_global_scale is 0, and scales are divided by it")
    return code_matrix(codes, 4, E2M1, scales, groups, "nvfp4", scale_type="e4m3", tensor_divisor=divisor)


def _read_mx(arrays: Arrays, scheme: Scheme, out_features: int, in_features: int) -> PackedMatrix:
    size = scheme.group_size if scheme.group_size > 0 else 32
    scales = arrays.take("weight_scale", ("U8", "F8_E8M0"), (out_features, -(-in_features // size)))
    if (scales == 255).any():
        raise arrays.damaged("weight_scale holds 255, which is no power of two")
    if scheme.bits == 4:
        codes, levels, label = _nibbles(arrays, out_features, in_features), E2M1, "mxfp4"
    elif scheme.bits == 6:
        if in_features % 4:
            raise arrays.damaged(f"{in_features} inputs of 6 bits do not fill whole bytes")
        words = arrays.take("weight_packed", ("U8",), (out_features, in_features * 6 // 8))
        codes, levels, label = unpack_dense(_whole_words(words), 6, in_features), E2M3, "mxfp6-e2m3"
    else:
        dtype = str(arrays.dtype("weight"))
        codes = arrays.take("weight", ("F8_E4M3",), (out_features, in_features))
        if ((codes & 0x7F) == 0x7F).any():
            raise arrays.damaged("weight holds NaN")
        levels, label = FP8[dtype], "mxfp8-e4m3"
    return code_matrix(
        codes, scheme.bits, levels, scales, grouping(in_features, size), label, scale_type="e8m0"
    )


def _scheme(arrays: Arrays, config: Config) -> Scheme:
    scheme = config.scheme(arrays.stem)
    if scheme is None:
        raise arrays.damaged(
            "it is stored quantized, but no group of the quantization_config has it as a target"
        )
    return scheme


def _stored_shape(arrays: Arrays) -> tuple[int, int]:
    given = arrays.take("weight_shape", ("I64", "I32"), (2,))
    out_features, in_features = int(given[0]), int(given[1])
    if arrays.shape("weight_packed")[0] != out_features or not 0 < in_features < 1 << 31:
        raise arrays.damaged(
            f"weight_shape is {[out_features, in_features]}, weight_packed "
            f"{list(arrays.shape('weight_packed'))}"
        )
    return out_features, in_features


def _is_dense(arrays: Arrays, words: int, bits: int, count: int, dense: bool | None) -> bool:
    """Are `count` codes in so many words packed without gaps? dense: what else is known."""
    whole, gaps = dense_words(count, bits), padded_words(count, bits)
    if words not in (whole, gaps):
        raise arrays.damaged(
            f"{count} codes of {bits} bits take {whole} words, or {gaps} with gaps, not {words}"
        )
    if whole != gaps:
        return words == whole
    if dense is None and 32 % bits and whole > 1:
        raise UnsupportedError(
            f"load {arrays.stem}: {count} codes of {bits} bits in {words} words are packed with or without "
            "gaps; give the version of compressed-tensors in the quantization_config"
        )
    return dense is not False


def _unsigned(arrays: Arrays, part: str, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    """Signed integers of an I8 array as codes from 0 on."""
    half = 1 << (bits - 1)
    values = arrays.take(part, ("I8",), shape)
    if bits < 8 and (int(values.min()) < -half or int(values.max()) >= half):
        raise arrays.damaged(f"{part} holds integers of more than {bits} bits")
    return (values.view(np.uint8) + np.uint8(half)) & np.uint8((1 << bits) - 1)


def _zeros(arrays: Arrays, bits: int, dense: bool | None, out_features: int, n_groups: int) -> np.ndarray:
    """Zero points uint8 [out_features, groups], in units of the unsigned codes."""
    if arrays.dtype("weight_zero_point") == "I32":
        packed = arrays.take("weight_zero_point", ("I32",), (None, n_groups))
        whole = _is_dense(arrays, len(packed), bits, out_features, dense)
        return (unpack_dense if whole else unpack_padded)(
            np.ascontiguousarray(packed.T), bits, out_features
        ).T
    given = arrays.shape("weight_zero_point")
    zeros = _unsigned(arrays, "weight_zero_point", bits, given)
    if int(np.prod(given)) == 1:
        return zeros.reshape(1, 1)
    if zeros.size != out_features * n_groups or given[0] != out_features:
        raise arrays.damaged(f"weight_zero_point has shape {list(given)}, not [{out_features}, {n_groups}]")
    return zeros.reshape(out_features, n_groups)


def _per_row(arrays: Arrays, part: str, out_features: int, n_groups: int) -> np.ndarray:
    """Scales float32 [out_features, groups], or [1, 1] for a whole tensor."""
    given = arrays.shape(part)
    if int(np.prod(given)) == 1 and len(given) <= 2:
        return arrays.floats(part, given).reshape(1, 1)
    if given == (out_features,) and n_groups == 1:
        return arrays.floats(part, given).reshape(-1, 1)
    return arrays.floats(part, (out_features, n_groups))


def _groups(arrays: Arrays, in_features: int, n_groups: int) -> np.ndarray | None:
    if not arrays.has("weight_g_idx"):
        return None
    found = arrays.take("weight_g_idx", ("I32", "I64"), (in_features,)).astype(np.int64)
    if (found == -1).all():  # never filled in
        return None
    if int(found.min()) < 0 or int(found.max()) >= n_groups:
        raise arrays.damaged(
            f"weight_g_idx has groups from {found.min()} to {found.max()}; there are {n_groups}"
        )
    return found


def _nibbles(arrays: Arrays, out_features: int, in_features: int) -> np.ndarray:
    packed = arrays.take("weight_packed", ("U8",), (out_features, in_features // 2))
    codes = np.empty((*packed.shape, 2), np.uint8)
    codes[:, :, 0], codes[:, :, 1] = packed & 15, packed >> 4
    return codes.reshape(out_features, in_features)


def _whole_words(data: np.ndarray) -> np.ndarray:
    """uint8 [rows, n] as words, filled up with 0."""
    return np.pad(data, ((0, 0), (0, -data.shape[1] % 4))).view(np.int32)
