"""`lowbit chat`: turns with one model, keys and values kept between them."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from lowbit.cli import options
from lowbit.cli.output import dim, note
from lowbit.errors import RequestError, UnsupportedError

COMMANDS = "/reset forgets the conversation, /exit ends, Ctrl-C stops an answer"


def configure(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message that stays in force")
    options.add_runtime(parser, "tokens of the whole conversation (default: what the model was trained for)")
    options.add_sampling(parser, temperature=0.7, max_tokens=1024)


def execute(args: argparse.Namespace) -> dict[str, Any]:
    parameters = options.sampling_parameters(args)
    from lowbit.engine import Conversation

    model = options.load_model(args)
    if not model.has_chat_template:
        raise UnsupportedError(
            f"chat: {args.model} has no chat template (it is a base model); use `lowbit run --raw`"
        )
    talk = Conversation(model, system=args.system)
    interactive = sys.stdin.isatty() and not args.json
    if interactive:
        note(f"{args.model}: {model.bits_per_weight:.2f} bits per weight, context {model.context} tokens")
        note(COMMANDS)
    turns = []
    for line in _lines(interactive):
        if line in ("/exit", "/quit"):
            break
        if line == "/reset":
            talk.reset()
            note("[forgotten]")
        elif line in ("/help", "/?"):
            note(COMMANDS)
        elif line.startswith("/"):
            note(f"[{line.split()[0]} is no command; {COMMANDS}]")
        elif line:
            turns += _turn(talk, line, parameters, args.json, interactive)
    return {"turns": turns, "seed": parameters.seed}


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Everything was shown while talking."""


def _turn(talk: Any, text: str, parameters: Any, as_json: bool, interactive: bool) -> list[dict[str, Any]]:
    try:
        for piece in talk.send(text, parameters):
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
    except KeyboardInterrupt:
        if not interactive:
            raise
        sys.stdout.write(dim(" [stopped]") + "\n")
        return []
    except RequestError as error:
        if not interactive:
            raise
        note(f"[{error}; or /reset]")
        return []
    g = talk.last
    if not as_json:
        sys.stdout.write("\n")
    if interactive:
        sys.stdout.write(
            dim(f"[{g.tokens_per_second:.0f} tokens/s, {talk.tokens_used} of {talk.capacity} tokens]") + "\n"
        )
    return [
        {
            "user": text,
            "text": g.text,
            "token_ids": g.token_ids,
            "prompt_tokens": g.prompt_tokens,
            "reused_tokens": g.reused_tokens,
            "generated_tokens": g.generated_tokens,
            "seconds": g.seconds,
            "finish_reason": g.finish_reason,
        }
    ]


def _lines(interactive: bool) -> Iterator[str]:
    """Lines of the user: with editing and history at a terminal, plain from a pipe."""
    if not interactive:
        yield from (line.strip() for line in sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() uses it once it is imported)
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            note("[/exit or Ctrl-D ends]")
