"""How far lowbit is from transformers in float32 on the same dequantized weights.

    python bench/reference_smollm2.py MODEL.gguf --text wiki.test.raw --tokens 50000 --cache FOLDER --json

Perplexity: the text is encoded once without added tokens and cut into windows of --context tokens that do
not overlap; the last, incomplete one is dropped. Greedy: 32 tokens for each of 20 prompts through the chat
template; where a continuation parts from the reference's, the reference's gap between its two best tokens
at that place says whether it was a near-tie.

The reference model and its results are kept in the cache folder, since they take minutes. Any checkpoint of
the llama family will do. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.model.checkpoint import open_checkpoint
from lowbit.model.config import ModelConfig
from lowbit.model.loader import LoadedModel, load_model

CONTINUATION = 32
PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
    "Give me three tips for learning a new language.",
    "What is 17 multiplied by 6?",
    "Who wrote the play Romeo and Juliet?",
    "Translate 'good morning' into Spanish.",
    "Write a Python function that returns the factorial of a number.",
    "Summarize the water cycle for a ten-year-old.",
    "List five animals that live in the desert.",
    "What is the difference between a virus and a bacterium?",
    "Tell me a joke about computers.",
    "How do I make a cup of tea?",
    "Describe the planet Mars in one paragraph.",
    "What are the primary colors?",
    "Write a polite email asking for a day off.",
    "Why do cats purr?",
    "Name the four seasons and one feature of each.",
    "What does the word 'resilient' mean? Use it in a sentence.",
    "If a train travels 60 km in 45 minutes, what is its speed in km/h?",
)


def build_reference(model: Path, folder: Path) -> Path:
    """A transformers directory in float32 with the decoded weights of `model`; kept if it is there."""
    if (folder / "config.json").exists():
        return folder
    import torch
    import transformers

    with open_checkpoint(model) as checkpoint:
        config = checkpoint.config
        network = transformers.LlamaForCausalLM(llama_config(config))
        state = {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.names()}
    if config.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    network.load_state_dict(state, strict=True)
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    network.float().save_pretrained(partial)
    partial.rename(folder)
    return folder


def llama_config(config: ModelConfig) -> Any:
    import transformers

    if config.family != "llama" or config.rope.kind != "default":
        raise SystemExit(
            f"the reference is a plain llama; {config.family} with {config.rope.kind} rope is not"
        )
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        tie_word_embeddings=config.tied,
        attention_bias=config.qkv_bias,
        mlp_bias=config.mlp_bias,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


class Reference:
    """transformers in float32; token ids in, numbers out."""

    def __init__(self, folder: Path, threads: int):
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch = torch
        self.network = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def window_nll(self, ids: np.ndarray) -> float:
        """Sum of -log p of every token but the first."""
        torch = self.torch
        with torch.no_grad():
            tokens = torch.from_numpy(ids.astype(np.int64))[None]
            logits = self.network(tokens, use_cache=False).logits[0, :-1]
            return float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum").double())

    def greedy(self, ids: list[int], count: int) -> tuple[list[int], list[tuple[int, int, float]]]:
        """`count` tokens, and (best, second, gap of their logits) at each of them."""
        torch, past, feed = self.torch, None, torch_tokens(self.torch, ids)
        tokens, margins = [], []
        with torch.no_grad():
            for _ in range(count):
                out = self.network(feed, past_key_values=past, use_cache=True)
                past = out.past_key_values
                (first, second), best = out.logits[0, -1].topk(2)
                margins.append((int(best[0]), int(best[1]), float(first - second)))
                tokens.append(int(best[0]))
                feed = torch_tokens(torch, tokens[-1:])
        return tokens, margins


def torch_tokens(torch: Any, ids: list[int]) -> Any:
    return torch.tensor([ids], dtype=torch.int64)


def reference_results(
    folder: Path, ids: np.ndarray, prompts: list[list[int]], context: int, threads: int
) -> dict[str, Any]:
    """Negative log likelihood of each window and the greedy continuations, computed once per input."""
    key = hashlib.sha256(ids.tobytes() + repr((context, prompts, CONTINUATION)).encode()).hexdigest()[:16]
    path = folder.with_name(f"{folder.name}-{key}.json")
    if path.exists():
        return json.loads(path.read_text())
    started = time.perf_counter()
    reference = Reference(folder, threads)
    windows = [reference.window_nll(ids[i : i + context]) for i in range(0, len(ids) - context + 1, context)]
    results = {
        "windows": windows,
        "greedy": [reference.greedy(prompt, CONTINUATION) for prompt in prompts],
        "seconds": time.perf_counter() - started,
    }
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(results))
    partial.rename(path)
    return results


def our_windows(model: LoadedModel, ids: np.ndarray, context: int) -> list[float]:
    """Negative log likelihood of each window by the native decoder."""
    windows = []
    for start in range(0, len(ids) - context + 1, context):
        scores = model.decoder.score(ids[start : start + context].astype(np.int32), model.cache(context))
        windows.append(-float(np.sum(scores, dtype=np.float64)))
    return windows


def our_greedy(model: LoadedModel, ids: list[int], count: int) -> list[int]:
    cache = model.cache(len(ids) + count)
    tokens: list[int] = []
    feed = ids
    while len(tokens) < count:
        row = model.decoder.logits(np.array(feed, np.int32), [cache], [len(feed)])[0]
        feed = [int(np.argmax(row))]
        tokens += feed
    return tokens


def compare(
    model: LoadedModel, ids: np.ndarray, prompts: list[list[int]], reference: dict, context: int
) -> dict:
    """Perplexity and continuations of one setting of lowbit beside the reference."""
    scored = len(reference["windows"]) * (context - 1)
    ours, theirs = (sum(w) / scored for w in (our_windows(model, ids, context), reference["windows"]))
    differences = []
    for prompt, (tokens, margins) in zip(prompts, reference["greedy"]):
        mine = our_greedy(model, prompt, CONTINUATION)
        at = next((i for i in range(CONTINUATION) if mine[i] != tokens[i]), None)
        if at is not None:
            best, second, gap = margins[at]
            differences.append(
                {
                    "prompt": prompts.index(prompt),
                    "position": at,
                    "reference_token": best,
                    "our_token": mine[at],
                    "is_second_best": mine[at] == second,
                    "reference_gap": gap,
                }
            )
    return {
        "perplexity": math.exp(ours),
        "relative_difference": math.exp(ours - theirs) - 1,
        "greedy_equal": len(prompts) - len(differences),
        "greedy_differences": differences,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument(
        "--tokens", type=int, default=50_000, help="only the first so many tokens of the text"
    )
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument(
        "--prompts", type=int, default=len(PROMPTS), help="how many of the prompts to continue"
    )
    parser.add_argument("--cache", type=Path, required=True, help="folder that keeps the reference")
    parser.add_argument("--activations", nargs="+", default=["int16", "int8"], choices=["int8", "int16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--reference-only", action="store_true", help="do not run lowbit")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout and nothing else")
    args = parser.parse_args()

    args.cache.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(args.model.read_bytes()).hexdigest()[:16]
    folder = build_reference(args.model, args.cache / f"{args.model.stem}-{digest}-float32")
    with open_checkpoint(args.model) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        raise SystemExit(f"{args.model} has no tokenizer; the comparison needs text")
    ids = np.array(tokenizer.encode(args.text.read_text(encoding="utf-8"), add_special=False), np.int32)
    ids = ids[: args.tokens]
    if len(ids) < args.context:
        raise SystemExit(f"{args.text} has {len(ids)} tokens, less than one window of {args.context}")
    prompts = [
        tokenizer.encode(tokenizer.apply_chat([{"role": "user", "content": text}]), add_special=False)
        for text in PROMPTS[: args.prompts]
    ]
    reference = reference_results(folder, ids, prompts, args.context, args.threads)
    scored = len(reference["windows"]) * (args.context - 1)
    result: dict[str, Any] = {
        "model": args.model.name,
        "tokens": scored,
        "context": args.context,
        "prompts": len(prompts),
        "reference_perplexity": math.exp(sum(reference["windows"]) / scored),
        "reference_seconds": reference["seconds"],
    }
    for activations in [] if args.reference_only else args.activations:
        model = load_model(args.model, activations=activations, threads=args.threads)
        result[activations] = compare(model, ids, prompts, reference, args.context)
    if args.json:
        json.dump(result, sys.stdout)
    else:
        show(result, tokenizer)


def show(result: dict[str, Any], tokenizer: Any) -> None:
    print(
        f"transformers float32   perplexity {result['reference_perplexity']:.4f}  ({result['tokens']} tokens)"
    )
    for name in ("int16", "int8"):
        if name not in result:
            continue
        ours = result[name]
        print(
            f"lowbit {name:5}           perplexity {ours['perplexity']:.4f}  "
            f"({ours['relative_difference']:+.4%})  greedy {ours['greedy_equal']}/{result['prompts']} equal"
        )
        for d in ours["greedy_differences"]:
            words = [repr(tokenizer.decode([d[key]])) for key in ("reference_token", "our_token")]
            rank = "its second" if d["is_second_best"] else "not its second"
            print(
                f"    prompt {d['prompt']:2} position {d['position']:2}: reference {words[0]}, lowbit "
                f"{words[1]} ({rank} choice), gap of its two best logits {d['reference_gap']:.4f}"
            )


if __name__ == "__main__":
    main()
