"""Options of every command that loads a model."""

import argparse
from typing import Any


def add_model_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    about = "a checkpoint directory, as published or converted"
    parser.add_argument("--model", required=required, metavar="DIR", help=about)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--weights", choices=("int8",), help="half the memory of bfloat16")


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--slots", type=int, help="requests that run at the same time; default: from memory")
    add("--max-length", type=int, help="tokens of a prompt and its answer; default: what fits")
    add("--pool-tokens", type=int, help="tokens of all running requests; default: what fits")
    add("--kv-dtype", choices=("bfloat16", "float32", "int8"))


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `Engine`."""
    return {name: getattr(args, name) for name in _ENGINE}


_ENGINE = ("slots", "max_length", "pool_tokens", "kv_dtype")
