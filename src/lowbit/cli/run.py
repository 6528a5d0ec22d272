"""`lowbit run`: one prompt, one answer, shown as it is made."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from lowbit.cli import options
from lowbit.cli.output import note
from lowbit.errors import RequestError


def configure(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("words", metavar="PROMPT", nargs="?", help="the prompt; without it -p, or stdin")
    parser.add_argument("-p", "--prompt", metavar="TEXT", help="the prompt, as an option")
    parser.add_argument("--raw", action="store_true", help="give the prompt as it is, without chat template")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the prompt")
    parser.add_argument("-q", "--quiet", action="store_true", help="no line of figures on stderr")
    parser.add_argument(
        "--json-schema", metavar="FILE", help="the answer is JSON of this schema (needs llguidance)"
    )
    parser.add_argument(
        "--speculate",
        choices=["ngram"],
        help="guess what stood before, which is faster where an answer repeats its prompt; same tokens",
    )
    options.add_runtime(parser, "tokens of prompt and answer (default: what the model was trained for)")
    options.add_sampling(parser, temperature=0.0, max_tokens=512)


def execute(args: argparse.Namespace) -> dict[str, Any]:
    parameters = options.sampling_parameters(args)
    prompt = _prompt(args)
    model = options.load_model(args)
    raw = args.raw or not model.has_chat_template
    asked: Any = prompt
    if raw:
        if args.system is not None:
            why = "--raw is given" if args.raw else "this model has no chat template"
            raise RequestError(f"run: --system needs a chat template and {why}; put the text into the prompt")
    else:
        messages = [{"role": "system", "content": args.system}] if args.system is not None else []
        asked = [*messages, {"role": "user", "content": prompt}]
    stream: Any
    if args.speculate or args.json_schema:
        stream = _engine_stream(model, asked, parameters, args)
    else:
        ids = model.encode(asked) if raw else model.encode_chat(asked)
        stream = model.stream_ids(ids, parameters, continuing=raw)
    if not args.json:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    g = stream.generation
    result = {
        "text": g.text,
        "token_ids": g.token_ids,
        "prompt_tokens": g.prompt_tokens,
        "generated_tokens": g.generated_tokens,
        "seconds": g.seconds,
        "prompt_seconds": g.prompt_seconds,
        "tokens_per_second": g.tokens_per_second,
        "finish_reason": g.finish_reason,
        "seed": parameters.seed,
    }
    if args.speculate:
        result |= {"drafted_tokens": g.drafted_tokens, "accepted_tokens": g.accepted_tokens}
    if g.logprobs is not None:
        result["logprobs"] = [
            {"token_id": t.token_id, "logprob": t.logprob, "top": [list(pair) for pair in t.top]}
            for t in g.logprobs
        ]
    return result


def _engine_stream(model: Any, asked: Any, parameters: Any, args: argparse.Namespace) -> Any:
    """What only the engine can do. It ends with the answer that holds it."""
    from lowbit.engine.config import EngineConfig
    from lowbit.engine.constraint import Grammar
    from lowbit.engine.engine import Engine

    grammar = None
    if args.json_schema is not None:
        try:
            grammar = Grammar.json_schema(Path(args.json_schema).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RequestError(
                f"run: --json-schema {args.json_schema}: {error}; name a file of JSON"
            ) from error
    config = EngineConfig(max_sequences=1, speculation=args.speculate)
    return Engine(model, config).stream(asked, parameters, grammar=grammar)


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    """The text is on stdout already; the figures follow on stderr."""
    if not args.quiet:
        note(_figures(result, random=args.temperature > 0))


def _figures(result: dict[str, Any], random: bool) -> str:
    ends = {"length": ", stopped by --max-tokens", "context": ", the context is full"}
    parts = [f"{result['generated_tokens']} tokens"]
    if result["tokens_per_second"]:
        parts.append(f"{result['tokens_per_second']:.1f} tokens/s")
    parts.append(f"prompt {result['prompt_tokens']} tokens in {result['prompt_seconds']:.2f} s")
    if result.get("drafted_tokens"):
        parts.append(f"{result['accepted_tokens']} of {result['drafted_tokens']} guesses true")
    if random:
        parts.append(f"seed {result['seed']}")
    return f"[{', '.join(parts)}{ends.get(result['finish_reason'], '')}]"


def _prompt(args: argparse.Namespace) -> str:
    if args.words is not None and args.prompt is not None:
        raise RequestError("run: the prompt is given twice, as an argument and with -p; give it once")
    text = args.words if args.words is not None else args.prompt
    if text is not None:
        return text
    if sys.stdin is None or sys.stdin.isatty():
        raise RequestError('run: no prompt; give it as an argument: lowbit run MODEL "Hello", or on stdin')
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"run: stdin is not UTF-8 at byte {error.start}; convert it first") from error
    return text if args.raw else text.removesuffix("\n")
