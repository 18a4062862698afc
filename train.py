"""Trains a NEO: from nothing, from a grown Qwen3, or further.

python train.py                                   a tiny model on synthetic images, in minutes
python train.py configs/neo_ov_2b_sft.py start=neo-2b data.mixture=a.jsonl,b.parquet workdir=runs/a
python train.py configs/neo_ov_9b_sft.py --pod v5e-256 start=neo-9b ...   on such a pod
python train.py configs/neo_ov_2b_sft.py --show   its settings
"""

import sys

from neo_jax.cli import main as neo_ov


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    return neo_ov.run("train", argv, "python train.py", "train.py")


if __name__ == "__main__":
    sys.exit(main())
