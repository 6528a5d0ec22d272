"""Runs inside OpenVINO's environment, never in ours. Prints one line of JSON last.

export GGUF OUTPUT BITS GROUP            make a model
speed MODEL THREADS PROMPT GENERATE N    tokens per second, N times
perplexity MODEL WINDOWS.npy THREADS     over int64 [n, length] token ids
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

FIRST_TOKEN = 3  # random prompts leave out the special tokens at the beginning of a vocabulary


def export(source: str, output: str, bits: str, group: str) -> dict[str, object]:
    """transformers reads and dequantizes the GGUF, optimum-intel traces it, nncf compresses the weights."""
    import torch
    import transformers
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    path = Path(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float16
    )
    if int(bits) == 8:
        config = OVWeightQuantizationConfig(bits=8)
    else:
        config = OVWeightQuantizationConfig(bits=4, sym=False, group_size=int(group), ratio=1.0)
    with tempfile.TemporaryDirectory(dir=Path(output).parent) as folder:
        model.save_pretrained(folder)
        del model
        made = OVModelForCausalLM.from_pretrained(
            folder, export=True, quantization_config=config, compile=False
        )
        made.save_pretrained(output)
    return {"output": output}


def speed(model: str, threads: str, prompt: str, generate: str, repetitions: str) -> dict[str, object]:
    """Prefill: prompt tokens over the time to the first token. Decode: from the time per token after it."""
    import numpy as np
    import openvino
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(
        model, "CPU", INFERENCE_NUM_THREADS=int(threads), NUM_STREAMS=1, PERFORMANCE_HINT="LATENCY"
    )
    rng = np.random.default_rng(0)
    vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]

    def metrics(tokens: int, new: int):
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = new
        config.ignore_eos = True
        config.set_eos_token_id(0)
        ids = rng.integers(FIRST_TOKEN, vocabulary, (1, tokens)).astype(np.int64)
        return pipeline.generate(openvino.Tensor(ids), config).perf_metrics

    metrics(int(prompt), 4)
    series: dict[str, list[float]] = {"prefill": [], "decode": []}
    for _ in range(int(repetitions)):
        series["prefill"].append(1000 * int(prompt) / metrics(int(prompt), 1).get_ttft().mean)
        series["decode"].append(1000 / metrics(1, int(generate)).get_tpot().mean)
    return series


def perplexity(model: str, windows: str, threads: str) -> dict[str, object]:
    """exp of the mean of -log p over all tokens of all windows but the first of each."""
    import numpy as np
    import openvino

    compiled = openvino.Core().compile_model(
        Path(model) / "openvino_model.xml", "CPU", {"INFERENCE_NUM_THREADS": int(threads)}
    )
    request = compiled.create_infer_request()
    total, count = 0.0, 0
    for ids in np.load(windows):
        request.reset_state()
        inputs = {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)}
        inputs |= {
            "position_ids": np.arange(len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        logits = request.infer({key: inputs[key] for key in names(compiled)})["logits"][0, :-1]
        logits = logits - logits.max(axis=1, keepdims=True)
        picked = logits[np.arange(len(ids) - 1), ids[1:]]
        total += float(np.sum(np.log(np.exp(logits, dtype=np.float64).sum(axis=1)) - picked))
        count += len(ids) - 1
    return {"perplexity": math.exp(total / count), "tokens": count}


def names(compiled) -> list[str]:
    return [port.get_any_name() for port in compiled.inputs]


if __name__ == "__main__":
    actions = {"export": export, "speed": speed, "perplexity": perplexity}
    print("\n" + json.dumps(actions[sys.argv[1]](*sys.argv[2:])))
