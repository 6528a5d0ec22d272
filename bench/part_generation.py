"""The parts about what serving does to tokens and memory: few-bit keys and values, and prompt lookup."""

from __future__ import annotations

import difflib
import re
from statistics import median
from typing import Any

import process
import serving
import targets
from context import Bench
from serving import Running
from targets import SMALL, Row, at_least, at_most

KV_BITS, KV_CONTEXT, KV_TOKENS = (16, 8, 4, 2), 2048, 20_480
EDIT_TOKENS = 160
# What the user asks; {text} is a piece of the text that perplexity is measured on.
EDITS = (
    "Correct the spelling of this text and change nothing else:\n\n{text}",
    "Repeat this text, with every number in words:\n\n{text}",
    "Write this text again in British English:\n\n{text}",
    "Summarize this text in its own words, sentence by sentence:\n\n{text}",
)
TEXTS_EACH = 2
LOOKUP_ROUNDS = 2
TEXT_CHARACTERS = 700


def kv_section(bench: Bench) -> tuple[list[Row], Any]:
    """Keys and values in 16, 8, 4 and 2 bits: bytes of a block, and perplexity in windows of 2,048 tokens."""
    import lowbit
    from lowbit import _native

    model = bench.ours(SMALL)
    tokens = min(bench.tokens, KV_TOKENS)
    found: dict[int, dict[str, float]] = {}
    for bits in KV_BITS:
        options = ["--text", bench.text, "--max-tokens", tokens, "--context", KV_CONTEXT, "--kv-bits", bits]
        told = process.lowbit_json("eval", model, *map(str, options))
        pool = _native.KvPool(lowbit.load(str(model), kv_bits=bits).decoder, 1)
        found[bits] = {"block_bytes": pool.block_bytes, "perplexity": told["perplexity"]}
        bench.say(f"  {bits} bits: {found[bits]}")
    full, four = found[16], found[4]
    others = "; ".join(
        f"{bits} bits: {found[bits]['block_bytes'] / full['block_bytes']:.2f}x, "
        f"{100 * (found[bits]['perplexity'] / full['perplexity'] - 1):+.2f}%"
        for bits in (8, 2)
    )
    loss = 100 * (four["perplexity"] / full["perplexity"] - 1)
    perplexities = f"{four['perplexity']:.3f} against {full['perplexity']:.3f}"
    size = four["block_bytes"] / full["block_bytes"]
    name = "4-bit keys and values:"
    rows = [
        at_most(f"{name} memory, of that of 16 bits", size, "x", targets.KV_MEMORY, others),
        at_most(
            f"{name} perplexity at {KV_CONTEXT:,} tokens, above 16 bits",
            loss, "%", 100 * targets.KV_LOSS, f"{perplexities}, {tokens:,} tokens",
        ),
    ]  # fmt: skip
    return rows, {str(bits): each for bits, each in found.items()}


def lookup_section(bench: Bench) -> tuple[list[Row], Any]:
    """Decode of edits and summaries with prompt lookup over that without, in turns; equal text."""
    model = bench.ours(SMALL)
    prompts = editing_prompts(bench.text.read_text(encoding="utf-8"))
    data = []
    with (
        serving.started(serving.ours(model, "--speculation", "none"), chat=True) as plain,
        serving.started(serving.ours(model, "--speculation", "ngram"), chat=True) as lookup,
    ):
        for turn in range(1 + LOOKUP_ROUNDS):
            for number, prompt in enumerate(prompts):
                entry = {"prompt": number, "plain": 0.0, "lookup": 0.0}
                texts = []
                for label, one in (("plain", plain), ("lookup", lookup)):
                    entry[label], answer = alone(one, prompt)
                    texts.append(answer)
                if texts[0] != texts[1]:
                    at = difflib.SequenceMatcher(None, *texts).find_longest_match().size
                    raise process.CommandError(f"prompt lookup changed an answer behind character {at}")
                if turn:
                    data.append(entry)
    ratios = [
        median(e["plain"] for e in data if e["prompt"] == n)
        / median(e["lookup"] for e in data if e["prompt"] == n)
        for n in range(len(prompts))
    ]
    note = f"single prompts {', '.join(f'{r:.2f}' for r in ratios)}; the same text with and without"
    measure = "Prompt lookup, one stream of an editing or summarizing answer: decode, over plain"
    return [at_least(measure, median(ratios), "x", targets.LOOKUP, note)], {"answers": data}


def editing_prompts(text: str) -> list[str]:
    """Each of EDITS about TEXTS_EACH pieces of `text`, all different."""
    count = TEXTS_EACH * len(EDITS)
    size = len(text) // (count + 1)
    parts = [text[(i + 1) * size :].partition(" . ")[2] for i in range(count)]  # from a sentence on
    pieces = [as_written(part[: TEXT_CHARACTERS * 2]) for part in parts]
    return [edit.format(text=piece[:TEXT_CHARACTERS]) for edit, piece in zip(EDITS * TEXTS_EACH, pieces)]


def as_written(text: str) -> str:
    """Text of WikiText without the spaces of its tokenizer, as people write: nobody asks to edit " @-@ "."""
    text = re.sub(r" @([-,.])@ ", r"\1", " ".join(text.split()))
    text = re.sub(r" ([,.;:!?)%]|'s\b|n't\b)", r"\1", text)
    return re.sub(r'" ([^"]*?) "', r'"\1"', text.replace("( ", "("))


def alone(one: Running, prompt: str) -> tuple[float, str]:
    """Seconds per token after the first, and the text, of one answer of at most EDIT_TOKENS."""
    (answer,) = one.together([(0.0, prompt, EDIT_TOKENS)])
    if answer.token_seconds is None:
        raise process.CommandError(f"an answer has {answer.tokens} tokens, too few to time")
    return answer.token_seconds, answer.text
