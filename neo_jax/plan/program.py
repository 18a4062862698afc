"""Compiles programs of this package for a slice: memory, warnings, the final text."""

import dataclasses
import math
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from neo_jax.batch import PARTITIONS, RANK
from neo_jax.errors import InputError
from neo_jax.model.neo import abstract_params
from neo_jax.model_config import PATCH_CHANNELS, ModelConfig
from neo_jax.plan.topology import capture_stderr
from neo_jax.train import param_paths
from neo_jax.train.step import first_state, make_merge_params, make_step
from neo_jax.train.train_config import Config

_REMATERIALIZED = "Involuntary full rematerialization"
# Messages of several compilers: "... exceeds available HBM (15.75G)", "Used 20.94G of 15.75G hbm".
_SIZE = r"([\d.]+)\s*([KMGT])i?B?"
_NO_ROOM = ("CompileTimeHbmOom", "exceeds available", "RESOURCE_EXHAUSTED", "Ran out of memory")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device. `alias`: results that take the place of donated arguments."""

    arguments: int
    outputs: int
    alias: int
    temporaries: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs - self.alias + self.temporaries


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's output for one program."""

    memory: Memory | None  # None if the program does not fit
    text: str  # of the final program; "" if there is none, or the compiler cannot print it
    seconds: float  # of lowering and compiling
    rematerialized: tuple[str, ...]  # arrays that SPMD partitioning gathers whole, involuntarily
    problem: str = ""  # why the program does not fit


def compiled(lower: Callable[[], jax.stages.Lowered], options: dict[str, str]) -> Compiled:
    """Lowers and compiles a program for the devices of its arguments' shardings.

    Raises:
      InputError: when the compiler refuses an option.
    """
    begin = time.perf_counter()
    with capture_stderr() as lines:
        try:
            program, problem = lower().compile(compiler_options=options or None), ""
        except InputError:
            raise
        except Exception as error:  # of any type; running out of memory is one of them
            program, problem = None, _reason(str(error))
            if isinstance(error, jax.errors.JaxRuntimeError) and not problem:
                raise InputError(f"the TPU compiler: {str(error).strip()[:400]}") from error
            if not problem:
                raise
    warnings = tuple(
        line.split(_REMATERIALIZED)[1].strip(" .:") for line in lines if _REMATERIALIZED in line
    )
    seconds = time.perf_counter() - begin
    if program is None:
        return Compiled(None, "", seconds, warnings, problem)
    sizes = program.memory_analysis()
    memory = Memory(
        sizes.argument_size_in_bytes,
        sizes.output_size_in_bytes,
        sizes.alias_size_in_bytes,
        sizes.temp_size_in_bytes,
    )
    try:
        text = program.as_text()
    except jax.errors.JaxRuntimeError:  # some programs cannot be printed
        text = ""
    return Compiled(memory, text, seconds, warnings)


def _reason(error: str) -> str:
    """The part of a compiler's error that is about memory; "" for other errors."""
    if not any(words in error for words in _NO_ROOM):
        return ""
    for words in (
        rf"[^.\n]*\({_SIZE}\) exceeds available[^.\n]*\({_SIZE}\)",
        rf"Used {_SIZE} of {_SIZE}",
    ):
        if found := re.search(words, error):
            reason = re.sub(r"\s+", " ", found[0]).strip()
            return reason.removeprefix("RESOURCE_EXHAUSTED: ").split("HBM, ", 1)[-1]
    return re.sub(r"\s+", " ", error)[:300]


def place(tree, mesh: Mesh):
    """Turns shapes that were traced under a mesh into abstract arguments on its devices."""

    def one(leaf):
        partition = leaf.sharding.spec if leaf.sharding is not None else P()
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, partition))

    return jax.tree.map(one, tree)


def device_bytes(tree) -> int:
    """Bytes of one device's shards of abstract arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def training_arguments(c: Config, model: ModelConfig, mesh: Mesh) -> tuple[dict, dict]:
    """The abstract state and batch of the train step. Call it under the mesh.

    Raises:
      InputError: when the mesh does not divide the parameters, the rows or their columns.
    """
    c.check_mesh(mesh)
    return training_state(c, model, mesh), training_batch(c, mesh)


def training_state(c: Config, model: ModelConfig, mesh: Mesh) -> dict:
    """The abstract state: parameters and optimizer. Call it under the mesh.

    Raises:
      InputError: when the mesh does not divide the parameters.
    """
    params = abstract_params(model, mesh)
    paths = param_paths.matching(params, c.lora.targets if c.lora.rank else c.trainable)

    state = jax.eval_shape(lambda params: first_state(c, model, params, paths), params)
    return place(state, mesh)


def training_batch(c: Config, mesh: Mesh) -> dict:
    """The abstract batch, [M, rows, ...] for every key of `batch.py`."""
    length, patches = c.data.length, c.data.num_patches or 4 * c.data.length
    integers, rows = jnp.int32, c.data.rows // c.micro_batches
    shapes = {
        "tokens": ((length,), integers),
        "segments": ((length,), integers),
        "thw": ((length, 3), integers),
        "is_image": ((length,), jnp.bool_),
        "patches": ((patches, PATCH_CHANNELS), jnp.uint8),
        "patch_hw": ((patches, 2), integers),
        "targets": ((length,), integers),
        "weights": ((length,), jnp.float32),
    }

    def one(name):
        shape, dtype = shapes[name]
        sharding = NamedSharding(mesh, PARTITIONS[name])
        return jax.ShapeDtypeStruct((c.micro_batches, rows, *shape), dtype, sharding=sharding)

    return {name: one(name) for name in RANK}


def lower_training(c: Config, model: ModelConfig, mesh: Mesh) -> jax.stages.Lowered:
    """Lowers the train step of a run with this config."""
    with jax.set_mesh(mesh):
        state, batch = training_arguments(c, model, mesh)
        step = make_step(model, c.optim, c.steps, c.remat, make_merge_params(c), c.attention)
        return step.lower(state, batch)
