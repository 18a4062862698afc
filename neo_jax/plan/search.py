"""Tries meshes, rematerialisation and micro-batches on a slice and ranks what fits.

What cannot fit by arithmetic is never compiled. Each program is compiled in a process of its own:
one that fails, even one that ends its process, is a line in the ranking.
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

from neo_jax.config import ModelConfig
from neo_jax.errors import InputError
from neo_jax.model.decoder import REMAT_POLICIES
from neo_jax.plan.program import device_bytes, training_arguments
from neo_jax.plan.result import GIB, MemoryUse, Plan, from_json
from neo_jax.plan.topology import find_topology
from neo_jax.plan.training import tensor_size
from neo_jax.sharding import batch_rows, describe
from neo_jax.train.config import Config

MINUTES = (1.5, 5)  # that a program takes to compile, about
MICRO_BATCHES = (1, 2, 4)


def search(args: argparse.Namespace, c: Config, model: ModelConfig, topology: str) -> list[Plan]:
    """Plans of every candidate that could fit, at most `args.most`.

    Raises:
      InputError: when nothing can fit.
    """
    found = list(candidates(c, model, topology, tuple(c.mesh) if args.mesh else None))
    fitting = sorted((one for one in found if one[1] <= _limit(topology)), key=_promise)
    if not fitting:
        least = min(size for _, size in found) / GIB if found else 0
        raise InputError(
            f"nothing fits: the smallest of {len(found)} candidates needs {least:.1f} GiB of "
            f"{_limit(topology) / GIB:.2f} before activations; use more devices"
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
        plans.append(_apart(args, config, topology))
        tqdm.tqdm.write(one_line(plans[-1]), file=sys.stderr)
    return plans


def one_line(plan: Plan) -> str:
    settings = f"{plan.mesh}, {plan.settings['remat']}, {plan.settings['micro_batches']} micro"
    if plan.problem:
        return f"{settings}: {plan.problem}"
    return f"{settings}: {plan.memory.total / GIB:.2f} GiB, MFU at most {plan.mfu:.1%}"


def candidates(
    c: Config, model: ModelConfig, topology: str, mesh: tuple[int, ...] | None = None
) -> Iterator[tuple[Config, int]]:
    """Configs and the least bytes that each needs on a device; tokens of a step stay the same."""
    slice_ = find_topology(topology)
    for sizes in [mesh] if mesh else _meshes(len(slice_.devices), model):
        try:
            placed = slice_.mesh(sizes)
        except InputError:  # the slice has no such axes
            continue
        for micro in MICRO_BATCHES:
            if c.data.rows % (micro * batch_rows(placed)):
                continue
            one = dataclasses.replace(c, mesh=sizes, micro_batches=micro)
            try:
                with jax.set_mesh(placed):
                    held = device_bytes(training_arguments(one, model, placed))
            except InputError:  # it does not divide the parameters
                break
            for remat in REMAT_POLICIES:
                one = dataclasses.replace(one, remat=remat)
                yield one, held + _kept_bytes(one, model, placed)


def _kept_bytes(c: Config, model: ModelConfig, mesh) -> int:
    """Of the residual stream, which every policy keeps: no program has less."""
    rows = c.data.rows * tensor_size(mesh) / mesh.size / c.micro_batches  # or a part of one
    kept = rows * c.data.length * model.hidden_size * 2 * model.num_layers
    if c.remat == "none":  # and the inputs of every product
        kept *= 1 + (2 * model.intermediate_size + model.hidden_size) / model.hidden_size
    return int(kept)


def _meshes(count: int, model: ModelConfig) -> Iterator[tuple[int, ...]]:
    for tensor, context, data in itertools.product((1, 2, 4, 8), (1, 2, 4), (1, 2, 4)):
        fsdp, rest = divmod(count, tensor * context * data)
        if not rest and fsdp and not model.num_key_value_heads % tensor:
            yield (data, fsdp, tensor) if context == 1 else (data, fsdp, tensor, context)


def _promise(candidate: tuple[Config, int]) -> tuple:
    """What is tried first: little communication, little computed twice."""
    c, _ = candidate
    recomputed = {"none": 0, "full": 2}.get(c.remat, 1)
    return (c.mesh[2], len(c.mesh), c.mesh[0], recomputed, c.micro_batches)


def _limit(topology: str) -> float:
    return find_topology(topology).chip.usable_gib * GIB


def _apart(args: argparse.Namespace, c: Config, topology: str) -> Plan:
    """The plan of a config, made by another process."""
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
    said = ended.stderr.strip().split("\n")[-1] or f"ended with {ended.returncode}"
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
        problem=said,
    )
