"""Trains a NEO: from scratch, from a grown Qwen3, or from a checkpoint."""

from neo_jax import distributed
from neo_jax.command_line import make_parser
from neo_jax.configs.find import find_config, on_pod
from neo_jax.train.loop import train
from neo_jax.train.train_config import override, to_json

DEFAULT = "tiny_shapes"
EPILOG = """examples:
  %(prog)s                                   a tiny model on synthetic images, in minutes
  %(prog)s configs/neo_ov_2b_sft.py start=neo-2b data.mixture=a.jsonl,b.parquet workdir=runs/a
  %(prog)s neo_ov_9b_sft --pod v5e-256 start=neo-9b ...   on such a pod
  %(prog)s neo_ov_2b_sft --show              its settings
"""


def main(argv: list[str], prog: str) -> int:
    parser = make_parser(prog, __doc__, EPILOG)
    add = parser.add_argument
    add("config", nargs="?", default=DEFAULT, help="a file with get_config(), or a config's name")
    add("settings", nargs="*", help="such as optim.peak_lr=1e-5")
    add("--pod", metavar="NAME", help="apply the mesh, rows and so on of a pod (configs/pods.py)")
    add("--show", action="store_true", help="print the settings and exit")
    args = parser.parse_intermixed_args(argv)  # settings may follow options
    if "=" in args.config and not args.config.endswith(".py"):
        args.config, args.settings = DEFAULT, [args.config, *args.settings]

    module = find_config(args.config)
    config = module.get_config()
    if args.pod:
        config = on_pod(config, args.config, args.pod)
    config = override(config, args.settings)
    if args.show:
        print(to_json(config))
        return 0
    distributed.join(bool(args.pod))
    finished = train(config)
    if finished.is_stopped:
        return 143  # as a process that SIGTERM ended, so that launchers start it again
    if hasattr(module, "after"):
        module.after(config, finished)
    return 0
