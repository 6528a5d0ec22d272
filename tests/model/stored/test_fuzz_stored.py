"""Damaged checkpoints of other quantizers: an error of ours or a model, never anything else.

Small whole directories of every kind of storage, mutated as in test_fuzz_readers, and with arrays of other
types and shapes, or without them. LOWBIT_FUZZ_CASES sets how many mutations are tried.
"""

import contextlib
import json
import os
import random

import numpy as np
import pytest

from lowbit.errors import LowbitError
from lowbit.model.checkpoint import open_checkpoint

from ..fuzz_seeds import CONFIG, SHAPES, mutate_bytes, mutate_json, mutate_safetensors, safetensors_bytes
from ..test_fuzz_readers import exercise

CASES = int(os.environ.get("LOWBIT_FUZZ_CASES", "250")) // 4
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I64": 8, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E8M0": 1}
Arrays = dict[str, tuple[str, tuple[int, ...], bytes]]


def numbers(rng, kind, *shape, low=0, high=250):
    """An array of small numbers of any type."""
    if kind in ("F32", "F16"):
        data = rng.uniform(0.01, 0.1, shape).astype({"F32": "<f4", "F16": "<f2"}[kind]).tobytes()
    elif kind == "BF16":
        data = (rng.uniform(0.01, 0.1, shape).astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    else:
        data = (
            rng.integers(low, high, shape).astype(f"<i{SIZES[kind]}" if SIZES[kind] > 1 else "<u1").tobytes()
        )
    return kind, shape, data


def words(rng, *shape):
    return "I32", shape, rng.integers(-(1 << 31), 1 << 31, shape, dtype=np.int64).astype("<i4").tobytes()


def gptq(rng, out, inputs):
    order = rng.permutation(np.arange(inputs) // 16).astype("<i4")
    return {
        "qweight": words(rng, inputs // 8, out),
        "qzeros": words(rng, inputs // 16, out // 8),
        "scales": numbers(rng, "F16", inputs // 16, out),
        "g_idx": ("I32", (inputs,), order.tobytes()),
    }


def awq(rng, out, inputs):
    return {
        "qweight": words(rng, inputs, out // 8),
        "qzeros": words(rng, inputs // 16, out // 8),
        "scales": numbers(rng, "F16", inputs // 16, out),
    }


def packed(rng, out, inputs):
    return {
        "weight_packed": words(rng, out, inputs * 3 // 32),
        "weight_zero_point": words(rng, -(-out * 3 // 32), inputs // 16),
        "weight_scale": numbers(rng, "BF16", out, inputs // 16),
        "weight_shape": ("I64", (2,), np.array([out, inputs], "<i8").tobytes()),
        "weight_g_idx": ("I32", (inputs,), rng.permutation(np.arange(inputs) // 16).astype("<i4").tobytes()),
    }


def nvfp4(rng, out, inputs):
    return {
        "weight_packed": numbers(rng, "U8", out, inputs // 2),
        "weight_scale": numbers(rng, "F8_E4M3", out, inputs // 16, high=60),
        "weight_global_scale": ("F32", (1,), np.array([30], "<f4").tobytes()),
    }


def nf4(rng, out, inputs):
    state = {"quant_type": "nf4", "blocksize": 32, "shape": [out, inputs], "dtype": "float16"}
    state |= {"nested_blocksize": 256, "nested_offset": 0.03, "nested_dtype": "float32"}
    raw = json.dumps(state).encode()
    blocks = out * inputs // 32
    return {
        "weight": numbers(rng, "U8", out * inputs // 2, 1),
        "weight.absmax": numbers(rng, "U8", blocks),
        "weight.quant_map": numbers(rng, "F32", 16),
        "weight.nested_absmax": numbers(rng, "F32", -(-blocks // 256)),
        "weight.nested_quant_map": numbers(rng, "F32", 256),
        "weight.quant_state.bitsandbytes__nf4": ("U8", (len(raw),), raw),
    }


def int8(rng, out, inputs):
    return {"weight": numbers(rng, "I8", out, inputs), "SCB": numbers(rng, "F32", out)}


def bitnet(rng, out, inputs):
    codes = rng.integers(0, 3, (out, inputs)).reshape(4, out // 4, inputs)
    raw = (codes << np.array([0, 2, 4, 6])[:, None, None]).sum(axis=0).astype("<u1")
    return {
        "weight": ("U8", raw.shape, raw.tobytes()),
        "weight_scale": ("F32", (1,), np.array([12.3], "<f4").tobytes()),
    }


def fp8(rng, out, inputs):
    return {
        "weight": numbers(rng, "F8_E4M3", out, inputs, high=60),
        "weight_scale_inv": numbers(rng, "F32", -(-out // 16), -(-inputs // 16)),
    }


def scheme(format, **weights):
    group = {
        "targets": ["re:.*proj"],
        "weights": {"num_bits": 4, "type": "int", "strategy": "group"} | weights,
    }
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


KINDS = {
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "dynamic": {}}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}),
    "pack-quantized": (packed, scheme("pack-quantized", num_bits=3, group_size=16, symmetric=False)),
    "nvfp4": (nvfp4, scheme("nvfp4-pack-quantized", type="float", strategy="tensor_group", group_size=16)),
    "nf4": (nf4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "llm.int8": (int8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "bitnet": (bitnet, {"quant_method": "bitnet", "linear_class": "bitlinear"}),
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [16, 16]}),
}


def safetensors(arrays: Arrays) -> bytes:
    entries, data = {}, b""
    for name, (kind, shape, raw) in arrays.items():
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    return safetensors_bytes(entries, data)


def seed(kind) -> tuple[dict, Arrays]:
    """(config.json, arrays) of one layer whose projections are quantized."""
    rng = np.random.default_rng(9)
    make, quantization = KINDS[kind]
    arrays: Arrays = {}
    for name, shape in SHAPES.items():
        if len(shape) == 1 or "embed" in name:
            arrays[name] = numbers(rng, "F32", *shape)
        else:
            stem = name.removesuffix(".weight")
            arrays |= {f"{stem}.{part}": array for part, array in make(rng, *shape).items()}
    return CONFIG | {"quantization_config": quantization}, arrays


def write(folder, config, raw):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(config if isinstance(config, bytes) else json.dumps(config).encode())
    for old in folder.glob("model*.safetensors"):
        old.unlink()
    (folder / "model.safetensors").write_bytes(raw)
    return folder


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


def readable(folder) -> int:
    """How many matrices are read without an error."""
    count = 0
    with open_checkpoint(folder) as checkpoint:
        for name in checkpoint.names():
            with contextlib.suppress(LowbitError):
                count += len(checkpoint.shape(name)) == 2 and checkpoint.matrix(name) is not None
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_mutated_checkpoints(kind, tmp_path):
    config, arrays = seed(kind)
    raw, text = safetensors(arrays), json.dumps(config).encode()
    assert exercise(write(tmp_path / "whole", config, raw)) and readable(tmp_path / "whole") == 4
    opened = 0
    for case in range(CASES):
        chance = random.Random(case)
        damaged, words = raw, text
        if case % 3:
            damaged = mutate_safetensors(raw, chance)
        else:
            words = mutate_json(text, chance) if chance.random() < 0.8 else mutate_bytes(text, chance)
        opened += exercise(write(tmp_path / str(case % 2), words, damaged))
    assert 0 < opened < CASES


@pytest.mark.parametrize("kind", KINDS)
def test_other_types_shapes_and_missing_arrays(kind, tmp_path):
    """Whatever an array is, the reader names it or reads it; nothing is read beyond it."""
    config, arrays = seed(kind)
    chance = random.Random(kind)
    names = [name for name in arrays if "mlp.down_proj" in name]
    for number, name in enumerate([*names, *names, *names]):
        changed = dict(arrays)
        old, shape, raw = arrays[name]
        how = number // len(names)
        if how == 0:
            del changed[name]
        elif how == 1:
            kinds = [k for k, size in SIZES.items() if size == SIZES[old] and k != old]
            changed[name] = (chance.choice(kinds or [old]), shape, raw)
        else:
            turned = (*shape[1:], shape[0]) if len(set(shape)) > 1 else (*shape, 1)
            changed[name] = (old, turned, raw)
        exercise(write(tmp_path / str(number), config, safetensors(changed)))


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_not_finite_are_refused(kind, tmp_path):
    """NaN in scales would poison every output."""
    config, arrays = seed(kind)
    for name, (dtype, shape, raw) in arrays.items():
        if "mlp.down_proj" not in name or dtype not in ("F16", "F32", "BF16", "F8_E4M3"):
            continue
        bad = b"\xff" * SIZES[dtype] + raw[SIZES[dtype] :]
        folder = write(tmp_path / name, config, safetensors(arrays | {name: (dtype, shape, bad)}))
        assert readable(folder) == 3, name


def test_pickled_weights_are_refused(tmp_path):
    config, _ = seed("gptq")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04\x95")
    with pytest.raises(LowbitError, match="a pickle may run code"):
        open_checkpoint(tmp_path)
