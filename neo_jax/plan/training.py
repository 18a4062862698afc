"""Plans training: the real train step, compiled for a slice with abstract arrays."""

import dataclasses
import math
from types import ModuleType
from typing import Any

import jax
from jax.sharding import Mesh

from neo_jax.errors import InputError
from neo_jax.model_config import ModelConfig
from neo_jax.plan import compile_cache, costs
from neo_jax.plan.attention_cycles import attention
from neo_jax.plan.packing import sample_rows
from neo_jax.plan.program import (
    Compiled,
    device_bytes,
    lower_training,
    training_arguments,
)
from neo_jax.plan.result import GIB, MemoryUse, Plan
from neo_jax.plan.topology import Topology, find_topology
from neo_jax.sharding import describe
from neo_jax.train.train_config import Config
from neo_jax.weights.checkpoint import find_checkpoint
from neo_jax.weights.published import open_published

SAMPLED_ROWS = 64
NO_MODEL = "the config names no model: give start=DIRECTORY, a checkpoint"
UNREADABLE = "the compiler cannot print this program: memory is known, times are not"
# Settings that do not change the program.
_NOT_IN_PROGRAM = ("workdir", "start", "tokenizer", "data", "held_out", "log_every", "eval_every",
                   "eval_batches", "save_every", "keep", "keep_every", "profile", "seed",
                   "init_scale", "mesh", "steps")  # fmt: skip


def plan_training(
    config: Config,
    topology: str,
    *,
    model: ModelConfig | None = None,
    packing: str = "sft",
    name: str = "",
    options: dict[str, str] | None = None,
    with_flags: bool = True,
    use_cache: bool = True,
) -> Plan:
    """Compiles the train step of a config for a slice, and reads memory and time from the program.

    Args:
      config: gives mesh, rows, length, micro_batches and remat.
      topology: such as "v5e:16x16" or "v5e-256".
      model: of a config that starts from a checkpoint; default: `config.model`.
      packing: the kind of data, one of `packing.MIXES`, or `packing.CAUSAL`.
      name: of the config, for the plan's title.
      options: of the compiler.
      with_flags: add the chip's own compiler flags (`chips.py`).
      use_cache: take a compiled program from the cache.

    Returns:
      the plan. If the program does not fit, it has a `problem`.

    Raises:
      InputError: if the compiler is missing or does not know the slice or an option, or if the mesh
        does not divide rows or model.
    """
    model = _with_dtype(model or config.model, config)
    slice_ = find_topology(topology)
    mesh = slice_.mesh(config.mesh)
    with jax.set_mesh(mesh):
        state, batch = training_arguments(config, model, mesh)
    rows = sample_rows(packing, config.data.length, SAMPLED_ROWS)
    all_options = slice_.chip.options(with_flags) | (options or {})
    request = _request(config, model, slice_, mesh, all_options)
    program, is_cached = compile_cache.compiled_once(
        request, lambda: lower_training(config, model, mesh), all_options, use_cache=use_cache
    )
    plan = Plan(
        name=name,
        program="train",
        topology=slice_.name,
        chip=slice_.chip.name,
        devices=mesh.size,
        mesh=describe(mesh),
        settings=_settings(config, packing, all_options),
        memory=_memory(program, state, batch, slice_),
        compile_seconds=program.seconds,
        is_cached=is_cached,
    )
    if program.problem:
        return dataclasses.replace(plan, problem=program.problem, advice=_advice(config))
    if not program.text:
        return dataclasses.replace(plan, warnings=(UNREADABLE,))
    return _with_costs(plan, program, config, model, mesh, slice_, rows)


def _with_dtype(model: ModelConfig | None, config: Config) -> ModelConfig:
    if model is None:
        raise InputError(NO_MODEL)
    return dataclasses.replace(model, dtype=config.dtype)


def _settings(c: Config, packing: str, options: dict[str, str]) -> dict[str, Any]:
    """The settings that a plan shows."""
    return {
        "rows": c.data.rows,
        "length": c.data.length,
        "micro_batches": c.micro_batches,
        "remat": c.remat,
        "packing": packing,
        "compiler": " ".join(f"{name}={value}" for name, value in options.items()) or "as it is",
    }


def _with_costs(plan: Plan, program: Compiled, config, model, mesh: Mesh, slice_, rows) -> Plan:
    """The plan, with the work and times of the program."""
    length, chip = config.data.length, slice_.chip
    per_device = config.data.rows / mesh.size  # rows; less than 1 where devices share a row
    tensor = tensor_size(mesh)
    counted = attention(chip, model, rows, per_device * tensor / config.micro_batches, tensor)
    totals = costs.read(program.text, slice_, mesh, counted.work)
    trainable = () if config.lora.rank else config.trainable
    times = costs.times(totals, chip)
    flops = costs.model_flops(model, trainable, rows) / len(rows) * per_device
    tokens = sum(row.tokens for row in rows) / len(rows)
    keys = sum(row.keys for row in rows) / sum(row.tokens for row in rows)
    ideal = flops / chip.flops
    return dataclasses.replace(
        plan,
        tokens=tokens * per_device,
        model_flops=flops,
        executed_flops=totals.flops,
        hbm_bytes=totals.hbm_bytes,
        times=times,
        mfu=ideal / times.step,
        mfu_compute=ideal / times.compute,
        traffic=costs.traffic(totals),
        all_reduced=sum(costs.all_reduced(totals).values()),
        largest_all_gather=costs.largest_all_gather(totals),
        operations=costs.longest(totals, chip),
        notes={
            "tokens per device with padding": length * per_device,
            "fill of rows": tokens / length,
            "keys that a token sees": keys,
            "attention, fullest row / mean": counted.imbalance,
            "kernel calls": totals.kernel_calls,
            "all-reduced, MB": {
                array: size / 1e6 for array, size in list(costs.all_reduced(totals).items())[:4]
            },
            "loops counted once": sorted(set(totals.unknown_loops)),
            "kernels not counted": sorted(set(totals.unknown_kernels)),
        },
        warnings=tuple(f"gathered whole: {what}" for what in program.rematerialized),
    )


def model_of(config: Config, module: ModuleType) -> ModelConfig:
    """The model of a run: the config's, that of the checkpoint it starts from, or its file's MODEL.

    Raises:
      InputError: if none of them names a model.
    """
    if config.model:
        return config.model
    if config.start:
        checkpoint = find_checkpoint(config.start)
        if checkpoint:
            return checkpoint.config
        return open_published(config.start)[0]
    if not hasattr(module, "MODEL"):
        raise InputError(NO_MODEL)
    return module.MODEL


def tensor_size(mesh: Mesh) -> int:
    """The number of devices over which heads are split."""
    return math.prod(mesh.shape[axis] for axis in costs.axis_names("heads"))


def _request(c: Config, model, slice_: Topology, mesh: Mesh, options) -> dict:
    """All that the program depends on, for the key of the cache."""
    settings = dataclasses.asdict(c)
    # Rates and decays count only as zero or not: stages with other values share a program.
    settings["optim"] = {
        name: value != 0 if isinstance(value, int | float) else value
        for name, value in settings["optim"].items()
    }
    return {
        "program": "train",
        "settings": {name: settings[name] for name in settings if name not in _NOT_IN_PROGRAM},
        "model": dataclasses.asdict(model),
        "shape": (c.data.rows, c.data.length, c.data.num_patches),
        "topology": slice_.name,
        "mesh": dict(mesh.shape),
        "options": options,
    }


def _memory(program: Compiled, state: dict, batch: dict, slice_: Topology) -> MemoryUse:
    kinds = {
        "parameters": device_bytes(state["trainable"]) + device_bytes(state["frozen"]),
        "optimizer": device_bytes(state["opt"]) + device_bytes(state.get("ema", {})),
        "batch": device_bytes(batch),
    }
    limit = int(slice_.chip.usable_gib * GIB)
    if program.memory is None:
        return MemoryUse(kinds, 0, limit)
    known, sizes = sum(kinds.values()), program.memory
    kinds["arguments: padding, unused"] = sizes.arguments - known
    kinds["results"] = sizes.outputs - sizes.alias
    kinds["temporaries, activations"] = sizes.temporaries
    return MemoryUse(kinds, sizes.total, limit)


def _advice(c: Config) -> str:
    more = [] if c.remat == "full" else ["remat=full"]
    if c.data.rows > c.micro_batches:
        more.append("more micro_batches")
    return " or ".join([*more, "a larger fsdp or tensor size of the mesh", "fewer or shorter rows"])
