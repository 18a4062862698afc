"""Plans a run on TPUs that you have not rented: compiles it for them on this machine.

Memory of a device, work, collectives, a bound of the time of a step and what it is bound by, from
the program that the TPU compiler makes on this machine. Plans are kept and made again in seconds.
"""

import argparse
import dataclasses
import json
import os
import sys

import jax

from neo_jax.command_line import make_parser, positive_int
from neo_jax.configs.find import find_config, on_pod
from neo_jax.errors import InputError
from neo_jax.model.decoder import REMAT_POLICIES
from neo_jax.plan import plan_report, pods_table, search
from neo_jax.plan.figure import draw, require_drawing
from neo_jax.plan.packing import CAUSAL, MIXES
from neo_jax.plan.serving import plan_serving
from neo_jax.plan.topology import PODS, find_topology, parse_sizes
from neo_jax.plan.training import model_of, plan_training
from neo_jax.sharding import batch_rows
from neo_jax.train.train_config import Config, override

EXAMPLES = """examples:
  %(prog)s configs/neo_ov_2b_sft.py --topology v5e:16x16 --tokens-per-chip 8192
  %(prog)s configs/neo_ov_9b_sft.py --pod v5e-256 --png plan.png
  %(prog)s configs/neo_ov_2b_sft.py --topology v6e-16 --search
  %(prog)s configs/neo_ov_2b_sft.py --topology v5e:2x2 --mesh 1x1x4 --serve --slots 32
  %(prog)s --pods docs/pods.md
"""


def main(argv: list[str] | None = None, prog: str = "python -m neo_jax.plan") -> int:
    args = parse(argv, prog)
    # Arrays are abstract; whatever accelerator is here is left alone.
    jax.config.update("jax_platforms", "cpu")
    try:
        return run(args)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error


def parse(argv: list[str] | None, prog: str) -> argparse.Namespace:
    parser = make_parser(prog, __doc__, EXAMPLES)
    add = parser.add_argument
    add("config", nargs="?", help="as for train.py: a file with get_config() -> Config")
    add("settings", nargs="*", help="as for train.py, such as optim.state_dtype=bfloat16")
    add("--topology", metavar="T", help=f"v5e:16x16, chips each way, or {', '.join(PODS)}")
    add("--pod", metavar="P", help="a slice and what configs/pods.py has for it")
    add("--mesh", metavar="DxFxT", help="data x fsdp x tensor[ x context]; default: the config's")
    add("--remat", choices=REMAT_POLICIES)
    add("--micro-batches", type=positive_int, metavar="N")
    add("--length", type=positive_int, metavar="N", help="tokens of a row")
    add("--rows", type=positive_int, metavar="N", help="of a step")
    add(
        "--tokens-per-chip",
        type=positive_int,
        metavar="N",
        help="chooses rows, and length if need be",
    )
    mixes = [*MIXES, CAUSAL]
    add("--packing", default="sft", choices=mixes, help="kind of data; default sft")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of the TPU compiler")
    add("--no-flags", action="store_true", help="leave out the chip's own flags: compiles faster")
    add("--search", action="store_true", help="try meshes, remat and micro-batches; rank them")
    add(
        "--most", type=positive_int, default=12, metavar="N", help="programs that a search compiles"
    )
    add("--serve", action="store_true", help="plan prefill and decode instead of training")
    add("--slots", type=positive_int, default=8, metavar="N", help="requests that run at once")
    add("--max-length", type=positive_int, default=4096, metavar="N", help="tokens of a slot")
    add("--prefill", type=positive_int, default=2048, metavar="N", help="tokens of a prefill")
    add("--kv-dtype", default="bfloat16", choices=["bfloat16", "float32", "int8"])
    add("--weights", choices=["int8"], help="of the large matrices; default: bfloat16")
    add("--pods", metavar="MD", help="make the rows of the table in configs/pods.py, one by one")
    add("--only", metavar="PART", default="", help="of --pods: rows whose name has this in it")
    add("--json", metavar="FILE", help="write the plans; - prints them instead of tables")
    add("--png", metavar="FILE", help="draw memory and time")
    add("--no-cache", action="store_true", help="compile anew")
    return parser.parse_intermixed_args(argv)


def run(args: argparse.Namespace) -> int:
    check(args)
    if args.pods:
        return pods_table.write_table(
            args.pods, args.only, with_flags=not args.no_flags, anew=args.no_cache
        )
    module = find_config(args.config)
    config = module.get_config()
    if args.pod:
        config = on_pod(config, args.config, args.pod)
    config = override(config, args.settings)
    topology = args.topology or args.pod
    config = requested(config, args, topology)
    model = model_of(config, module)
    name, options = os.path.basename(args.config), dict(map(option, args.option))
    if args.serve:
        plans = plan_serving(
            model,
            topology,
            mesh=config.mesh,
            slots=args.slots,
            max_length=args.max_length,
            prefill=args.prefill,
            kv_dtype=args.kv_dtype,
            weights=args.weights,
            name=name,
            options=options,
            with_flags=not args.no_flags,
            use_cache=not args.no_cache,
        )
    elif args.search:
        plans = search.search(args, config, model, topology)
    else:
        plan = plan_training(
            config,
            topology,
            model=model,
            packing=args.packing,
            name=name,
            options=options,
            with_flags=not args.no_flags,
            use_cache=not args.no_cache,
        )
        plans = [plan]
    if args.json != "-":
        print(
            plan_report.ranking(plans)
            if args.search
            else "\n\n".join(map(plan_report.table, plans))
        )
    write(args, plans)
    if args.search:
        return 1 if all(plan.problem for plan in plans) else 0
    return 1 if any(plan.problem or plan.warnings for plan in plans) else 0


def check(args: argparse.Namespace) -> None:
    """Says what cannot be before the long work.

    Raises:
      InputError: for options that do not go together.
      OSError: for a file that cannot be written.
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


def requested(c: Config, args: argparse.Namespace, topology: str) -> Config:
    """The config with what the command line asks for."""
    slice_ = find_topology(topology)
    mesh = slice_.mesh(parse_sizes(args.mesh) if args.mesh else c.mesh)
    sizes = tuple(parse_sizes(args.mesh)) if args.mesh else c.mesh
    length, rows = args.length or c.data.length, args.rows or c.data.rows
    if args.tokens_per_chip:
        tokens, parts = args.tokens_per_chip * mesh.size, batch_rows(mesh)
        if not args.length and tokens < length * parts:
            length = tokens // parts  # one row on each part of the batch
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


def option(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--option {text}: write NAME=VALUE, such as xla_tpu_x=true")
    return name.removeprefix("--"), value


def write(args: argparse.Namespace, plans: list) -> None:
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
    sys.exit(main())
