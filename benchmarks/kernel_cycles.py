"""Counts the instruction bundles of the attention kernels' steps, for each TPU.

The TPU compiler writes the final program of a kernel as bundles: one per cycle if nothing stalls.
Every compilation gives the same bundles, so they can be compared with a budget, without a TPU:

python -m benchmarks.kernel_cycles --chips v5e,v6e            exits 1 if a kernel grew by over 2 %
python -m benchmarks.kernel_cycles --write                    writes the counts as the new budget

The budget is `neo_jax/plan/kernel_cycles.json`. Plans compute the time of attention from it.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from neo_jax.errors import InputError
from neo_jax.plan.attention_cycles import TABLE, Steps
from neo_jax.plan.chips import CHIPS
from neo_jax.plan.kernel_costs import BLOCK_K, BLOCK_Q, PRODUCTS, STREAMED, flops_per_pair

SLICES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "v7x:2x2x1"}
TOLERANCE = 0.02
# A conditional region of this many bundles runs only in the first or last step of a block or row.
LONG = 200
# A short row, and one so long that the backward pass is two kernels.
LENGTHS, GROUPS, QK_WIDTH, V_WIDTH = (4096, 65536), 2, 256, 128

_BUNDLE = re.compile(r"^\s*0x([0-9a-f]+)\s+([A-Z]{2})?\s*:")
_BRANCH = re.compile(r"sbr\.rel .*target = \$region(\d+)")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)")


@dataclasses.dataclass(frozen=True)
class Counts:
    """Bundles of the loop over a kernel's steps."""

    masked: int  # body of a step on a partial block
    full: int  # body of a step on a full block
    step: int  # the rest of a step, without what runs only in a block's first or last step


def count(text: str) -> Counts:
    """Counts a kernel's final bundles: its two largest conditional regions are the step's bodies.

    Raises:
      InputError: if the loop is not as expected.
    """
    places, first, back, inside = _loop(text)
    skipped = [(place, places[region]) for place, region in inside if places[region] > place]
    large = [(a, b) for a, b in skipped if b - a > (back - first) // 8]
    bodies = [
        one
        for one in large
        if not any(one != two and one[0] <= two[0] and two[1] <= one[1] for two in large)
    ]
    if len(bodies) != 2:
        raise InputError(f"the kernel's step has {len(bodies)} bodies, not one with a mask and one "
                         "without: has its shape changed?")  # fmt: skip
    full, masked = sorted(b - a for a, b in bodies)
    rest = set(range(first, back))
    for a, b in skipped:
        encloses = any(a < c and d <= b for c, d in bodies)
        if (a, b) in bodies or (b - a >= LONG and not encloses):
            rest -= set(range(a, b))
    return Counts(masked, full, len(rest))


def loop_bundles(text: str) -> int:
    """Bundles of one iteration of a kernel's loop, with all its regions."""
    _, first, back, _ = _loop(text)
    return back - first


def _loop(text: str) -> tuple[dict[int, int], int, int, list[tuple[int, int]]]:
    """Starts of regions; first and last bundle of the outermost loop; branches in it."""
    places, branches, first = {}, [], None
    for line in text.split("\n"):
        bundle = _BUNDLE.match(line)
        if not bundle:
            continue
        place = int(bundle[1], 16)
        for region in _REGION.findall(line):
            places.setdefault(int(region), place)
        if bundle[2] == "LB" and first is None:
            first = place
        if branch := _BRANCH.search(line):
            branches.append((place, int(branch[1])))
    inside = [(place, region) for place, region in branches if first is not None and place > first]
    if not inside:
        raise InputError("the kernel's bundles have no loop: has its shape changed?")
    return places, first, max(place for place, _ in inside), inside


def measured(chip: str, group: int) -> tuple[dict[str, Steps], dict[str, int]]:
    """Compiles the kernels for a chip, with `group` query heads to a key head.

    Returns:
      the bundles of attention's steps, and of one block of the kernels that stream, by kernel.
    """
    found, streams = {}, {}
    with tempfile.TemporaryDirectory() as directory:
        arguments = f"--xla_jf_dump_to={directory} --xla_jf_dump_llo_text=true"
        environment = os.environ | {"LIBTPU_INIT_ARGS": arguments}
        command = [sys.executable, "-m", "benchmarks.kernel_cycles", "--compile", chip]
        finished = subprocess.run(
            [*command, "--group", str(group)], env=environment, capture_output=True, text=True
        )
        if finished.returncode:
            raise InputError(f"{chip}: {finished.stderr.strip().splitlines()[-1]}")
        for name in PRODUCTS:
            files = [
                file
                for file in sorted(Path(directory).glob(f"*{name}*final_bundles.txt"))
                if "schedule-analysis" not in file.name
                and name == max((other for other in PRODUCTS if other in file.name), key=len)
            ]
            if not files:
                continue
            counts = count(files[0].read_text())
            flops = flops_per_pair(name, QK_WIDTH, V_WIDTH) * BLOCK_Q * BLOCK_K
            least = flops * CHIPS[chip].cores * CHIPS[chip].clock / CHIPS[chip].flops
            found[name] = Steps(
                block_q=BLOCK_Q,
                block_k=BLOCK_K,
                masked=round(max(counts.masked / group, least)),
                full=round(max(counts.full / group, least)),
                step=counts.step,
            )
        for name in STREAMED:
            files = sorted(Path(directory).glob(f"*{name}*final_bundles.txt"))
            files = [file for file in files if "schedule-analysis" not in file.name]
            if files:
                streams[name] = loop_bundles(files[0].read_text())
    if not found:
        raise InputError(f"{chip}: the program has none of the kernels {', '.join(PRODUCTS)}")
    return found, streams


def compile_kernels(chip: str, group: int) -> None:
    """Compiles forward and backward of attention and norms for one device of a slice."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from neo_jax.kernels.interval_attention import interval_attention, make_block_lists
    from neo_jax.kernels.norm_rope import norm_rope
    from neo_jax.plan.topology import find_topology
    from neo_jax.sharding import spec

    jax.config.update("jax_platforms", "cpu")
    topology = find_topology(SLICES[chip])
    mesh = topology.mesh((len(topology.devices), 1, 1))
    rows = mesh.size

    def loss(q, k, v, start, end):
        block_lists = make_block_lists(
            start, end, q.shape[1], (QK_WIDTH, V_WIDTH), q.dtype.itemsize
        )
        z = interval_attention(q, k, v, start, end, QK_WIDTH**-0.5, block_lists)
        return jnp.sum(z.astype(jnp.float32))

    def array(shape, dtype=jnp.bfloat16):
        sharding = NamedSharding(mesh, spec("batch", *[None] * (len(shape) - 1)))
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

    def norm_loss(t, hw, scale, cos, sin):
        y = norm_rope(t, hw, scale, cos, sin, (QK_WIDTH // 4, QK_WIDTH // 8, QK_WIDTH // 8), 1e-6)
        return jnp.sum(y.astype(jnp.float32))

    widths = ((group * GROUPS, QK_WIDTH), (GROUPS, QK_WIDTH), (GROUPS, V_WIDTH))
    options = topology.chip.options(with_flags=False) or None
    with jax.set_mesh(mesh):
        for length in LENGTHS:
            arrays = [array((length, *shape)) for shape in widths]
            arrays += [array((length,), jnp.int32)] * 2
            gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
            gradient.lower(*arrays).compile(compiler_options=options)
        angles = array((LENGTHS[0], QK_WIDTH // 2), jnp.float32)
        scale = jax.ShapeDtypeStruct((QK_WIDTH,), jnp.float32, sharding=NamedSharding(mesh, P()))
        part = array((LENGTHS[0], 16, QK_WIDTH // 2))
        gradient = jax.jit(jax.value_and_grad(norm_loss, (0, 1, 2)))
        gradient.lower(part, part, scale, angles, angles).compile(compiler_options=options)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_cycles",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--chips", default=",".join(SLICES), help="default: all")
    parser.add_argument("--group", type=int, default=2, help="query heads to a key head")
    parser.add_argument("--write", action="store_true", help="write the counts as the budget")
    parser.add_argument("--compile", metavar="CHIP", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        if args.compile:
            compile_kernels(args.compile, args.group)
            return 0
        return compare(args.chips.split(","), args.group, args.write)
    except InputError as error:
        print(f"kernel_cycles: {error}", file=sys.stderr)
        return 2


def compare(chips: list[str], group: int, is_written: bool) -> int:
    """Prints the counts and the budget; returns 1 if a count is over the budget."""
    table, is_over = json.loads(TABLE.read_text()), False
    print(f"{'chip':6}{'kernel':38}{'':8}{'bundles':>9}{'budget':>9}")
    for chip in chips:
        if chip not in SLICES:
            raise InputError(f"{chip}: use one of {', '.join(SLICES)}")
        found, streams = measured(chip, group)
        rows = []
        for name, steps in found.items():
            budget = table["kernels"].get(name, {}).get(chip, {})
            for part in ("masked", "full", "step"):
                rows.append((name, part, getattr(steps, part), budget.get(part)))
            table["kernels"].setdefault(name, {})[chip] = dataclasses.asdict(steps)
        for name, bundles in streams.items():
            rows.append((name, "block", bundles, table["streamed"].get(name, {}).get(chip)))
            table["streamed"].setdefault(name, {})[chip] = bundles
        for name, part, value, budget in rows:
            over = budget is not None and value > (1 + TOLERANCE) * budget
            is_over |= over
            print(f"{chip:6}{name:38}{part:8}{value:9}{budget or '-':>9}{'  OVER' * over}")
        if is_written:
            TABLE.write_text(json.dumps(table, indent=2) + "\n")
    return int(is_over and not is_written)


if __name__ == "__main__":
    sys.exit(main())
