"""Grows a NEO from a plain Qwen3 checkpoint (safetensors), in our layout (Orbax)."""

import argparse
import json
import sys
from pathlib import Path

from neo_jax.command_line import run_command
from neo_jax.convert import options
from neo_jax.data.tokenizer import add_neo_tokens
from neo_jax.errors import InputError
from neo_jax.weights.checkpoint import num_bytes, write_checkpoint
from neo_jax.weights.directory import copy_side_files, read_json
from neo_jax.weights.grow import grown_tensors, qwen3_config
from neo_jax.weights.published import open_published, stored_dtype
from neo_jax.weights.tensor_files import open_tensors

EXAMPLE = "Qwen3-1.7B neo-2b-start --pre-buffer 12"


def main(argv: list[str] | None = None, prog: str = "python -m convert.from_qwen3") -> int:
    parser = options.parser(prog, __doc__, EXAMPLE)
    parser.add_argument("--pre-buffer", type=int, required=True, help="layers of the Pre-Buffer")
    parser.add_argument(
        "--pre-buffer-from",
        type=Path,
        metavar="NEO_DIR",
        help="take Pre-Buffer and patch embedding from this published NEO; default: random ones",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random tensors")
    parser.add_argument("--vocab-size", type=int, help="rows of the embedding, at least SRC's")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as stored")
    return options.convert(run, parser.parse_args(argv))


def run(args: argparse.Namespace) -> None:
    if args.pre_buffer < 0:
        raise InputError(f"--pre-buffer {args.pre_buffer}: give 0 or more layers")
    hf, qwen3 = read_json(args.source / "config.json"), open_tensors(args.source)
    neo_c, neo = open_published(args.pre_buffer_from) if args.pre_buffer_from else (None, None)
    if neo and neo_c.num_pre_buffer_layers != args.pre_buffer:
        raise InputError(
            f"{args.pre_buffer_from} has a Pre-Buffer of {neo_c.num_pre_buffer_layers} layers, "
            f"--pre-buffer asks for {args.pre_buffer}"
        )
    if "lm_head.weight" not in qwen3 and hf.get("tie_word_embeddings") is False:
        raise InputError(f"{args.source}: lm_head.weight is missing, though the model is untied")
    rows = (
        qwen3["model.embed_tokens.weight"].shape[0] if "model.embed_tokens.weight" in qwen3 else 0
    )
    c = qwen3_config(
        hf,
        args.pre_buffer,
        vocab_size=args.vocab_size or rows,
        tied="lm_head.weight" not in qwen3 or bool(hf.get("tie_word_embeddings")),
        vision_hidden_size=neo_c.vision_hidden_size if neo else 1024,
    )
    tensors = grown_tensors(qwen3, c, seed=args.seed, neo=neo)
    dtype = args.dtype or stored_dtype(qwen3)

    def fill(directory: Path) -> None:
        copy_side_files(args.source, directory)
        (directory / "config.json").write_text(json.dumps(c.to_hf(dtype), indent=2) + "\n")
        if not (directory / "tokenizer.json").exists() and not (directory / "vocab.json").exists():
            options.log(f"{args.source} has no tokenizer: put one into {args.target}")
        elif (ids := add_neo_tokens(directory)) > c.vocab_size:
            raise InputError(
                f"the tokenizer has {ids} ids, the embedding {c.vocab_size} rows: "
                f"give --vocab-size {ids} or more"
            )

    with options.progress(num_bytes(c, dtype), "grow") as bar:
        write_checkpoint(
            args.target,
            c,
            tensors,
            dtype,
            fill=fill,
            overwrite=args.overwrite,
            log=options.log,
            on_bytes_written=bar.update,
        )
    print(f"wrote {args.target}")


if __name__ == "__main__":
    sys.exit(run_command("convert.from_qwen3", main))
