"""Searches the best mesh, remat policy and micro-batches for a slice, and ranks what fits.

Candidates that cannot fit by arithmetic are not compiled. The others are compiled each in a process
of its own, so that a failure, even a crash of the compiler, is only a line in the ranking.
"""

import argparse
import dataclasses
import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import tqdm
from jax.sharding import Mesh

from neo_jax.errors import InputError
from neo_jax.model.decoder import REMAT_POLICIES, SAVED_NAMES
from neo_jax.model_config import ModelConfig
from neo_jax.plan.compile_cache import MINUTES
from neo_jax.plan.program import device_bytes, training_batch, training_state
from neo_jax.plan.result import GIB, MemoryUse, Plan, from_json
from neo_jax.plan.topology import find_topology
from neo_jax.plan.training import tensor_size
from neo_jax.sharding import describe
from neo_jax.train.train_config import Config


def search(args: argparse.Namespace, c: Config, model: ModelConfig, topology: str) -> list[Plan]:
    """Plans the candidates that could fit, at most `args.most`, the most promising first.

    Raises:
      InputError: if no candidate can fit.
    """
    fixed = {
        name: getattr(c, name) for name in ("mesh", "remat", "micro_batches") if getattr(args, name)
    }
    found = list(candidates(c, model, topology, **fixed))
    fitting = sorted((one for one in found if one[1] <= _limit(topology)), key=_priority)
    if not fitting:
        least = min(size for _, size in found) / GIB if found else 0
        raise InputError(
            f"nothing fits: the smallest of {len(found)} candidates needs {least:.1f} GiB or more "
            f"of {_limit(topology) / GIB:.2f}; use more devices or shorter rows"
        )
    chosen = fitting[: args.most]
    low, high = (len(chosen) * minutes for minutes in MINUTES)
    print(
        f"{len(found)} candidates, {len(found) - len(fitting)} cannot fit; compiling {len(chosen)}"
        f" of the others, about {low:.0f} to {high:.0f} minutes where nothing is kept",
        file=sys.stderr,
    )
    plans = []
    for config, _ in tqdm.tqdm(chosen, unit="program"):
        plans.append(_plan_in_subprocess(args, config, topology))
        tqdm.tqdm.write(one_line(plans[-1]), file=sys.stderr)
    return plans


def one_line(plan: Plan) -> str:
    """The settings of a plan and its memory and MFU, or its problem."""
    settings = f"{plan.mesh}, {plan.settings['remat']}, {plan.settings['micro_batches']} micro"
    if plan.problem:
        return f"{settings}: {plan.problem}"
    return f"{settings}: {plan.memory.total / GIB:.2f} GiB, MFU at most {plan.mfu:.1%}"


def candidates(
    c: Config,
    model: ModelConfig,
    topology: str,
    *,
    mesh: tuple[int, ...] | None = None,
    remat: str | None = None,
    micro_batches: int | None = None,
) -> Iterator[tuple[Config, int]]:
    """Yields configs, each with the least bytes that it needs on a device.

    All have the same tokens of a step.

    Args:
      c: the config that the candidates change.
      model: of the config.
      topology: such as "v5e:16x16".
      mesh, remat, micro_batches: fixed values; None tries all.
    """
    slice_ = find_topology(topology)
    for sizes in [mesh] if mesh else _meshes(len(slice_.devices), model):
        try:
            placed = slice_.mesh(sizes)
            one = dataclasses.replace(c, mesh=sizes, micro_batches=1)
            with jax.set_mesh(placed):
                state_bytes = device_bytes(training_state(one, model, placed))
        except InputError:  # the slice has no such axes, or they do not divide the parameters
            continue
        for micro in [micro_batches] if micro_batches else _powers(c.data.rows):
            one = dataclasses.replace(one, micro_batches=micro)
            try:
                one.check_mesh(placed)
            except InputError:
                continue
            held = state_bytes + device_bytes(training_batch(one, placed))
            for policy in [remat] if remat else REMAT_POLICIES:
                one = dataclasses.replace(one, remat=policy)
                yield one, held + _saved_bytes(one, model, placed)


def _powers(rows: int) -> list[int]:
    """The powers of two that divide the rows."""
    return [1 << power for power in range(rows.bit_length()) if not rows % (1 << power)]


def _saved_bytes(c: Config, model: ModelConfig, mesh: Mesh) -> int:
    """A device's bytes of the activations that the remat policy saves: the least of any program."""
    heads, key_heads = model.num_attention_heads, model.num_key_value_heads
    widths = {
        "attn_out": 2 * heads * model.head_dim,
        "log_sum": 4 * heads,
        "projected": 2 * (heads + key_heads) * model.qk_width + 2 * key_heads * model.head_dim,
        "gate": 2 * model.intermediate_size,
        "up": 2 * model.intermediate_size,
    }
    tokens = c.data.rows * c.data.length / mesh.size / c.micro_batches
    # Tensor parallelism does not split the residual stream.
    of_token = 2 * model.hidden_size * tensor_size(mesh)
    of_token += sum(widths[name] for name in SAVED_NAMES.get(c.remat, widths))
    return int(tokens * of_token * model.num_layers)


def _meshes(count: int, model: ModelConfig) -> Iterator[tuple[int, ...]]:
    """Sizes of meshes of `count` devices."""
    for tensor, context, data in itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2, 4)):
        fsdp, rest = divmod(count, tensor * context * data)
        if not rest and fsdp and not model.num_key_value_heads % tensor:
            yield (data, fsdp, tensor) if context == 1 else (data, fsdp, tensor, context)


def _priority(candidate: tuple[Config, int]) -> tuple:
    """The order of compiling: little communication and little recomputation first."""
    c, _ = candidate
    recomputed = len(REMAT_POLICIES) - REMAT_POLICIES.index(c.remat)
    return (c.mesh[2], len(c.mesh), c.mesh[0], recomputed, c.micro_batches)


def _limit(topology: str) -> float:
    """The usable bytes of a device."""
    return find_topology(topology).chip.usable_gib * GIB


def _plan_in_subprocess(args: argparse.Namespace, c: Config, topology: str) -> Plan:
    """Plans a config in another process; its failure is a plan with a problem."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "plan.json"
        command = [sys.executable, "-m", "neo_jax.plan", args.config, *args.settings]
        command += ["--pod", args.pod] if args.pod else ["--topology", topology]
        command += ["--json", str(path), "--packing", args.packing]
        command += ["--mesh", "x".join(map(str, c.mesh)), "--remat", c.remat]
        command += ["--micro-batches", str(c.micro_batches), "--rows", str(c.data.rows)]
        command += [
            "--length",
            str(c.data.length),
            *["--no-cache"] * args.no_cache,
            *["--no-flags"] * args.no_flags,
        ]
        for option in args.option:
            command += ["--option", option]
        ended = subprocess.run(command, capture_output=True, text=True)
        text = path.read_text() if path.exists() else ""
        if text:
            return from_json(json.loads(text)[0])
    reason = ended.stderr.strip().split("\n")[-1] or f"ended with {ended.returncode}"
    slice_ = find_topology(topology)
    limit = int(slice_.chip.usable_gib * GIB)
    settings = {"remat": c.remat, "micro_batches": c.micro_batches}
    return Plan(
        name=args.config,
        program="train",
        topology=slice_.name,
        chip=slice_.chip.name,
        devices=math.prod(c.mesh),
        mesh=describe(slice_.mesh(c.mesh)),
        settings=settings,
        memory=MemoryUse({}, 0, limit),
        problem=reason,
    )
