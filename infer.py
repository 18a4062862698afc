"""Ask a NEO model about images.

python infer.py ask --model DIR --image photo.jpg "What is this?"
python infer.py batch --model DIR in.jsonl out.jsonl
python infer.py eval --model DIR --bench mmstar,docvqa --data DATA --out RUN
"""

import sys

from neo_jax.cli import main as neo_ov


def main(argv: list[str] | None = None) -> int:
    return neo_ov.main(argv, "python infer.py", ("ask", "batch", "eval"))


if __name__ == "__main__":
    sys.exit(main())
