"""The catalogue: the named formats with a line about each.

A name outside of it works as well if `parse_format` can read it (`int3-g128`, `e2m3-row-fp32`, ..).
"""

from __future__ import annotations

from lowbit.formats.format import Format


def _m4(bits: int, group_size: int) -> Format:
    return Format.integer(bits, group_size, scale_type="m4")


_CATALOGUE: dict[str, tuple[Format, str]] = {
    "int1-g64": (Format.integer(1), "signs -1, +1"),
    "int2-g64": (Format.integer(2), "integers -2 to 1"),
    "int2-g16-m4": (_m4(2, 16), "integers -2 to 1; 16 inputs share a 4-bit multiplier, 256 a scale"),
    "int3-g64": (Format.integer(3), "integers -4 to 3"),
    "int3-g16-m4": (_m4(3, 16), "integers -4 to 3; 16 inputs share a 4-bit multiplier, 256 a scale"),
    "int4-g32": (Format.integer(4, 32), "integers -8 to 7 in small groups, as GGUF Q4_0"),
    "int4-g64": (Format.integer(4), "integers -8 to 7: the usual choice"),
    "int4-g128": (Format.integer(4, 128), "integers -8 to 7, as most GPTQ and AWQ checkpoints"),
    "int4-g16-m4": (_m4(4, 16), "integers -8 to 7; 16 inputs share a 4-bit multiplier, 256 a scale"),
    "int4-g32-m4": (_m4(4, 32), "integers -8 to 7; 32 inputs share a 4-bit multiplier, 256 a scale"),
    "int5-g64": (Format.integer(5), "integers -16 to 15"),
    "int6-g32": (Format.integer(6, 32), "integers -32 to 31 in small groups, the usual embedding"),
    "int6-g64": (Format.integer(6), "integers -32 to 31"),
    "int7-g64": (Format.integer(7), "integers -64 to 63"),
    "int8-g32": (Format.integer(8, 32), "integers -128 to 127 in small groups, as GGUF Q8_0"),
    "int8-g64": (Format.integer(8), "integers -128 to 127: nearly lossless"),
    "int8-row": (Format.integer(8, 0), "integers -128 to 127, one scale per output"),
    "int2a-g64": (Format.integer(2, mode="asymmetric"), "integers 0 to 3 with a zero-point per group"),
    "int3a-g64": (Format.integer(3, mode="asymmetric"), "integers 0 to 7 with a zero-point per group"),
    "int4a-g64": (Format.integer(4, mode="asymmetric"), "integers 0 to 15 with a zero-point per group"),
    "int8a-g64": (Format.integer(8, mode="asymmetric"), "integers 0 to 255 with a zero-point per group"),
    "int2b-g64": (Format.integer(2, mode="bipolar"), "odd integers -3, -1, 1, 3"),
    "int3b-g64": (Format.integer(3, mode="bipolar"), "odd integers -7 to 7"),
    "int4b-g64": (Format.integer(4, mode="bipolar"), "odd integers -15 to 15"),
    "ternary": (
        Format.ternary(),
        "-1, 0, +1 with a scale per output, five to a byte, for models trained that way (BitNet)",
    ),
    "ternary-g64": (Format.ternary(64), "-1, 0, +1 in groups, five to a byte"),
    "nf4-g64": (Format.nf4(), "16 quantiles of a normal distribution (QLoRA)"),
    "e2m1-g64": (Format.minifloat(2, 1), "4-bit floats (FP4) with fp16 scales"),
    "e2m1-g32": (Format.minifloat(2, 1, group_size=32), "4-bit floats (FP4) in small groups"),
    "e3m0-g64": (Format.minifloat(3, 0), "4-bit floats without mantissa: powers of two and zero"),
    "e2m2-g64": (Format.minifloat(2, 2), "5-bit floats"),
    "e3m2-g64": (Format.minifloat(3, 2), "6-bit floats, wide range (FP6)"),
    "e2m3-g64": (Format.minifloat(2, 3), "6-bit floats, fine steps (FP6)"),
    "e4m3fn-g64": (Format.minifloat(4, 3, specials="fn"), "8-bit floats as in deep learning (FP8)"),
    "e5m2-g64": (Format.minifloat(5, 2), "8-bit floats with the range of fp16 (FP8)"),
    "mxfp4": (Format.minifloat(2, 1, group_size=32, scale_type="e8m0"), "OCP Microscaling: e2m1"),
    "mxfp6_e3m2": (Format.minifloat(3, 2, group_size=32, scale_type="e8m0"), "OCP Microscaling: e3m2"),
    "mxfp6_e2m3": (Format.minifloat(2, 3, group_size=32, scale_type="e8m0"), "OCP Microscaling: e2m3"),
    "mxfp8_e4m3": (Format.minifloat(4, 3, None, "fn", 32, "e8m0"), "OCP Microscaling: e4m3fn"),
    "mxfp8_e5m2": (Format.minifloat(5, 2, group_size=32, scale_type="e8m0"), "OCP Microscaling: e5m2"),
    "mxint8": (Format.mx_integer(), "OCP Microscaling: 8-bit integers in steps of 1/64"),
    "nvfp4": (
        Format.minifloat(2, 1, group_size=16, scale_type="e4m3"),
        "NVIDIA: e2m1, groups of 16, e4m3 scales",
    ),
    "bfp4-g32": (Format.block_floating_point(4), "block floating point: -7 to 7 and a shared power of two"),
    "bfp8-g32": (
        Format.block_floating_point(8),
        "block floating point: -127 to 127 and a shared power of two",
    ),
    "shift3-g64": (Format.shift(3), "signed powers of two, 4 exponents (DenseShift)"),
    "shift4-g64": (Format.shift(4), "signed powers of two, 8 exponents (DenseShift)"),
    "bitmod3-g128": (Format.bitmod(3), "3-bit floats and a special value per group (BitMoD)"),
    "bitmod4-g128": (Format.bitmod(4), "4-bit floats and a special value per group (BitMoD)"),
    "bcq2-g128": (Format.binary_coded(2), "a sum of 2 scaled sign matrices"),
    "bcq3-g128": (Format.binary_coded(3), "a sum of 3 scaled sign matrices (ShiftAddLLM, LUT-GEMM)"),
    "bcq4-g128": (Format.binary_coded(4), "a sum of 4 scaled sign matrices"),
    "dual-g64": (Format.dual_binary(), "a sum of 2 scaled matrices of 0 and 1 (DB-LLM)"),
    "trit2-g128": (Format.trit_planes(2), "a sum of 2 scaled ternary matrices (PTQTP)"),
    "fp16": (Format.plain("fp16"), "IEEE half precision, unquantized"),
    "bf16": (Format.plain("bf16"), "bfloat16, unquantized"),
    "df11": (
        Format.lossless(),
        "bfloat16 with coded exponents: lossless in about 11.2 bits (DFloat11)",
    ),
    "fp32": (Format.plain("fp32"), "IEEE single precision, unquantized"),
}

FORMATS: dict[str, Format] = {name: fmt for name, (fmt, _) in _CATALOGUE.items()}
DESCRIPTIONS: dict[str, str] = {name: line for name, (_, line) in _CATALOGUE.items()}
