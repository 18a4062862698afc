"""Time and memory of loading a checkpoint and answering about one picture.

python -m benchmarks.ask /tmp/neo-2b photo.jpg
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import jax
import numpy as np

import neo_jax
from neo_jax.infer import generate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--question", default="What is in this picture?")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    report("start", memory_gb=peak_memory())
    start = time.perf_counter()
    neo = neo_jax.load(args.model, dtype=args.dtype)
    jax.block_until_ready(neo.params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(neo.params))
    report("load", seconds=since(start), parameters_gb=size / 1e9, memory_gb=peak_memory())
    prompt = neo_jax.data.chat.chat_prompt(args.question, num_images=1)
    example = neo._prompt_example(prompt, [args.image], None, None)
    for name in ("first (compiles)", "second"):
        steps = generate.greedy(
            neo.config, neo.params, neo.mesh, example, args.max_new_tokens, stop_id=-1
        )
        start = time.perf_counter()
        next(steps)
        prefill = since(start)
        next(steps)  # the first step compiles
        start, rest = time.perf_counter(), [token for token, _ in steps]
        report(
            name,
            prompt_tokens=len(example.tokens),
            visual_tokens=int(np.sum(example.is_image)),
            prefill_seconds=prefill,
            seconds_per_token=since(start) / len(rest),
            memory_gb=peak_memory(),
        )
    return 0


def report(name: str, **numbers: float) -> None:
    print(f"{name:20}", *(f"{key}={value:.4g}" for key, value in numbers.items()), flush=True)


def since(start: float) -> float:
    return time.perf_counter() - start


def peak_memory() -> float:
    """GB that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    sys.exit(main())
