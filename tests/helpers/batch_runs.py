"""A stand-in for a model that answers requests, and runs of batches with it that can be killed."""

import json
import signal
import subprocess
import sys
import zlib
from pathlib import Path

from neo_jax.infer.offline import run_batch
from neo_jax.infer.request import Result

# Writes each answer in two parts, with a pause, and tells before the second; then stops for good.
_SLOW = """
import sys, time
sys.path.insert(0, "tests")
from helpers.batch_runs import run_batch, serve
from neo_jax.infer import offline
source, target, last = sys.argv[1:]
told = 0

def write(file, data):
    global told
    file.write(data[: len(data) // 2])
    told += 1
    print(told, flush=True)
    time.sleep(1000 if told == int(last) else 0.001)
    file.write(data[len(data) // 2 :])

offline._write = write
run_batch(source, target, serve)
"""


def answer_text(request):
    """What `serve` answers: it depends on all of the request."""
    return f"{request.prompt} 回 {zlib.crc32(repr(request).encode())}"


def serve(requests, window=7):
    """Takes a few requests and answers them out of order; "fail" in a prompt is an error."""
    held = {}
    for number, request in enumerate(requests):
        held[number] = request
        if len(held) == window:
            chosen = list(held)[number * 5 % window]
            yield chosen, answered(held.pop(chosen))
    for number in reversed(held):
        yield number, answered(held[number])


def answered(request):
    if "fail" in request.prompt:
        return Result("", (), "error", {}, "image x.png: no such file")
    return Result(answer_text(request), (len(request.prompt), 7), "stop", {"prompt_tokens": 3})


def unasked(requests):
    raise AssertionError("there is nothing to ask")


def write_lines(path, *lines):
    """Each line is text or an object to write as JSON."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_bytes("".join(text + "\n" for text in texts).encode())
    return path


def read_lines(path):
    """The answers by id; none may be there twice."""
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len({str(line["id"]) for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def ask(*lines, folder):
    """Writes requests and their answers; returns both paths."""
    source = write_lines(folder / "in.jsonl", *lines)
    run_batch(source, folder / "out.jsonl", serve)
    return source, folder / "out.jsonl"


def run_and_kill(source, target, wanted):
    """Runs a batch in a process of its own and kills it at the wanted answer, or near."""
    arguments = [sys.executable, "-c", _SLOW, str(source), str(target), str(wanted + 5)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    while int(process.stdout.readline()) < wanted:
        pass
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
