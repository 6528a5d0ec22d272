"""Load a directory by vLLM's own code, without a GPU, and write down the weights that it then holds.

    VLLM_PYTHON bench/peers/vllm_loading.py DIRECTORY OUT.npz

vLLM reads the config, makes its modules (with q, k and v, or gate and up, in one), asks its quantization
classes for parameters and fills them by its loaders: names, shapes, types and packing have to be right.
Only the last step is left out, which lays weights out for a kernel of the GPU at hand. What is in the
parameters is then decoded, for pack-quantized weights as vLLM's own batch-invariant mode does.
tests/interop/test_vllm.py runs this. Written for vLLM 0.33, whose Python files are enough: no CUDA.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_BATCH_INVARIANT"] = "1"  # compressed-tensors keep the layout of the file
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"

import numpy as np
import torch
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()
torch.accelerator.empty_cache = lambda: None  # fails without an accelerator

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where weight i of a word lies: of nibbles stored 0 2 4 6 1 3 5 7


def load(folder: str) -> tuple[Any, Any]:
    """(the model, its quantization config)."""
    from vllm.config import DeviceConfig, LoadConfig, ModelConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader import base_loader, get_model

    model = ModelConfig(
        model=folder, tokenizer=folder, skip_tokenizer_init=True, dtype="float16", enforce_eager=True
    )
    config = VllmConfig(model_config=model, load_config=LoadConfig(), device_config=DeviceConfig("cpu"))
    base_loader.process_weights_after_loading = lambda *args, **kwargs: None  # lays out for a GPU
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/.vllm-{os.getpid()}", 0, "gloo")
        initialize_model_parallel(1)
        return get_model(vllm_config=config), config.quant_config


def decode(module: torch.nn.Module, quant: Any) -> torch.Tensor | None:
    """float32 [out_features, in_features] of a module that holds quantized weights; None for others."""
    held = dict(module.named_parameters(recurse=False))
    if "weight_packed" in held:
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        shape = torch.Size((module.output_size_per_partition, module.input_size_per_partition))
        scale = held["weight_scale"].float()
        bits = module.scheme.num_bits
        codes = unpack_from_int32(held["weight_packed"].data, bits, shape).float()
        codes = codes.view(shape[0], scale.shape[1], -1)
        if "weight_zero_point" in held:
            zeros = unpack_from_int32(held["weight_zero_point"].data, bits, scale.shape, packed_dim=0)
            codes = codes - zeros[..., None].float()
        return (codes * scale[..., None]).view(shape)
    if "qweight" in held:
        method = type(quant).__name__.lower()
        return (awq if "awq" in method else gptq)(held, quant)
    if "weight_scale" in held:
        weight = held["weight"].float()
        return weight * held["weight_scale"].float().reshape(-1, 1)
    return None


def gptq(held: dict[str, torch.Tensor], quant: Any) -> torch.Tensor:
    """Codes along the input; vLLM takes symmetric ones only, whose zero is half the range."""
    from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32

    kind = quant.quant_type
    codes = unpack_quantized_values_into_int32(held["qweight"].data, kind, packed_dim=0) - kind.bias
    scales = held["scales"].float()
    return (codes.view(len(scales), -1, codes.shape[1]) * scales[:, None]).reshape(codes.shape).T


def awq(held: dict[str, torch.Tensor], quant: Any) -> torch.Tensor:
    """Codes and zeros along the output, eight to a word."""
    shifts = 4 * torch.tensor(AWQ_ORDER)

    def unpack(words: torch.Tensor) -> torch.Tensor:
        return ((words[..., None] >> shifts) & 15).flatten(-2)

    codes, zeros, scales = unpack(held["qweight"].data), unpack(held["qzeros"].data), held["scales"].float()
    grouped = codes.view(len(scales), -1, codes.shape[1]) - zeros[:, None]
    return (grouped * scales[:, None]).reshape(codes.shape).T


def main() -> None:
    folder, output = sys.argv[1:]
    model, quant = load(folder)
    found = {}
    for name, module in model.named_modules():
        weight = decode(module, quant)
        if weight is not None:
            found[name] = weight.detach().float().numpy()
    np.savez(output, **found)


if __name__ == "__main__":
    main()
