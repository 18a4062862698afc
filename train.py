"""Trains a NEO: from nothing, from a grown Qwen3, or further.

python train.py                                   a tiny model on drawn pictures, in minutes
python train.py configs/neo_ov_2b_sft.py start=neo-2b data.mixture=a.jsonl,b.parquet workdir=runs/a
python train.py configs/neo_ov_9b_sft.py --pod v5e-256 start=neo-9b ...   on such a pod
python train.py configs/neo_ov_2b_sft.py --show   its settings
"""

import argparse
import os
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
    args = parser.parse_args(argv)
    if "=" in args.config and not args.config.endswith(".py"):
        args.config, args.settings = str(DEFAULT), [args.config, *args.settings]

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
        _join_pod(bool(args.pod))
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


def _join_pod(is_pod: bool) -> None:
    """Joins the other processes, if this is one of several: on a pod, or as the variables say."""
    import jax

    from neo_jax.errors import InputError

    say = os.environ.get
    if address := say("JAX_COORDINATOR_ADDRESS"):
        count, number = (int(say(f"JAX_{name}", -1)) for name in ("NUM_PROCESSES", "PROCESS_ID"))
        jax.distributed.initialize(address, count, number)
    elif is_pod or "," in say("TPU_WORKER_HOSTNAMES", "") or say("MEGASCALE_COORDINATOR_ADDRESS"):
        try:
            jax.distributed.initialize()  # it asks the cloud
        except (RuntimeError, ValueError) as error:
            raise InputError(f"no pod is here: {error}".split("\n")[0]) from error


if __name__ == "__main__":
    sys.exit(main())
