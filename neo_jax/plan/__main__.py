"""Plans a run on TPUs that you have not rented: compiles it for them on this machine.

A plan shows a device's memory, its work, the collectives, and a bound of the time of a step. All
numbers come from the program that the TPU compiler makes here. Compiled programs are cached.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable

import jax

from neo_jax.command_line import make_parser, positive_int, run_command
from neo_jax.configs.find import find_config, on_pod
from neo_jax.errors import InputError
from neo_jax.model.decoder import REMAT_POLICIES
from neo_jax.model_config import ModelConfig
from neo_jax.plan import plan_report, pods_table, search
from neo_jax.plan.figure import draw, require_drawing
from neo_jax.plan.packing import CAUSAL, MIXES
from neo_jax.plan.result import Plan
from neo_jax.plan.serving import plan_serving
from neo_jax.plan.topology import PODS, find_topology, parse_sizes
from neo_jax.plan.training import model_of, plan_training
from neo_jax.sharding import batch_rows
from neo_jax.train.train_config import Config, override

EXAMPLES = """examples:
  %(prog)s neo_ov_2b_sft --topology v5e:16x16 --tokens-per-chip 8192
  %(prog)s neo_ov_9b_sft --pod v5e-256 --png plan.png
  %(prog)s neo_ov_2b_sft --topology v6e-16 --search
  %(prog)s neo_ov_2b_sft --topology v5e:2x2 --mesh 1x1x4 --serve --slots 32
  %(prog)s --pods docs/pods.md
"""


def main(argv: list[str] | None = None, prog: str = "python -m neo_jax.plan") -> int:
    args = parse(argv, prog)
    # Arrays are abstract, so no accelerator of this machine is used.
    jax.config.update("jax_platforms", "cpu")
    try:
        return run(args)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error


def parse(argv: list[str] | None, prog: str) -> argparse.Namespace:
    parser = make_parser(prog, __doc__, EXAMPLES)
    add_training_options(parser.add_argument)
    add_serving_options(parser.add_argument)
    add_output_options(parser.add_argument)
    return parser.parse_intermixed_args(argv)


def add_training_options(add: Callable) -> None:
    add("config", nargs="?", help="as for train.py: a name, or a file with get_config() -> Config")
    add("settings", nargs="*", help="as for train.py, such as optim.state_dtype=bfloat16")
    add("--topology", metavar="T", help=f"v5e:16x16, chips each way, or {', '.join(PODS)}")
    add("--pod", metavar="P", help="a slice, with its settings in configs/pods.py")
    add("--mesh", metavar="DxFxT", help="data x fsdp x tensor[ x context]; default: the config's")
    add("--remat", choices=REMAT_POLICIES)
    add("--micro-batches", type=positive_int, metavar="N")
    add("--length", type=positive_int, metavar="N", help="tokens of a row")
    add("--rows", type=positive_int, metavar="N", help="of a step")
    add(
        "--tokens-per-chip",
        type=positive_int,
        metavar="N",
        help="chooses rows, and length where a row is too long",
    )
    mixes = [*MIXES, CAUSAL]
    add("--packing", default="sft", choices=mixes, help="kind of data; default sft")
    add(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the TPU compiler",
    )
    add(
        "--no-flags", action="store_true", help="without the chip's compiler flags: compiles faster"
    )
    add("--search", action="store_true", help="try meshes, remat and micro-batches; rank them")
    add(
        "--most",
        type=positive_int,
        default=12,
        metavar="N",
        help="programs that a search compiles; default 12",
    )


def add_serving_options(add: Callable) -> None:
    add("--serve", action="store_true", help="plan prefill and decode instead of training")
    add(
        "--slots",
        type=positive_int,
        default=8,
        metavar="N",
        help="requests that run at once; default 8",
    )
    add(
        "--max-length",
        type=positive_int,
        default=4096,
        metavar="N",
        help="tokens of a slot; default 4096",
    )
    add(
        "--prefill",
        type=positive_int,
        default=2048,
        metavar="N",
        help="tokens of a prefill; default 2048",
    )
    add("--kv-dtype", default="bfloat16", choices=["bfloat16", "float32", "int8"])
    add("--weights", choices=["int8"], help="dtype of the large matrices; default: bfloat16")


def add_output_options(add: Callable) -> None:
    add("--pods", metavar="MD", help="write the table of configs/pods.py, row by row")
    add(
        "--only",
        metavar="PART",
        default="",
        help='of --pods: only rows whose "CONFIG POD" contains PART',
    )
    add("--json", metavar="FILE", help="write the plans; - prints them instead of tables")
    add("--png", metavar="FILE", help="draw memory and time")
    add("--no-cache", action="store_true", help="compile again")


def run(args: argparse.Namespace) -> int:
    """Makes, prints and writes the plans. Returns 1 if one does not fit or has a warning."""
    check(args)
    if args.pods:
        return pods_table.write_table(
            args.pods, args.only, with_flags=not args.no_flags, replan=args.no_cache
        )
    module = find_config(args.config)
    config = module.get_config()
    if args.pod:
        config = on_pod(config, args.config, args.pod)
    config = override(config, args.settings)
    topology = args.topology or args.pod
    config = with_options(config, args, topology)
    plans = make_plans(args, config, model_of(config, module), topology)
    if args.json != "-":
        print(
            plan_report.ranking(plans)
            if args.search
            else "\n\n".join(map(plan_report.table, plans))
        )
    write_files(args, plans)
    if args.search:
        return 1 if all(plan.problem for plan in plans) else 0
    return 1 if any(plan.problem or plan.warnings for plan in plans) else 0


def make_plans(
    args: argparse.Namespace, config: Config, model: ModelConfig, topology: str
) -> list[Plan]:
    """One plan of training, two of serving (prefill and decode), or those of a search."""
    shared = {
        "name": os.path.basename(args.config),
        "options": dict(map(parse_option, args.option)),
        "with_flags": not args.no_flags,
        "use_cache": not args.no_cache,
    }
    if args.search:
        return search.search(args, config, model, topology)
    if not args.serve:
        return [plan_training(config, topology, model=model, packing=args.packing, **shared)]
    return plan_serving(
        model,
        topology,
        mesh=config.mesh,
        slots=args.slots,
        max_length=args.max_length,
        prefill=args.prefill,
        kv_dtype=args.kv_dtype,
        weights=args.weights,
        **shared,
    )


def check(args: argparse.Namespace) -> None:
    """Checks the options and the output files, before minutes of compiling.

    Raises:
      InputError: if options do not go together.
      OSError: if a file cannot be written.
    """
    chosen = [name for name in ("search", "serve", "pods") if getattr(args, name)]
    if len(chosen) > 1:
        raise InputError(f"--{chosen[0]} and --{chosen[1]} do not go together")
    if args.pods and (args.config or args.json or args.png):
        raise InputError("--pods has its own configs and files: give no config, --json or --png")
    if not args.pods and (not args.config or bool(args.topology) == bool(args.pod)):
        raise InputError("name a config and either --topology or --pod; --help has examples")
    if args.config and "=" in args.config:
        raise InputError(f"{args.config}: name the config before the settings")
    if args.png:
        require_drawing(args.png)
    for path in filter(None, (args.json, args.png)):
        if path != "-":
            open(path, "ab").close()


def with_options(c: Config, args: argparse.Namespace, topology: str) -> Config:
    """The config with the mesh, rows, length, remat and micro-batches of the command line.

    Raises:
      InputError: if --tokens-per-chip cannot be met with whole rows.
    """
    slice_ = find_topology(topology)
    mesh = slice_.mesh(parse_sizes(args.mesh) if args.mesh else c.mesh)
    sizes = tuple(parse_sizes(args.mesh)) if args.mesh else c.mesh
    length, rows = args.length or c.data.length, args.rows or c.data.rows
    if args.tokens_per_chip:
        tokens, parts = args.tokens_per_chip * mesh.size, batch_rows(mesh)
        if not args.length and tokens < length * parts:
            length = tokens // parts  # one row for each shard of the batch
        rows = tokens // length
        if rows * length != tokens or rows % parts:
            raise InputError(
                f"--tokens-per-chip {args.tokens_per_chip}: {tokens} tokens are no multiple of "
                f"{parts} rows of {length}; use another --length"
            )
    elif not args.rows and not args.pod and rows % batch_rows(mesh):
        rows = batch_rows(mesh)
    changes = {"micro_batches": args.micro_batches or c.micro_batches}
    changes |= {"remat": args.remat or c.remat, "mesh": sizes}
    return dataclasses.replace(
        c, data=dataclasses.replace(c.data, length=length, rows=rows), **changes
    )


def parse_option(text: str) -> tuple[str, str]:
    """'--xla_tpu_x=true', dashes optional, -> ('xla_tpu_x', 'true')."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--option {text}: write NAME=VALUE, such as xla_tpu_x=true")
    return name.removeprefix("--"), value


def write_files(args: argparse.Namespace, plans: list[Plan]) -> None:
    """Writes the plans as --json and --png ask; --json - prints them."""
    if args.json:
        text = json.dumps([plan.to_json() for plan in plans], indent=2)
        if args.json == "-":
            print(text)
        else:
            with open(args.json, "w", encoding="utf-8") as file:
                file.write(text + "\n")
    if args.png:
        draw(plans, args.png)


if __name__ == "__main__":
    sys.exit(run_command("neo_jax.plan", main, "interrupted; what was compiled is kept"))
