"""A cache of compiled programs on disk, so that repeating a plan takes seconds.

An entry is the compiler's output: memory and text. Plans are read from it each time, so a change of
how plans are read needs no compilation. A change of the program always does: an entry's key hashes
the request, the versions of packages, and the source files of which programs are made.
"""

import functools
import gzip
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import jax

from neo_jax.plan.program import Compiled, Memory, compiled

MINUTES = (1.5, 8)  # to compile a train step of a large model on a few cores
_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")
FLAGS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
_ROOT = Path(__file__).parents[1]
# The sources of programs; of plan/, only those that lower them.
_SOURCES = ("*.py", "model/*.py", "kernels/*.py", "train/*.py", "infer/*.py", "plan/program.py",
            "plan/serving.py", "weights/place.py")  # fmt: skip


def compiled_once(
    request: dict,
    lower: Callable[[], jax.stages.Lowered],
    options: dict[str, str],
    *,
    use_cache: bool = True,
) -> tuple[Compiled, bool]:
    """Returns the program of a request, and whether it came from the cache.

    Raises:
      InputError: when the compiler refuses an option.
    """
    name = key(request)
    if use_cache and (found := load(name)):
        return found, True
    print(  # the compiler itself shows no progress
        f"compiling {request['program']} for {request['topology']}: seconds for a small model, "
        f"{MINUTES[0]} to {MINUTES[1]} minutes for a large one",
        file=sys.stderr,
    )
    made = compiled(lower, options)
    store(name, made, request)
    return made, False


def directory() -> Path:
    """The cache's directory: NEO_JAX_PLANS, or neo_jax/plans in the user's cache directory."""
    named = os.environ.get("NEO_JAX_PLANS")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(named) if named else Path(cache) / "neo_jax" / "plans"


def key(request: dict) -> str:
    """A hash of everything that the program depends on."""
    whole = {"request": request, "versions": versions(), "sources": sources()}
    # Flags that the compiler reads from the environment.
    whole |= {name: os.environ[name] for name in FLAGS if os.environ.get(name)}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:24]


def load(name: str) -> Compiled | None:
    """Reads a program; None if it is missing or damaged."""
    try:
        with gzip.open(directory() / f"{name}.json.gz", "rt") as file:
            kept = json.load(file)
    except (OSError, EOFError, ValueError, zlib.error):
        return None
    memory = Memory(**kept["memory"]) if kept["memory"] else None
    rest = {field: value for field, value in kept.items() if field not in ("memory", "request")}
    rest["rematerialized"] = tuple(rest["rematerialized"])
    return Compiled(memory, **rest)


def store(name: str, compiled: Compiled, request: dict) -> None:
    """Writes a program atomically, with its request for people to read."""
    path = directory() / f"{name}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{name}.{os.getpid()}")
    with gzip.open(partial, "wt") as file:
        json.dump({"request": request, **asdict(compiled)}, file, default=str)
    partial.rename(path)


@functools.cache
def sources() -> str:
    """A hash of the source files of which programs are made."""
    digest = hashlib.sha256()
    for pattern in _SOURCES:
        for path in sorted(_ROOT.glob(pattern)):
            digest.update(f"{path.relative_to(_ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions of JAX, of the compiler and of packages that programs depend on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found
