"""Ask a NEO model about pictures.

python infer.py ask --model DIR --image photo.jpg "What is this?"
python infer.py batch --model DIR in.jsonl out.jsonl
python infer.py eval --model DIR --bench mmstar,docvqa --data DATA --out RUN
"""

import argparse
import os
import sys
from pathlib import Path

from tqdm import tqdm

import neo_jax
from neo_jax.eval import command
from neo_jax.infer import batch


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return args.run(args)
    except neo_jax.InputError as error:
        print(f"infer.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("infer.py: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the answer has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


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
    ask.add_argument("--image", action="append", default=[], metavar="FILE", help="repeatable")
    ask.add_argument("--video", metavar="PATH", help="a video file, or a folder of pictures")
    ask.add_argument("--fps", type=float, help="frames of the video per second; default 1")
    ask.add_argument("--num-frames", type=int, help="frames of the video, instead of --fps")
    ask.add_argument("--system", default="", help="system prompt")
    ask.add_argument("--max-new-tokens", type=int, default=512)
    ask.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    ask.add_argument("--top-k", type=int, default=0)
    ask.add_argument("--top-p", type=float, default=1.0)
    ask.add_argument("--repetition-penalty", type=float, default=1.0)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--min-pixels", type=int, help="area of the resized image, at least")
    ask.add_argument("--max-pixels", type=int, help="area of the resized image, at most")
    add_model_options(ask)
    many = commands.add_parser(
        "batch",
        help="a file of requests to a file of answers; run again to go on after a stop",
        epilog="example: python infer.py batch --model DIR in.jsonl out.jsonl",
    )
    many.set_defaults(run=run_batch)
    many.add_argument("source", metavar="IN.jsonl", help="a request per line; see infer/batch.py")
    many.add_argument("target", metavar="OUT.jsonl", help="an answer per line, as they finish")
    many.add_argument("--slots", type=int, default=8, help="requests that run at once")
    many.add_argument("--max-length", type=int, help="tokens of a prompt and its answer")
    many.add_argument("--retry-errors", action="store_true", help="ask again where it failed")
    many.add_argument("--system", help="system prompt of requests that have none")
    many.add_argument("--max-new-tokens", type=int, help="of requests that do not say; 512")
    many.add_argument("--min-pixels", type=int, help="area of a resized image, at least")
    many.add_argument("--max-pixels", type=int, help="area of a resized image, at most")
    many.add_argument("--kv-dtype", choices=("bfloat16", "float32", "int8"))
    add_model_options(many)
    command.add(commands, add_model_options)
    return parser.parse_args(argv)


def add_model_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    about = "a checkpoint of either kind"
    parser.add_argument("--model", required=required, metavar="DIR", help=about)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--weights", choices=("int8",), help="half the memory of bfloat16")


def run_ask(args: argparse.Namespace) -> int:
    neo = neo_jax.load(args.model, dtype=args.dtype, weights=args.weights)
    chosen = {"fps": args.fps, "num_frames": args.num_frames}
    pieces = neo.chat(
        args.question,
        args.image,
        video=args.video,
        video_options={name: value for name, value in chosen.items() if value is not None},
        system=args.system,
        min_pixels=args.min_pixels,
        max_pixels=args.max_pixels,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stream=True,
    )
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
    return 0


def run_batch(args: argparse.Namespace) -> int:
    def serve(requests):
        # Loaded only once both files are checked, and not if nothing is left to ask.
        neo = neo_jax.load(args.model, dtype=args.dtype, weights=args.weights)
        options = {"slots": args.slots, "max_length": args.max_length, "kv_dtype": args.kv_dtype}
        yield from neo.serve(requests, **options)

    def show(counts):
        bar.total, bar.n = counts.total, counts.kept + counts.written
        bar.set_postfix(failed=counts.failed)

    names = ("system", "max_new_tokens", "min_pixels", "max_pixels")
    with tqdm(unit=" answers", mininterval=1) as bar:
        counts = batch.run_batch(
            args.source,
            args.target,
            serve,
            defaults={name: getattr(args, name) for name in names},
            settings={
                "model": str(Path(args.model).resolve()),
                "dtype": args.dtype,
                "weights": args.weights,
                "kv_dtype": args.kv_dtype,
            },
            retry_errors=args.retry_errors,
            on_progress=show,
        )
    if counts.failed:
        print(
            f"infer.py: {counts.failed} of {counts.total} failed, their lines say why; mend them "
            "and run again with --retry-errors",
            file=sys.stderr,
        )
    return 1 if counts.failed else 0


if __name__ == "__main__":
    sys.exit(main())
