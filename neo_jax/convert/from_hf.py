"""Converts a published checkpoint (safetensors) to our layout (Orbax), a few pieces at a time."""

import argparse
import sys

from neo_jax.command_line import run_command
from neo_jax.convert import options
from neo_jax.weights.check import check_values
from neo_jax.weights.checkpoint import num_bytes, write_checkpoint
from neo_jax.weights.directory import copy_side_files
from neo_jax.weights.published import open_published, stored_dtype

EXAMPLE = "NEO1_5-2B-SFT neo-2b"


def main(argv: list[str] | None = None, prog: str = "python -m convert.from_hf") -> int:
    parser = options.parser(prog, __doc__, EXAMPLE)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as stored")
    parser.add_argument(
        "--mesh",
        type=options.mesh_shape,
        default=(1, 1, 1),
        help="data x fsdp x tensor, as in 1x8x1: store arrays in pieces as this mesh splits them "
        "(any mesh can read them)",
    )
    parser.add_argument("--check", action="store_true", help="verify SRC and write nothing")
    return options.convert(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    c, tensors = open_published(args.source)
    if args.check:
        with options.progress(sum(tensor.num_bytes for tensor in tensors.values()), "check") as bar:
            table = check_values(c, tensors, bar.update)
        print(table)
        return
    dtype = args.dtype or stored_dtype(tensors)
    with options.progress(num_bytes(c, dtype), "convert") as bar:
        write_checkpoint(
            args.target,
            c,
            tensors,
            dtype,
            mesh_shape=args.mesh,
            fill=lambda directory: copy_side_files(args.source, directory),
            overwrite=args.overwrite,
            log=options.log,
            on_bytes_written=bar.update,
        )
    print(f"wrote {args.target}")


if __name__ == "__main__":
    sys.exit(run_command("convert.from_hf", main))
