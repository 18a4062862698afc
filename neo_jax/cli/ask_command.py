"""One question; the answer streams to the terminal."""

import neo_jax
from neo_jax.cli.model_options import add_model_options
from neo_jax.command_line import make_parser

EPILOG = 'example: %(prog)s --model DIR --image photo.jpg "What is this?"'


def main(argv: list[str], prog: str) -> int:
    parser = make_parser(prog, __doc__, EPILOG)
    add = parser.add_argument
    add("question", help="may hold an <image> mark where each image belongs")
    add("--image", action="append", default=[], metavar="FILE", help="repeatable")
    add("--video", metavar="PATH", help="a video file, or a folder of images")
    add("--fps", type=float, help="frames of the video per second; default 1")
    add("--num-frames", type=int, help="frames of the video, instead of --fps")
    add("--system", default="", help="system prompt")
    add("--max-new-tokens", type=int, default=512)
    add("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    add("--top-k", type=int, default=0)
    add("--top-p", type=float, default=1.0)
    add("--repetition-penalty", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--min-pixels", type=int, help="area of the resized image, at least")
    add("--max-pixels", type=int, help="area of the resized image, at most")
    add_model_options(parser)
    args = parser.parse_args(argv)

    neo = neo_jax.load(args.model, dtype=args.dtype, weights=args.weights)
    video_options = {"fps": args.fps, "num_frames": args.num_frames}
    pieces = neo.chat(
        args.question,
        args.image,
        video=args.video,
        video_options={name: value for name, value in video_options.items() if value is not None},
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
