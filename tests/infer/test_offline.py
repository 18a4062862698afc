"""Batches of requests that are killed, mistaken, changed or starved: nothing lost or doubled."""

import json
import os
import resource
from pathlib import Path

import pytest

from helpers.batch_runs import (
    answer_text,
    answered,
    ask,
    read_lines,
    run_and_kill,
    serve,
    unasked,
    write_lines,
)
from helpers.golden import raises
from neo_jax.infer import offline
from neo_jax.infer.offline import Counts, run_batch
from neo_jax.infer.request import Request, Result
from neo_jax.infer.sampling import Sampling


def test_five_kills_lose_and_double_nothing(tmp_path):
    seeds = {f"q{i}": i for i in range(200)}
    records = [{"id": name, "prompt": "ask " + name, "seed": i} for name, i in seeds.items()]
    source, target = write_lines(tmp_path / "in.jsonl", *records), tmp_path / "out.jsonl"
    before = b""
    for wanted in (1, 23, 40, 9, 55):
        run_and_kill(source, target, wanted)
        after = target.read_bytes()
        assert after.startswith(before)
        assert after.count(b"\n") >= before.count(b"\n") + wanted - 1
        before = after[: after.rfind(b"\n") + 1]
    kept = before.count(b"\n")
    counts = run_batch(source, target, serve)
    assert counts == Counts(total=200, kept=kept, failed=0, written=200 - kept)
    assert counts.written > 0
    assert target.read_bytes().startswith(before)
    asked = {name: Request("ask " + name, sampling=Sampling(seed=i)) for name, i in seeds.items()}
    answers = {name: line["text"] for name, line in read_lines(target).items()}
    assert answers == {name: answer_text(request) for name, request in asked.items()}


def test_a_file_cut_anywhere_goes_on(tmp_path, monkeypatch):
    source, target = ask(*({"prompt": f"ask {i}"} for i in range(3)), folder=tmp_path)
    whole = target.read_bytes()
    monkeypatch.setattr(offline.os, "fsync", lambda file: None)  # for speed
    for size in range(len(whole)):
        target.write_bytes(whole[:size])
        run_batch(source, target, serve)
        kept = whole[: whole[:size].rfind(b"\n") + 1]
        assert target.read_bytes().startswith(kept)
        assert sorted(target.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_an_answer_says_all_there_is(tmp_path):
    _, target = ask({"id": 5, "prompt": "a", "meta": {"gold": ["é", "\ud800"]}}, folder=tmp_path)
    raw = target.read_bytes()
    assert raw.startswith(b'{"id": 5, "text": "a ' + "回".encode())
    line = json.loads(raw)
    key = line.pop("key")
    assert len(key) == 16
    assert line.pop("text") == answer_text(Request("a"))
    usage = {"prompt_tokens": 3, "cached_tokens": 0, "completion_tokens": 0}
    assert line == {
        "id": 5,
        "token_ids": [1, 7],
        "finish_reason": "stop",
        "usage": usage,
        "meta": {"gold": ["é", "\ud800"]},
    }


def test_errors_are_kept_or_retried(tmp_path):
    source, target = ask({"prompt": "a"}, {"prompt": "fail"}, "{", {"prompt": "b"}, folder=tmp_path)
    before = read_lines(target)
    assert before["2"]["error"] == "in.jsonl:2: image x.png: no such file"
    assert before["line 3"]["error"].startswith("in.jsonl:3: not JSON")
    assert run_batch(source, target, unasked) == Counts(total=4, kept=4, failed=2)
    assert read_lines(target) == before
    write_lines(source, {"prompt": "a"}, {"prompt": "fail"}, "[", {"prompt": "b"})
    with raises("id 'line 3' was another request .*in.jsonl:3.*or retry errors"):
        run_batch(source, target, unasked)
    write_lines(
        source, {"prompt": "a"}, {"prompt": "c"}, {"id": "x", "prompt": "d"}, {"prompt": "b"}
    )
    with raises("out.jsonl:.: id 'line 3' is not in .*in.jsonl: .*or retry errors"):
        run_batch(source, target, unasked)
    assert read_lines(target) == before
    (tmp_path / ".out.jsonl.partial").write_text("left by a kill")
    counts = run_batch(source, target, serve, retry_errors=True)
    assert counts == Counts(total=4, kept=2, failed=0, written=2)
    after = read_lines(target)
    assert (after["1"], after["4"]) == (before["1"], before["4"])
    assert (after["2"]["text"], after["x"]["text"]) == (
        answer_text(Request("c")),
        answer_text(Request("d")),
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_retry_that_cannot_be_written_keeps_what_was_there(tmp_path, monkeypatch):
    source, target = ask({"prompt": "a"}, {"prompt": "fail"}, folder=tmp_path)
    before = target.read_bytes()

    def fill_up(*arguments):
        raise OSError(28, "No space left on device")

    for place, name in ((Path, "replace"), (offline, "_write")):
        with monkeypatch.context() as patch, raises("out.jsonl: cannot write: No space left"):
            patch.setattr(place, name, fill_up)
            run_batch(source, target, unasked, retry_errors=True)
        assert target.read_bytes() == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    (tmp_path / "link").symlink_to(target)
    assert run_batch(source, tmp_path / "link", serve, retry_errors=True).failed == 1
    assert (tmp_path / "link").is_symlink()
    assert len(read_lines(target)) == 2


def test_two_requests_with_one_id_stop_before_anything_is_done(tmp_path):
    for lines in ([{"id": 3}, "", {"id": "3"}], [{"id": "3"}, {"id": "x"}, {}]):
        source = write_lines(tmp_path / "in.jsonl", *lines)
        with raises("in.jsonl:3: id '3' is that of line 1 too"):
            run_batch(source, tmp_path / "new/out.jsonl", unasked)
    assert not (tmp_path / "new").exists()


def test_answers_to_other_requests_are_refused(tmp_path):
    first, second = {"id": "a", "prompt": "a"}, {"id": "b", "prompt": "b", "meta": 1}
    source, target = ask(first, second, folder=tmp_path)
    before = target.read_bytes()
    write_lines(source, {**second, "seed": 1}, first)
    with raises("out.jsonl:1: id 'b' was another request .*in.jsonl:1.*or remove the line"):
        run_batch(source, target, unasked)
    write_lines(source, first)
    with raises("out.jsonl:1: id 'b' is not in .*in.jsonl"):
        run_batch(source, target, unasked)
    write_lines(source, first, second)
    for other in ({"settings": {"model": "B"}}, {"defaults": {"max_new_tokens": 8}}):
        with raises("id 'b' was another request or had other settings"):
            run_batch(source, target, unasked, **other)
    target.write_bytes(before + before[:-30])
    with raises("out.jsonl:3: id 'b' is in line 1 too"):
        run_batch(source, target, unasked)
    assert target.read_bytes() == before + before[:-30]
    target.write_bytes(before)
    write_lines(source, {"prompt": "new"}, "", first, {**second, "system": None})
    assert run_batch(source, target, serve) == Counts(total=3, kept=2, failed=0, written=1)


@pytest.mark.parametrize(
    "text", ["notes", "{}\n", "5\n", '{"id": 1}\n', "\n", '{"x": 1}', "a\nb\n"]
)
def test_a_file_of_something_else_is_left_alone(text, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "a"})
    target = tmp_path / "out.jsonl"
    target.write_text(text)
    with raises("out.jsonl:1: not an answer: choose another file"):
        run_batch(source, target, unasked)
    assert target.read_text() == text
    with raises("in.jsonl: not a file of answers"):
        run_batch(source, source, unasked)


def test_two_runs_on_one_file_are_refused(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "fail"})
    target = tmp_path / "out.jsonl"

    def serve_beside(requests):
        with raises("out.jsonl: another run is writing it: wait"):
            run_batch(source, target, unasked, retry_errors=True)
        yield from serve(requests)

    run_batch(source, target, serve_beside)
    counts = run_batch(source, target, serve_beside, retry_errors=True)
    assert counts == Counts(total=2, kept=1, failed=1, written=1)
    assert len(read_lines(target)) == 2


def test_a_file_that_another_run_replaces_meanwhile_is_refused(tmp_path, monkeypatch):
    source, target = ask({"prompt": "a"}, folder=tmp_path)
    before = target.read_bytes()

    def replaced(file, how):
        (tmp_path / "new").write_bytes(before)
        (tmp_path / "new").replace(target)

    monkeypatch.setattr(offline.fcntl, "flock", replaced)
    with raises("out.jsonl: another run is writing it"):
        run_batch(source, target, unasked)
    assert target.read_bytes() == before


def test_requests_are_read_when_needed(tmp_path, monkeypatch):
    source = write_lines(tmp_path / "in.jsonl", *({"prompt": f"ask {i}"} for i in range(20)))
    read, seen = offline.read_records, []

    def watched(*arguments):
        seen.clear()
        for record in read(*arguments):
            seen.append(record)
            yield record

    def watch(requests):
        for number, request in enumerate(requests):
            assert len(seen) == number + 1
            yield number, answered(request)

    monkeypatch.setattr(offline, "read_records", watched)
    assert run_batch(source, tmp_path / "out.jsonl", watch).written == 20


def test_progress_is_told(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "a"}, "{", {"prompt": "fail"})
    told = []
    run_batch(source, tmp_path / "out.jsonl", serve, on_progress=told.append)
    assert told == [
        Counts(3, 0, failed, written) for failed, written in ((0, 0), (1, 1), (2, 2), (2, 3))
    ]


def test_a_disk_that_fills_up_keeps_what_is_written(tmp_path):
    source, target = ask(*({"prompt": f"ask {i}"} for i in range(20)), folder=tmp_path)
    whole, limits = target.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (len(whole) // 2, len(whole) - 1):
        target.unlink()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            with raises("out.jsonl: cannot write: .*what it has is safe: mend this and run again"):
                run_batch(source, target, serve)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert target.read_bytes() == whole[:size]
        counts = run_batch(source, target, serve)
        assert counts.kept == whole[:size].count(b"\n") > 5
        assert sorted(target.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_wrong_paths_are_named(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "a"})
    (tmp_path / "empty").write_text("\n")
    os.mkfifo(tmp_path / "pipe")
    for wrong, error in (
        ("absent", "absent: cannot read: No such file"),
        (".", "not a file: name one with a JSON object a line"),
        ("pipe", "pipe: not a file"),
        ("empty", "empty: no requests in it"),
    ):
        with raises(error):
            run_batch(tmp_path / wrong, tmp_path / "out.jsonl", unasked)
    for wrong, error in (
        (".", "not a file of answers"),
        ("pipe", "not a file of answers"),
        ("in.jsonl/out", "in.jsonl/out: cannot write: .*choose another place"),
    ):
        with raises(error):
            run_batch(source, tmp_path / wrong, unasked)
    run_batch(source, str(tmp_path / "a/b/out.jsonl"), serve)
    assert len(read_lines(tmp_path / "a/b/out.jsonl")) == 1


def test_an_input_that_changes_meanwhile_is_noticed(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    target = tmp_path / "out.jsonl"

    def serve_changed(requests):
        write_lines(source, {"prompt": "a"}, {"prompt": "c"}, {"prompt": "d"})
        yield from serve(requests)

    with raises("in.jsonl: changed while it was read, 1 are left: run again"):
        run_batch(source, target, serve_changed)
    assert list(read_lines(target)) == ["1"]
    assert run_batch(source, target, serve).written == 2


def test_an_engine_that_stops_early_is_an_error_and_is_closed(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "b"})
    closed = []

    def serve_wrongly(requests):
        try:
            next(requests)
            next(requests)
            yield 1, Result("b", (), "stop", {})
            yield 1, Result("b", (), "stop", {})
        finally:
            closed.append(True)

    with pytest.raises(KeyError):
        run_batch(source, tmp_path / "out.jsonl", serve_wrongly)
    assert closed == [True]
    with pytest.raises(RuntimeError, match="without an answer to 1 requests"):
        run_batch(
            source, tmp_path / "out.jsonl", lambda requests: (x for x in [next(requests)][:0])
        )
    assert list(read_lines(tmp_path / "out.jsonl")) == ["2"]
