"""Time and memory of loading a checkpoint and answering about one image.

python -m benchmarks.ask /tmp/neo-2b photo.jpg
"""

import argparse
import resource
import sys
import time
from pathlib import Path

import jax

import neo_jax
from neo_jax import Request, Sampling


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--question", default="What is in this image?")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    report("start", memory_gb=peak_memory())
    start = time.perf_counter()
    neo = neo_jax.load(args.model, dtype=args.dtype)
    jax.block_until_ready(neo.params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(neo.params))
    seconds = time.perf_counter() - start
    report("load", seconds=seconds, parameters_gb=size / 1e9, memory_gb=peak_memory())
    sampling = Sampling(max_new_tokens=args.max_new_tokens)
    request = Request(args.question, [args.image], sampling=sampling)
    engine = neo.engine(slots=1, max_length=1024, reuse_prefixes=False)
    for name in ("first (compiles)", "second"):
        start = time.perf_counter()
        handle = engine.submit(request)
        result = handle.result()
        times = [at - start for at in handle.token_times]
        if result.error:
            print(result.error, file=sys.stderr)
            return 2
        report(
            name,
            prompt_tokens=result.usage["prompt_tokens"],
            seconds_to_first_token=times[0],
            # the first step is compiled between the first two tokens
            seconds_per_token=(times[-1] - times[1]) / max(1, len(times) - 2),
            memory_gb=peak_memory(),
        )
    return 0


def report(name: str, **numbers: float) -> None:
    print(f"{name:20}", *(f"{key}={value:.4g}" for key, value in numbers.items()), flush=True)


def peak_memory() -> float:
    """GB that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    sys.exit(main())
