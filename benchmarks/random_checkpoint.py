"""Writes a published checkpoint directory with random weights, to test sizes and speeds.

python -m benchmarks.random_checkpoint /tmp/neo-2b --size 2b
"""

import argparse
import dataclasses
import json
import shutil
import sys
import zlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from neo_jax.configs.models import NEO_OV_2B, NEO_OV_9B, TINY
from neo_jax.model_config import QK_LAYOUTS, ModelConfig
from neo_jax.weights.mapping import expected_tensors
from neo_jax.weights.tensor_files import DTYPE_NAMES
from neo_jax.weights.write import write_tensors

SIZES = {"2b": NEO_OV_2B, "9b": NEO_OV_9B, "tiny": TINY}

# Qwen3's added tokens and NEO's after them, in the order of their ids.
ADDED_TOKENS = """
<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|>
<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|>
<|image_pad|> <|video_pad|> <tool_call> </tool_call> <|fim_prefix|> <|fim_middle|>
<|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> <tool_response> </tool_response>
<think> </think> <IMG_CONTEXT> <img> </img> <quad> </quad> <ref> </ref> <box> </box>
<|action_start|> <|action_end|> <|plugin|> <|interpreter|>
""".split()  # noqa: SIM905  (a list of one per line is no easier to read)
PLAIN_TOKENS = {"<tool_call>", "</tool_call>", "<think>", "</think>"}  # not special: they are shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size", choices=SIZES, default="2b")
    parser.add_argument("--layout", choices=QK_LAYOUTS, default="expanded")
    parser.add_argument("--tied", action="store_true", help="leave the head out")
    parser.add_argument("--dtype", choices=("F32", "BF16"), default="BF16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    c = dataclasses.replace(
        SIZES[args.size], qk_layout=args.layout, tie_word_embeddings=args.tied, dtype="bfloat16"
    )
    if args.directory.exists():
        if not args.overwrite:
            print(f"{args.directory} exists; --overwrite replaces it", file=sys.stderr)
            return 2
        shutil.rmtree(args.directory)
    write_checkpoint(args.directory, c, dtype=args.dtype, seed=args.seed)
    print(f"wrote {args.directory}")
    return 0


def write_checkpoint(
    directory: Path,
    c: ModelConfig,
    *,
    dtype: str = "BF16",
    seed: int = 0,
    shard_size: int = 5 * 10**9,
) -> None:
    """Writes weights ~ N(0, 0.02), norms around 1, and a byte-level tokenizer without merges."""
    directory.mkdir(parents=True)
    shapes = expected_tensors(c)

    def sample(key: str) -> np.ndarray:
        rng = np.random.default_rng([seed, zlib.crc32(key.encode())])
        values = rng.standard_normal(shapes[key], np.float32) * np.float32(0.02)
        return (values + ("norm" in key)).astype(jnp.dtype(DTYPE_NAMES[dtype]))

    write_tensors(directory, shapes, dtype, lambda key: [lambda: sample(key)], shard_size)
    (directory / "config.json").write_text(json.dumps(c.to_hf(DTYPE_NAMES[dtype]), indent=2))
    write_tokenizer(directory, c.vocab_size)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Writes a tokenizer of single bytes (slow format), with NEO's ids if there is room."""
    base = 151643 if vocab_size > 151681 else 256
    vocab = {character: number for number, character in enumerate(_byte_characters())}
    vocab |= {f"<unused_{number}>": number for number in range(256, base)}
    added = {token: base + number for number, token in enumerate(ADDED_TOKENS)}
    decoder = {
        number: {"content": token, "special": token not in PLAIN_TOKENS}
        for token, number in added.items()
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": decoder,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131072,
    }
    for name, content in (
        ("vocab.json", vocab),
        ("added_tokens.json", added),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    ):
        (directory / name).write_text(json.dumps(content))
    (directory / "merges.txt").write_text("#version: 0.2\n")


def _byte_characters() -> list[str]:
    """The printable characters that stand for the bytes 0..255 in byte-level BPE."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    characters = {byte: chr(byte) for byte in shown}
    characters |= {byte: chr(256 + number) for number, byte in enumerate(hidden)}
    return [characters[byte] for byte in range(256)]


if __name__ == "__main__":
    sys.exit(main())
