"""Writes docs/pods.md: a table with the plan of every row of `configs/pods.py`.

Each finished row is saved to a JSON file beside the table, so that a killed run loses at most one
row and the next run goes on. A row whose settings have changed is planned again.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import tqdm

from neo_jax.configs.pods import PODS
from neo_jax.errors import InputError
from neo_jax.plan import compile_cache
from neo_jax.plan.chips import CHIPS
from neo_jax.plan.plan_report import LEAST_SPARE
from neo_jax.plan.result import GIB, NOTICE, Plan, from_json
from neo_jax.plan.topology import find_topology

PACKING = {"pt": "caption", "mt": "mixed", "sft": "sft"}  # the packing that stands for a stage
_HEAD = """# Pods

Settings, memory and speed of every training stage on every pod. The numbers come from the program
that the TPU compiler makes of the real train step (`python -m neo_jax.plan`); nothing was run on a
TPU. {notice}

- **MFU** counts the FLOPs that the model needs, given the keys that packed tokens attend to. It is
  an upper bound.
- **Data** are synthetic rows: {packing}.
- **Versions**: {versions}.
- **flags**: whether the plan uses the chip's own compiler flags ([tpu.md](tpu.md)). Without them
  (`--no-flags`) a row of v5e or v6e compiles in half the time or less, with a lower MFU.{arguments}

To train with a row's settings: `python train.py configs/CONFIG.py --pod POD ...`.

To update the table: `python -m neo_jax.plan --pods docs/pods.md`. This plans rows that are
missing, or whose settings in `configs/pods.py` have changed. `--no-cache` plans all rows again,
`--only "CONFIG POD"` only some.

To see all of one plan: `python -m neo_jax.plan configs/CONFIG.py --pod POD --packing MIX`.
"""
_ARGUMENTS = "*"  # marks rows with LIBTPU_INIT_ARGS
_COLUMNS = (
    "config", "pod", "mesh", "rows x length", "micro", "remat", "GiB of limit", "spare", "MFU",
    "without network", "tokens/s/chip", "step s", "bound by", "all-reduced GB", "flags",
)  # fmt: skip


def write_table(path: str, only: str = "", *, with_flags: bool = True, replan: bool = False) -> int:
    """Plans the rows that are missing or out of date, and writes the table.

    Several processes may do so at the same time.

    Args:
      path: of the Markdown file. The rows are saved beside it, in a JSON file of the same name.
      only: plan only rows whose "config pod" contains this.
      with_flags: use the chips' compiler flags; compiling takes longer.
      replan: plan also rows that are up to date.

    Returns:
      0, or 1 if a row does not fit or leaves less than LEAST_SPARE of memory free.

    Raises:
      InputError: if there is no row for `only`, or no TPU compiler.
    """
    kept = Path(path).with_suffix(".json")
    rows = _read(kept)
    wanted = [
        (config, pod)
        for (config, pod), settings in PODS.items()
        if only in f"{config} {pod}"
        and (replan or not _is_current(rows.get(f"{config} {pod}", {}), settings))
    ]
    if only and not any(only in f"{config} {pod}" for config, pod in PODS):
        raise InputError(f"--only {only}: no such row in configs/pods.py")
    if wanted:
        find_topology(wanted[0][1])  # raises InputError if there is no compiler
        print(f"{len(wanted)} of {len(PODS)} rows, minutes each", file=sys.stderr)
    for config, pod in tqdm.tqdm(wanted, unit="row"):
        if not replan and _is_current(_read(kept).get(f"{config} {pod}", {}), PODS[config, pod]):
            continue  # another process has made it
        row = {
            "settings": list(PODS[config, pod]),
            "made": {
                "sources": compile_cache.sources(),
                "versions": compile_cache.versions(),
                **{name: os.environ.get(name, "") for name in compile_cache.FLAGS},
            },
            **_plan_row(config, pod, with_flags, replan),
        }
        _save_row(kept, f"{config} {pod}", row)
    rows = _read(kept)
    _replace(
        Path(path), markdown({name: rows[name] for name in map(" ".join, PODS) if name in rows})
    )
    return 1 if any(_fails(row) for row in rows.values()) else 0


def _is_current(row: dict, settings: Sequence[str]) -> bool:
    """Whether a row has a plan of these settings. A row that failed is tried again."""
    return row.get("settings") == list(settings) and "plan" in row


def _read(kept: Path) -> dict[str, dict]:
    """The saved rows that are still in `configs/pods.py`."""
    rows = json.loads(kept.read_text()) if kept.exists() else {}
    return {name: row for name, row in rows.items() if tuple(name.split()) in PODS}


def _save_row(kept: Path, name: str, row: dict) -> None:
    """Adds a row to the file, one line each, under a lock: other processes add rows too."""
    folder = os.open(kept.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        rows = sorted((_read(kept) | {name: row}).items())
        lines = (f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows)
        _replace(kept, "{\n" + ",\n".join(lines) + "\n}\n")
    finally:
        os.close(folder)


def markdown(rows: dict[str, dict]) -> str:
    """The text of the Markdown file."""
    packing = ", ".join(f"{mix} for {stage.upper()}" for stage, mix in PACKING.items())
    versions = " or ".join(sorted({_versions(row) for row in rows.values()}))
    arguments = "".join(
        f"\n- Rows with {_ARGUMENTS} were compiled with LIBTPU_INIT_ARGS=`{given}`."
        for given in sorted({_arguments(row) for row in rows.values()} - {""})
    )
    head = {"notice": NOTICE, "packing": packing, "versions": versions, "arguments": arguments}
    lines = [_HEAD.format(**head)]
    if len(rows) < len(PODS):
        lines.append(f"{len(rows)} of {len(PODS)} rows have been made so far.\n")
    lines.append(f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}")
    for name, row in rows.items():
        lines.append(f"| {' | '.join(_cells(name, row))} |")
    return "\n".join(lines) + "\n"


def _cells(name: str, row: dict) -> list[str]:
    lead = name.split()
    if "plan" not in row:
        return [*lead, *[""] * 4, f"failed: {row['error']}", *[""] * 8]
    plan: Plan = from_json(row["plan"])
    chosen, memory = plan.settings, plan.memory
    lead += [plan.mesh, f"{chosen['rows']} x {chosen['length']}", str(chosen["micro_batches"])]
    lead += [chosen["remat"]]
    if plan.problem:
        return [*lead, f"does not fit: {plan.problem}", *[""] * 8]
    scale = 2 if plan.chip == "v7x" else 1
    return [
        *lead,
        f"{memory.total / GIB:.1f} of {memory.limit / GIB:.1f}",
        f"{memory.spare:.0%}",
        f"{plan.mfu:.1%}",
        f"{plan.mfu_compute:.1%}",
        f"{scale * plan.tokens_per_second:,.0f}",
        f"{plan.times.step:.2f}",
        plan.times.bound_by,
        f"{plan.all_reduced / 1e9:.3f}",
        ("yes" if set(dict(CHIPS[plan.chip].flags)) <= set(_options(plan)) else "no")
        + (_ARGUMENTS if _arguments(row) else ""),
    ]


def _arguments(row: dict) -> str:
    return row["made"]["LIBTPU_INIT_ARGS"]


def _versions(row: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in row["made"]["versions"].items())


def _fails(row: dict) -> bool:
    """Whether a row has no plan, does not fit, or leaves too little memory free."""
    if "plan" not in row or row["plan"]["problem"] or row["plan"]["warnings"]:
        return True
    return row["plan"]["memory"]["spare"] < LEAST_SPARE


def _options(plan: Plan) -> list[str]:
    return [option.partition("=")[0] for option in plan.settings["compiler"].split()]


def _plan_row(config: str, pod: str, with_flags: bool, replan: bool) -> dict:
    """Plans a row in another process: a crash of the compiler then fails one row only."""
    packing = PACKING[config.rsplit("_", 1)[1]]
    command = [sys.executable, "-m", "neo_jax.plan", config, "--pod", pod]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "plan.json"
        command += ["--packing", packing, "--json", str(path), *["--no-cache"] * replan]
        command += ["--no-flags"] * (not with_flags)
        ended = subprocess.run(command, capture_output=True, text=True)
        text = path.read_text() if path.exists() else ""
    if ended.returncode in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    if not text:
        reason = ended.stderr.strip().split("\n")[-1][:200]
        return {"error": reason or f"ended with {ended.returncode}"}
    return {"plan": json.loads(text)[0]}


def _replace(path: Path, text: str) -> None:
    """Writes a file atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text)
    partial.rename(path)
