"""The command `lowbit`: finds the verb, imports its file only, and turns errors into one line.

A verb is a module here with `configure(parser)`, `execute(args) -> dict` and `show(result, args)`.
With --json the result of `execute` is the only thing on stdout; all else goes to stderr.
"""

from __future__ import annotations

import sys
from importlib import import_module

VERBS = {
    "pull": "fetch a model and print where it is",
    "quantize": "write a model in fewer bits",
    "export": "write a model for llama.cpp, transformers or vLLM",
    "run": "generate text from a prompt",
    "chat": "talk with a model",
    "serve": "answer OpenAI's API over HTTP, with a page",
    "eval": "measure perplexity on a text",
    "compare": "measure how far models are from a reference: KL, agreement, perplexity",
    "bench": "measure speed and memory against the machine's bounds",
    "inspect": "show what is inside a model",
    "plan": "choose formats, key and value bits and users for a budget, before anything is fetched",
    "doctor": "check this machine",
    "formats": "list the number formats, or draw one",
    "methods": "list the methods of quantizing",
    "demo": "fetch, quantize, compare, talk: everything once",
    "version": "print the version",
}

WELCOME = """\
lowbit runs language models in few bits.

  lowbit run smollm2-135m "What is a language model?"       ask (fetches the model once)
  lowbit quantize smollm2-135m int4-g32 -o smol-int4        make it smaller
  lowbit chat smol-int4                                     talk
  lowbit serve smol-int4                                    OpenAI's API, and a page

`lowbit help` lists all verbs, `lowbit VERB --help` their options.
"""

_MODULES = {
    "eval": "evaluate",
    "plan serve": "plan_serve",
    "bench kernels": "bench_kernels",
    "bench serve": "bench_serve",
}

# Verbs of two words; `lowbit bench ./kernels` measures a model of that name.
SUBVERBS = {
    "bench kernels": "measure single products of any format against the machine's bounds",
    "bench serve": "put load on a server: throughput and how long its users wait",
    "plan serve": "simulate a service: what its users would meet, how many it can take",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; returns the exit status: 0, 1 (our bug), 2 (bad request), 130 (Ctrl-C)."""
    from lowbit.cli import output

    argv = sys.argv[1:] if argv is None else argv
    first = argv[0] if argv else ""
    if not argv:
        return output.guard(lambda: sys.stdout.write(WELCOME), as_json=False)
    if first in ("-h", "--help", "help"):
        return output.guard(lambda: sys.stdout.write(_help()), as_json=False)
    if first in ("-V", "--version"):
        argv = ["version", *argv[1:]]
    return output.guard(lambda: _run(argv[0], argv[1:]), as_json="--json" in argv)


def _run(verb: str, argv: list[str]) -> None:
    from lowbit.cli import options, output

    if verb not in VERBS:
        import difflib

        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean `lowbit {close[0]}`?" if close else f"choose one of {', '.join(VERBS)}"
        raise options.UsageError(f"{verb!r} is not a verb; {hint}")
    if argv and f"{verb} {argv[0]}" in SUBVERBS:
        verb, argv = f"{verb} {argv[0]}", argv[1:]
    module = import_module(f"lowbit.cli.{_MODULES.get(verb, verb)}")
    told = VERBS.get(verb) or SUBVERBS[verb]
    more = [
        f"See also `lowbit {name}`: {text}." for name, text in SUBVERBS.items() if name.startswith(f"{verb} ")
    ]
    about = " ".join([f"{told[0].upper()}{told[1:]}.", *more])
    parser = options.Parser(prog=f"lowbit {verb}", description=about)
    module.configure(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout and nothing else"
    )
    args = parser.parse_intermixed_args(argv)  # options may stand between the positional arguments
    if args.json:
        with output.stdout_reserved() as stdout:
            result = module.execute(args)
            output.write_json(result, stdout)
    else:
        module.show(module.execute(args), args)


def _order(entry: tuple[str, str]) -> tuple[int, str]:
    """Verbs in the order above, each with its two-word ones behind it."""
    return list(VERBS).index(entry[0].split()[0]), entry[0]


def _help() -> str:
    lines = [f"  {verb:<15}{text}" for verb, text in sorted({**VERBS, **SUBVERBS}.items(), key=_order)]
    return "usage: lowbit VERB ...\n\n" + "\n".join(lines) + "\n\n`lowbit VERB --help` shows the options.\n"
