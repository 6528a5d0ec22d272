"""`lowbit serve`: one or several models behind OpenAI's API, with a page."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from lowbit import __version__
from lowbit.cli import options
from lowbit.cli.output import note
from lowbit.cli.pull import locate
from lowbit.errors import RequestError, UnsupportedError


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", metavar="MODEL", nargs="+", help=options.MODEL_HELP)
    parser.add_argument(
        "--name", action="append", default=[], metavar="NAME", help="what clients call a model, in order"
    )
    options.add_runtime(parser, "tokens of one request, prompt and answer (default: as trained)")
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="default %(default)s: this machine only")
    network.add_argument("--port", type=int, default=8000, help="default %(default)s; 0: any free one")
    network.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="ask clients for it; may be given again: each is a tenant (or LOWBIT_API_KEYS, with commas)",
    )
    network.add_argument("--api-key-file", type=Path, metavar="FILE", help="one key per line")
    network.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificate chain (PEM): https")
    network.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key (PEM)")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--kv-gb", type=float, metavar="GB", help="memory for keys and values of each model")
    engine.add_argument(
        "--max-sequences",
        type=options.positive,
        default=64,
        metavar="N",
        help="requests at once, default 64",
    )
    engine.add_argument(
        "--max-queued-tokens",
        type=options.positive,
        default=1 << 18,
        metavar="N",
        help="prompt tokens that may wait; beyond, clients get 429 (default 262144)",
    )
    engine.add_argument("--target-ms", type=float, metavar="MS", help="time between tokens to keep to")
    engine.add_argument(
        "--stream-ms",
        type=float,
        default=15.0,
        metavar="MS",
        help="tokens of faster steps are sent together, default 15; 0: each step",
    )
    engine.add_argument("--no-prefix-cache", action="store_true", help="compute every prompt anew")
    engine.add_argument("--speculation", choices=["none", "ngram"], default="ngram", help="default ngram")
    engine.add_argument("--draft", metavar="MODEL", help="a smaller model that guesses, in place of ngram")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-requests", type=options.positive, default=256, metavar="N", help="default 256")
    limits.add_argument("--max-body-mb", type=options.positive, default=16, metavar="MB", help="default 16")
    limits.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of an answer, default 600")
    limits.add_argument(
        "--drain", type=float, default=30.0, metavar="S", help="for answers that run at the end"
    )


def execute(args: argparse.Namespace) -> dict[str, Any]:
    try:
        from lowbit.server.limits import Limits
        from lowbit.server.serve import Options, serve
    except ModuleNotFoundError as error:
        raise UnsupportedError(
            f"serve: the package {error.name} is not installed; pip install 'lowbit[serve]'"
        ) from error
    names = _names(args)
    limits = Limits(
        body_bytes=args.max_body_mb << 20,
        requests=args.max_requests,
        request_seconds=args.timeout,
        drain_seconds=args.drain,
    )
    if args.tls_key and not args.tls_cert:
        raise RequestError("serve: --tls-key without --tls-cert; give both")
    serve(
        Options(
            models=[(name, locate(model)) for name, model in zip(names, args.models)],
            host=args.host,
            port=args.port,
            load={
                "activations": args.activations,
                "context": args.context,
                "threads": args.threads,
                "kv_bits": args.kv_bits,
            },
            engine={
                "kv_bytes": _kv_bytes(args),
                "max_sequences": args.max_sequences,
                "max_queued_tokens": args.max_queued_tokens,
                "target_seconds_between_tokens": None if args.target_ms is None else args.target_ms / 1e3,
                "prefix_cache": not args.no_prefix_cache,
                "speculation": "ngram" if args.speculation == "ngram" and not args.draft else None,
            },
            draft=None if args.draft is None else locate(args.draft),
            interval=args.stream_ms / 1e3,
            keys=_keys(args),
            tls=(args.tls_cert, args.tls_key) if args.tls_cert else None,
            limits=limits,
            version=__version__,
        ),
        note,
    )
    return {"models": names}


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    """Everything was said while serving."""


def _kv_bytes(args: argparse.Namespace) -> int | None:
    """As given; else, where several models share the free memory, the share of each."""
    if args.kv_gb is not None:
        return int(args.kv_gb * 1e9)
    if len(args.models) == 1:
        return None
    from lowbit.engine.config import FREE_SHARE, free_memory_bytes

    free = free_memory_bytes()
    return None if free is None else int(free * FREE_SHARE / len(args.models))


def _names(args: argparse.Namespace) -> list[str]:
    """As given; else the last part of each path or hub id."""
    if len(args.name) > len(args.models):
        raise RequestError(f"serve: {len(args.name)} names for {len(args.models)} models; leave some out")
    names = [*args.name, *(Path(model).stem or model for model in args.models[len(args.name) :])]
    if len(set(names)) < len(names):
        raise RequestError(f"serve: two models are called alike: {', '.join(names)}; give each a --name")
    return names


def _keys(args: argparse.Namespace) -> list[str]:
    keys = [*args.api_key, *os.environ.get("LOWBIT_API_KEYS", "").split(",")]
    if args.api_key_file is not None:
        try:
            keys += args.api_key_file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise RequestError(f"serve: {args.api_key_file} is not UTF-8; write one key per line") from error
    return [key.strip() for key in keys if key.strip()]
