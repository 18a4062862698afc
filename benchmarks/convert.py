"""Measures conversion in both directions: peak memory, and wall time against copying the files.

python -m benchmarks.convert --size 2b --directory /tmp/convert
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

# Runs in a process of its own, so that peak memory is the conversion's.
_CONVERT = """
import resource, sys
import jax, neo_jax
jax.devices()
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from neo_jax.convert import from_hf, to_hf
code = {"from_hf": from_hf, "to_hf": to_hf}[sys.argv[1]].main(sys.argv[2:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"MEMORY {base / 1e6} {peak / 1e6}")
sys.exit(code)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=("tiny", "2b", "9b"), default="2b")
    parser.add_argument("--directory", type=Path, required=True, help="with room for three copies")
    parser.add_argument("--pairs", type=int, default=1)
    args = parser.parse_args()
    source = args.directory / f"{args.size}-hf"
    if not source.exists():
        command = [sys.executable, "-m", "benchmarks.random_checkpoint", source]
        subprocess.run([*command, "--size", args.size], check=True)
    ours, back, copy = (args.directory / name for name in ("orbax", "back", "copy"))
    size = sum(path.stat().st_size for path in source.iterdir())
    print(f"{args.size}: {size / 1e9:.2f} GB")
    for _ in range(args.pairs):
        for name, start, end in (("from_hf", source, ours), ("to_hf", ours, back)):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.rmtree(end, ignore_errors=True)
            copying = timed(lambda: (shutil.copytree(source, copy), os.sync()))
            shutil.rmtree(copy)
            out = subprocess.PIPE
            command = [sys.executable, "-c", _CONVERT, name, start, end]
            start_time = time.perf_counter()
            done = subprocess.run(command, check=True, stdout=out, stderr=out, text=True)
            os.sync()
            seconds = time.perf_counter() - start_time
            base, peak = map(float, done.stdout.split("MEMORY")[1].split())
            print(
                f"{name:8} {seconds:6.1f} s, copy and sync {copying:6.1f} s, "
                f"ratio {seconds / copying:.2f}; peak {peak:.2f} GB, "
                f"{peak - base:.2f} GB above interpreter and JAX",
                flush=True,
            )
    return 0


def timed(action) -> float:
    """Seconds that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
