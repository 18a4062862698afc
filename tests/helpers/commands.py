"""The commands as functions of their arguments; each returns the exit code."""

import functools
from collections.abc import Sequence

from neo_jax.cli import main as neo_ov


def run(name: str, arguments: Sequence[object]) -> int:
    return neo_ov.main([*name.split(), *map(str, arguments)])


from_hf = functools.partial(run, "convert from-hf")
to_hf = functools.partial(run, "convert to-hf")
from_qwen3 = functools.partial(run, "convert from-qwen3")
check_data = functools.partial(run, "data")
plan = functools.partial(run, "plan")
train = functools.partial(run, "train")
