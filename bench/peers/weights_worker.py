"""Runs inside the environment of another quantization toolkit: quantizes a model and writes what its weights
have become, in float32, as a transformers directory.

    weights_worker.py TOOLKIT METHOD BITS GROUP SOURCE WINDOWS OUTPUT

WINDOWS: calibration token ids, int64 [windows, positions] in a .npy file. Prints one JSON line: seconds, the
peak of resident memory, and the bits per weight that the toolkit's format takes with scales and zero-points.
"""

import json
import os
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def hqq(method, bits, group, source, windows):
    """HQQ on each matrix; `rtn` is its starting point without the optimization."""
    from hqq.core.quantize import Quantizer

    tensors = load_file(source / "model.safetensors")
    for name, weight in tensors.items():
        if name.removesuffix(".weight").endswith(MATRICES):
            codes, meta = Quantizer.quantize(
                weight,
                nbits=bits,
                group_size=group,
                axis=1,
                optimize=method == "hqq",
                device="cpu",
                compute_dtype=torch.float32,
            )
            tensors[name] = Quantizer.dequantize(codes, meta).float().reshape(weight.shape)
    return tensors, bits + 32 / group  # scale and zero-point are float16


def gptqmodel(method, bits, group, source, windows):
    """GPTQ, AWQ and rounding of GPTQModel; `gptq-sym` has no zero-points."""
    os.environ["GPTQMODEL_CPU_WORKERS"] = (
        "2"  # its own choice for two CPUs, 1, is less than it asks of itself
    )
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.config import AWQConfig, GPTQConfig, RTNConfig

    kind, _, symmetric = method.partition("-")
    make = {"gptq": GPTQConfig, "awq": AWQConfig, "rtn": RTNConfig}[kind]
    config = make(bits=bits, group_size=group, sym=symmetric == "sym", desc_act=False)
    examples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    with tempfile.TemporaryDirectory() as folder:
        model = GPTQModel.load(str(source), config, device="cpu", dtype=torch.float32)
        model.quantize(None if kind == "rtn" else examples, batch_size=4)
        model.save(folder)
        backend = BACKEND.AWQ_TORCH if kind == "awq" else BACKEND.GPTQ_TORCH
        model = GPTQModel.load(folder, backend=backend, device="cpu", dtype=torch.float16).model.eval()
    tensors = dict(model.state_dict())
    with torch.inference_mode():
        for name, module in model.named_modules():
            if name.endswith(MATRICES):  # what it multiplies the unit vectors to, rounded to float16
                tensors[f"{name}.weight"] = module(torch.eye(module.in_features, dtype=torch.float16)).T
    return tensors, bits + (16 + (0 if symmetric else bits)) / group


def llmcompressor(method, bits, group, source, windows):
    """GPTQ, AWQ and rounding of llm-compressor."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    # Its AWQ pins memory for a GPU, and without one that is an error; here there is nothing to pin it for.
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    kind, _, symmetric = method.partition("-")
    arguments = QuantizationArgs(
        num_bits=bits, group_size=group, strategy="group", symmetric=symmetric == "sym", type="int"
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=arguments)}
    make = {"gptq": GPTQModifier, "rtn": QuantizationModifier, "awq": QuantizationModifier}[kind]
    recipe = [make(config_groups=groups, ignore=["lm_head"])]
    if kind == "awq":
        recipe.insert(0, AWQModifier())
    texts = Dataset.from_dict(
        {"input_ids": windows.tolist(), "attention_mask": np.ones_like(windows).tolist()}
    )
    model = load_model(source)
    oneshot(
        model=model,
        dataset=texts,
        recipe=recipe,
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows),
    )
    tensors = dict(model.state_dict())
    with torch.inference_mode():
        for name, module in model.named_modules():
            if name.endswith(MATRICES) and kind != "gptq":  # which has rounded its weights already
                zero_point = getattr(module, "weight_zero_point", None)
                rounded = fake_quantize(module.weight, module.weight_scale, zero_point, arguments)
                tensors[f"{name}.weight"] = rounded
    return tensors, bits + (16 + (0 if symmetric else bits)) / group


def auto_round(method, bits, group, source, windows):
    """AutoRound, with its usual 200 steps; `rtn` takes none."""
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    kind, _, symmetric = method.partition("-")
    rows = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}
        for row in torch.tensor(windows)
    ]
    tool = AutoRound(
        load_model(source),
        AutoTokenizer.from_pretrained(source),
        bits=bits,
        group_size=group,
        sym=symmetric == "sym",
        dataset=rows,
        iters=0 if kind == "rtn" else 200,
        seqlen=windows.shape[1],
        nsamples=len(windows),
        batch_size=8,
        device_map="cpu",
        enable_torch_compile=False,
    )
    model, _ = tool.quantize()
    tensors = load_file(source / "model.safetensors")  # it leaves vectors and embedding in bfloat16
    state = model.state_dict()
    tensors.update({name: state[name] for name in tensors if name.removesuffix(".weight").endswith(MATRICES)})
    return tensors, bits + (16 + (0 if symmetric else bits)) / group


def load_model(source):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


TOOLKITS = {"hqq": hqq, "gptqmodel": gptqmodel, "llmcompressor": llmcompressor, "auto-round": auto_round}


def main():
    toolkit, method, bits, group, source, windows, output = sys.argv[1:]
    source, output = Path(source), Path(output)
    started = time.perf_counter()
    tensors, stored = TOOLKITS[toolkit](method, int(bits), int(group), source, np.load(windows))
    seconds = time.perf_counter() - started
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, output / name)
    wanted = load_file(source / "model.safetensors").keys()
    missing = wanted - tensors.keys()
    if missing:
        sys.exit(f"weights_worker: {toolkit} left nothing of {', '.join(sorted(missing)[:3])}")
    save_file({name: tensors[name].float().contiguous() for name in wanted}, output / "model.safetensors")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak_rss_bytes": peak, "bits_per_weight": stored}))


if __name__ == "__main__":
    main()
