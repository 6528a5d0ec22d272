"""Command-line options that several verbs share."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, NoReturn

from lowbit.errors import LowbitError

if TYPE_CHECKING:
    from lowbit.engine import LanguageModel, SamplingParameters

MODEL_HELP = "a directory, a .gguf file, a hub id (owner/name), or smollm2-135m"


class UsageError(LowbitError):
    """A command line that cannot be understood."""


class _Formatter(argparse.HelpFormatter):
    """With the width given, argparse imports no shutil: half a megabyte for every command."""

    def __init__(self, prog: str) -> None:
        try:
            columns = int(os.environ.get("COLUMNS", 0)) or os.get_terminal_size().columns
        except (OSError, ValueError):
            columns = 80
        super().__init__(prog, width=max(columns, 20) - 2)


class Parser(argparse.ArgumentParser):
    """Errors are raised, so that they are shown in one line, or as JSON; no abbreviated options."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=_Formatter)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog.removeprefix('lowbit ')}: {message}; see `{self.prog} --help`")


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)


def add_runtime(parser: argparse.ArgumentParser, context_help: str) -> None:
    parser.add_argument("--threads", type=positive, metavar="N", help="default: what the machine allows")
    parser.add_argument("--context", type=positive, metavar="N", help=context_help)
    parser.add_argument(
        "--activations",
        choices=["int8", "int16"],
        help="precision of the inputs of matrix products; int16 is slower and exacter (default: what the "
        "model was quantized for, else int8)",
    )
    parser.add_argument(
        "--kv-bits",
        type=int,
        choices=[2, 4, 8, 16],
        metavar="N",
        help="of keys and values: 2, 4, 8 or 16 (default: what the model was quantized for, else 8 with int8 "
        "activations, 16 with int16)",
    )


def load_model(args: argparse.Namespace) -> LanguageModel:
    """The model of `add_model`, as the options of `add_runtime` say."""
    from lowbit.cli.pull import locate
    from lowbit.engine import load

    return load(
        locate(args.model),
        activations=args.activations,
        context=args.context,
        threads=args.threads,
        kv_bits=args.kv_bits,
    )


def add_sampling(parser: argparse.ArgumentParser, temperature: float, max_tokens: int) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "-n",
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help="new tokens (default %(default)s)",
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help="0 is greedy (default %(default)s)",
    )
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="keep the K likeliest; 0: all")
    group.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="keep probability mass P; 1: all"
    )
    group.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="keep P times the likeliest; 0: all"
    )
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="1 is off")
    group.add_argument("--presence-penalty", type=float, default=0.0, metavar="R", help="0 is off")
    group.add_argument("--frequency-penalty", type=float, default=0.0, metavar="R", help="0 is off")
    group.add_argument(
        "--seed", type=int, metavar="N", help="repeat an answer (default: a new one, reported)"
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be given again"
    )
    group.add_argument(
        "--logprobs", type=int, metavar="N", help="report N likeliest tokens of each step (--json)"
    )


def sampling_parameters(args: argparse.Namespace) -> SamplingParameters:
    from lowbit.engine.parameters import SamplingParameters, random_seed

    return SamplingParameters(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        presence_penalty=args.presence_penalty,
        frequency_penalty=args.frequency_penalty,
        seed=random_seed() if args.seed is None else args.seed,
        stop=tuple(args.stop),
        logprobs=args.logprobs,
    )
