"""The tensors of a checkpoint whose weights another quantizer stored, under the names of a float checkpoint.

A matrix of several arrays ("X.qweight", "X.scales", ..) appears as the one tensor "X.weight". Which matrices
are quantized is read off the arrays: what a list such as modules_to_not_convert leaves out is stored as plain
floats, and stays what it is.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowbit.errors import CheckpointError, FormatError, UnsupportedError
from lowbit.model.stored.arrays import Arrays

if TYPE_CHECKING:
    from lowbit.model.sources import Source
    from lowbit.packed import PackedMatrix, TensorFile

# quant_method of config.json -> file of this folder. Each has config(), and but for mxfp4: MARKS, the last
# part of a name that tells a quantized matrix; parts(), its arrays; shape(), name() and read().
METHODS = {
    "gptq": "gptq",
    "awq": "awq",
    "compressed-tensors": "compressed_tensors",
    "bitsandbytes": "bitsandbytes",
    "bitnet": "bitnet",
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "mxfp4": "mxfp4",
}
_CACHES = (".k_scale", ".v_scale", ".q_scale", ".k_zero_point", ".v_zero_point")  # of keys and values
_EXPERTS = ("_blocks", "_scales")
_QUANTIZED = (".qweight", ".weight_packed", ".weight.absmax")


class StoredTensors:
    """What a directory holds, with quantized matrices as one tensor each.

    files: name of each array -> the file that has it. fields: of config.json.
    Raises UnsupportedError for a quantization that lowbit does not read, CheckpointError for arrays that do
    not belong together.
    """

    def __init__(self, files: Mapping[str, TensorFile], fields: Mapping[str, Any], where: str):
        self._files = files
        quantization = quantization_of(fields, where)
        self.method = str(quantization["quant_method"]) if quantization else ""
        self._packed: dict[str, Arrays] = {}
        self._last: tuple[str, PackedMatrix] | None = None
        self._names = list(files)
        if not quantization:
            found = next((name for name in files if name.endswith(_QUANTIZED)), None)
            if found is not None:
                raise CheckpointError(
                    f"{where}: {found} is stored quantized, but there is no quantization_config that says "
                    "how; fetch the whole directory"
                )
        if not quantization or self.method == "lowbit":
            return
        self._module: Any = import_module(f"lowbit.model.stored.{METHODS[self.method]}")
        self._config = self._module.config(quantization, f"{where}: quantization_config")
        self._find()

    def names(self) -> list[str]:
        return self._names

    def packed(self, name: str) -> bool:
        """Is this tensor stored quantized?"""
        return name in self._packed

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a quantized matrix [out, in], of experts [experts, out, in]."""
        if name not in self._packed:
            return self._files[name].shape(name)
        if name.endswith(_EXPERTS[0]):
            return self._module.shape(self._packed[name])
        return self._module.shape(self._packed[name], self._config)

    def dtype(self, name: str) -> str:
        if name not in self._packed:
            return self._files[name].dtype(name)
        return (
            self.method if name.endswith(_EXPERTS[0]) else self._module.name(self._packed[name], self._config)
        )

    def matrix(self, source: Source) -> PackedMatrix:
        """The quantized matrix, or the part of it, that `source` names.

        Matrices that float checkpoints hold transposed are stored [out, in] once they are quantized.
        """
        name = source.stored
        try:
            if source.expert is not None:
                return self._module.read(self._packed[name], source.expert, source.rows)
            if self._last is None or self._last[0] != name:
                self._last = (name, self._module.read(self._packed[name], self._config))
            whole = self._last[1]
            if source.rows is None:
                self._last = None  # nobody else reads a part of it
                return whole
            return whole.take_rows(source.rows)
        except (FormatError, IndexError) as error:
            raise CheckpointError(f"load {name}: {error}; the checkpoint is damaged") from error

    def zeros(self, name: str) -> bool:
        """Is this a bias of nothing but zeros beside a quantized matrix? AutoGPTQ writes one for each."""
        stem = name.removesuffix(".bias")
        if stem == name or f"{stem}.weight" not in self._packed or len(self._files[name].shape(name)) != 1:
            return False
        return not self._files[name].array(name).any()

    def notes(self) -> list[str]:
        """What runs in another way here than where the checkpoint was made, a line each."""
        notes: list[str] = []
        if not self._packed:
            return notes
        kinds = sorted({scheme.activations for _, scheme in getattr(self._config, "schemes", ())} - {""})
        if kinds or METHODS[self.method] == "fp8":
            asked = ", ".join(kinds) or "fp8"
            notes.append(
                f"activations: stored for {asked}; lowbit rounds them to int8 per token and 64 inputs"
            )
        if self.method == "bitsandbytes" and any(arrays.has("SCB") for arrays in self._packed.values()):
            notes.append("LLM.int8(): inputs above the threshold are rounded to int8 too, in groups of 64")
        schemes = [scheme for _, scheme in getattr(self._config, "schemes", ())]
        if METHODS[self.method] == "fp8" or any(scheme.floats and scheme.bits == 8 for scheme in schemes):
            notes.append(
                "fp8: products take its values on a grid of 1 / 16256 of the largest, sums are exact"
            )
        return notes

    def _find(self) -> None:
        """Fill `_packed`, and take the arrays that belong to its tensors out of the names."""
        if self.method == "mxfp4":
            self._packed = {
                name: Arrays(self._files, name.removesuffix(_EXPERTS[0]))
                for name in self._files
                if name.endswith(_EXPERTS[0])
            }
            used = {name.removesuffix(_EXPERTS[0]) + _EXPERTS[1] for name in self._packed}
            self._names = [name for name in self._names if name not in used]
            return
        owner: dict[str, str] = {}  # array -> tensor
        for name in self._files:
            for mark in self._module.MARKS:
                stem = name.removesuffix(f".{mark}")
                if stem == name or f"{stem}.weight" in self._packed:
                    continue
                arrays = Arrays(self._files, stem)
                parts = self._module.parts(arrays, self._config)
                if parts is None:
                    continue
                tensor = f"{stem}.weight"
                if mark != "weight" and arrays.has("weight"):
                    raise CheckpointError(
                        f"load {tensor}: it is stored both quantized and plain; it is damaged"
                    )
                self._packed[tensor] = arrays
                owner.update({arrays.name(part): tensor for part in parts if arrays.has(part)})
        names = dict.fromkeys(owner.get(name, name) for name in self._files)
        self._names = [name for name in names if not name.endswith(_CACHES)]


def quantization_of(fields: Mapping[str, Any], where: str) -> Mapping[str, Any] | None:
    """The quantization_config of a config.json, None without one.

    Raises UnsupportedError, with what was found and what is supported, for a method that is not read.
    """
    given = fields.get("quantization_config")
    given = fields.get("compression_config") if given is None else given
    if given is None:
        return None
    found = given if isinstance(given, Mapping) else {}
    method = found.get("quant_method", "bitsandbytes" if _is_bitsandbytes(found) else None)
    if not isinstance(method, str) or method not in (*METHODS, "lowbit"):
        raise UnsupportedError(
            f"{where}: the weights are stored by quant_method={reprlib.repr(method)}; lowbit reads "
            f"{', '.join(METHODS)}, fp32, fp16 and bf16 weights, GGUF and its own files: start from one of "
            "these"
        )
    return {**found, "quant_method": method}


def _is_bitsandbytes(given: Mapping[str, Any]) -> bool:
    """Its first versions did not name themselves."""
    return bool(given.get("load_in_4bit") or given.get("load_in_8bit"))
