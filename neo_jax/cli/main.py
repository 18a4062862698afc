"""`neo-ov`: one command for everything.

This module only finds the command that is named. Each command is a module with
`main(argv, prog) -> exit code`, imported when it is needed.
"""

import difflib
import importlib
import sys
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from neo_jax.command_line import run_command


class Command(NamedTuple):
    module: str
    summary: str
    on_interrupt: str = "interrupted"


COMMANDS = {
    "ask": Command("neo_jax.cli.ask_command", "one question about images or a video"),
    "batch": Command("neo_jax.cli.batch_command", "a file of requests to a file of answers"),
    "eval": Command("neo_jax.cli.eval_command", "benchmarks: answers, scores and a report"),
    "train": Command(
        "neo_jax.cli.train_command",
        "train, fine-tune or go on with a run",
        "interrupted; run it again to go on from the last save",
    ),
    "data": Command("neo_jax.cli.data_command", "check training records before a run"),
    "convert from-hf": Command("neo_jax.convert.from_hf", "published safetensors to Orbax"),
    "convert to-hf": Command("neo_jax.convert.to_hf", "Orbax to published safetensors"),
    "convert from-qwen3": Command("neo_jax.convert.from_qwen3", "grow a NEO from a plain Qwen3"),
    "plan": Command(
        "neo_jax.plan.__main__",
        "memory and time of a run on TPUs that you have not rented",
        "interrupted; what was compiled is kept",
    ),
}


def main(
    argv: Sequence[str] | None = None,
    prog: str = "neo-ov",
    names: Sequence[str] = tuple(COMMANDS),
) -> int:
    """Runs `argv` and returns its exit code.

    Args:
      argv: the command's name and its arguments; default: those of the process.
      prog: how the user called it, for help and errors.
      names: the commands that `argv` may name.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    return run_command(prog.split()[-1], lambda: _dispatch(given, prog, names))


def _dispatch(argv: list[str], prog: str, names: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(prog, names))
        return 0 if argv else 2
    for length in (2, 1):
        if (name := " ".join(argv[:length])) in names:
            return run(name, argv[length:], f"{prog} {name}", prog.split()[-1])
    group = [name for name in names if name.startswith(f"{argv[0]} ")]
    if group and argv[1:] in ([], ["-h"], ["--help"]):
        print(_overview(prog, group))
        return 0 if argv[1:] else 2
    given = " ".join(argv[:2] if group else argv[:1])
    near = difflib.get_close_matches(given, names, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(group or names)}"
    print(f"{prog.split()[-1]}: no command {given!r}; {hint}", file=sys.stderr)
    return 2


def run(name: str, argv: Sequence[str], prog: str, label: str) -> int:
    """Runs one of COMMANDS; `label` begins the line of an error."""
    command = COMMANDS[name]

    def execute() -> int:
        return importlib.import_module(command.module).main(list(argv), prog)

    return run_command(label, execute, command.on_interrupt)


def _overview(prog: str, names: Sequence[str]) -> str:
    rows = "\n".join(f"  {name:20}{COMMANDS[name].summary}" for name in names)
    return textwrap.dedent(
        """\
        usage: {prog} COMMAND ...

        NEO-ov, the vision-language model without a vision encoder, in JAX.

        {rows}

        {prog} COMMAND --help shows a command's options and examples."""
    ).format(prog=prog, rows=rows)
