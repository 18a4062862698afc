"""Converts our checkpoint, or a training run's newest step, to published safetensors."""

import argparse
import functools
import sys

from neo_jax.command_line import byte_size, run_command
from neo_jax.convert import options
from neo_jax.errors import InputError
from neo_jax.weights.checkpoint import Checkpoint, find_checkpoint, num_bytes, open_params
from neo_jax.weights.export import save_hf, write_published
from neo_jax.weights.load import load_params

EXAMPLE = "neo-2b NEO-2B-mine --shard-size 5GB"


def main(argv: list[str] | None = None, prog: str = "python -m convert.to_hf") -> int:
    parser = options.parser(prog, __doc__, EXAMPLE)
    parser.add_argument(
        "--dtype",
        choices=("bf16", "bfloat16", "f32", "float32"),
        help="of the written tensors; default: as stored, or of a merged LoRA run bfloat16",
    )
    parser.add_argument(
        "--merge-lora", action="store_true", help="merge a LoRA run's factors into its base model"
    )
    parser.add_argument(
        "--shard-size", type=byte_size, default="5GB", metavar="SIZE", help="of a file; default 5GB"
    )
    return options.convert(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    checkpoint = find_checkpoint(args.source)
    if checkpoint is None:
        raise InputError(f"{args.source}: no checkpoint of ours there (a directory with params)")
    if args.merge_lora and not checkpoint.lora:
        raise InputError(f"{args.source}: not a LoRA run; export it without --merge-lora")
    if checkpoint.lora and not args.merge_lora:
        raise InputError(f"{args.source}: a LoRA run: add --merge-lora to merge it into its base")
    c, dtype = checkpoint.config, {"bf16": "bfloat16", "f32": "float32"}.get(args.dtype, args.dtype)
    settings = {
        "shard_size": args.shard_size,
        "side_files": checkpoint.directory,
        "overwrite": args.overwrite,
        "log": options.log,
    }
    if checkpoint.lora:  # in memory, unlike other exports, since matrices change
        dtype = dtype or "bfloat16"
        _, params = load_params(args.source, "float32", None)
        with options.progress(num_bytes(c, dtype), "export") as bar:
            save_hf(params, c, args.target, dtype=dtype, on_bytes_written=bar.update, **settings)
    else:
        stores = open_params(checkpoint)
        dtype = dtype or stores["embed",].dtype.name
        with options.progress(num_bytes(c, dtype), "export") as bar:
            read = functools.partial(_read, checkpoint, stores)
            write_published(args.target, c, read, dtype, on_bytes_written=bar.update, **settings)
    print(f"wrote {args.target}")


def _read(checkpoint: Checkpoint, stores, path, index):
    """Reads a part of a parameter; InputError names a damaged one."""
    try:
        return stores[path][index].read().result()
    except ValueError as error:
        raise InputError(f"{checkpoint.params}: {'/'.join(path)} is damaged: {error}") from error


if __name__ == "__main__":
    sys.exit(run_command("convert.to_hf", main))
