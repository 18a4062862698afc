"""Ask a NEO model about pictures.

python infer.py ask --model DIR --image photo.jpg "What is this?"
"""

import argparse
import sys

import neo_jax


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return args.run(args)
    except neo_jax.InputError as error:
        print(f"infer.py: {error}", file=sys.stderr)
        return 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    ask = commands.add_parser(
        "ask",
        help="one question; the answer streams to the terminal",
        epilog='example: python infer.py ask --model DIR --image photo.jpg "What is this?"',
    )
    ask.set_defaults(run=run_ask)
    ask.add_argument("question", help="may hold an <image> mark where each image belongs")
    ask.add_argument("--model", required=True, metavar="DIR", help="checkpoint as published")
    ask.add_argument("--image", action="append", default=[], metavar="FILE", help="repeatable")
    ask.add_argument("--system", default="", help="system prompt")
    ask.add_argument("--max-new-tokens", type=int, default=512)
    ask.add_argument("--min-pixels", type=int, help="area of the resized image, at least")
    ask.add_argument("--max-pixels", type=int, help="area of the resized image, at most")
    ask.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    return parser.parse_args(argv)


def run_ask(args: argparse.Namespace) -> int:
    neo = neo_jax.load(args.model, dtype=args.dtype)
    pieces = neo.chat(
        args.question,
        args.image,
        system=args.system,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        max_new_tokens=args.max_new_tokens,
        stream=True,
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
