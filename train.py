"""Trains a NEO: from nothing, from a grown Qwen3, or further.

python train.py                                   a tiny model on drawn pictures, in minutes
python train.py configs/neo_ov_2b_sft.py start=neo-2b data.mixture=a.jsonl,b.parquet workdir=runs/a
python train.py configs/neo_ov_9b_sft.py --pod v5e-256 start=neo-9b ...   on such a pod
python train.py configs/neo_ov_2b_sft.py --show   its settings
"""

import argparse
import sys
from pathlib import Path

DEFAULT = Path(__file__).parent / "configs" / "tiny_shapes.py"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "config", nargs="?", default=str(DEFAULT), help="a file with get_config() -> Config"
    )
    parser.add_argument("settings", nargs="*", help="such as optim.peak_lr=1e-5")
    parser.add_argument(
        "--pod", metavar="NAME", help="mesh, rows and so on for a pod, as configs/pods.py has them"
    )
    parser.add_argument("--show", action="store_true", help="print the settings and end")
    args = parser.parse_intermixed_args(argv)  # settings may follow options
    if "=" in args.config and not args.config.endswith(".py"):
        args.config, args.settings = str(DEFAULT), [args.config, *args.settings]

    from neo_jax import hosts
    from neo_jax.errors import InputError
    from neo_jax.train import config_file
    from neo_jax.train.config import override, to_json
    from neo_jax.train.loop import train

    try:
        module = config_file.load(args.config)
        config = module.get_config()
        if args.pod:
            config = config_file.on_pod(config, args.config, args.pod)
        config = override(config, args.settings)
        if args.show:
            print(to_json(config))
            return 0
        hosts.join(bool(args.pod))
        finished = train(config)
        if finished.is_stopped:
            return 143  # as a process that SIGTERM ended, so that launchers start it again
        if hasattr(module, "after"):
            module.after(config, finished)
        return 0
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted; run it again to go on from the last save", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
