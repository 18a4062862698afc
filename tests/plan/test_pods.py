"""The table of pods: its settings, the committed plans, and how it is updated."""

import json
import subprocess
from pathlib import Path

import pytest

from helpers.golden import needs_compiler
from neo_jax.configs.find import find_config, on_pod
from neo_jax.configs.pods import PODS
from neo_jax.plan import pods_table, search
from neo_jax.plan.chips import CHIPS
from neo_jax.plan.plan_report import LEAST_SPARE
from neo_jax.plan.result import from_json
from neo_jax.train.train_config import override

DOCS = Path(__file__).parents[2] / "docs"


def _rows():
    kept = json.loads((DOCS / "pods.json").read_text())
    rows = {name: kept.pop(" ".join(name)) for name in PODS}
    assert not kept
    return rows


def test_every_pod_has_settings_that_its_config_takes():
    for (name, pod), settings in PODS.items():
        path = f"configs/{name}.py"
        config = on_pod(find_config(path).get_config(), path, pod)
        assert config == override(find_config(path).get_config(), settings)


def test_the_committed_table_is_of_these_settings_and_everything_fits():
    rows = {" ".join(name): row for name, row in _rows().items()}
    for name, row in rows.items():
        assert tuple(row["settings"]) == PODS[tuple(name.split())], name
        plan = from_json(row["plan"])
        # The executed FLOPs are at least those that the model needs.
        assert plan.times.products > plan.model_flops / CHIPS[plan.chip].flops, name
        assert not plan.problem, name
        assert not plan.warnings, name
        assert plan.memory.spare >= LEAST_SPARE, name
        assert plan.all_reduced < 0.1e9, name
    assert (DOCS / "pods.md").read_text() == pods_table.markdown(rows)


@pytest.mark.slow
@needs_compiler
def test_a_search_leaves_out_nothing_that_fits():
    """The bytes that a search computes beforehand are no more than a row of the table needs."""
    for (name, pod), row in _rows().items():
        path = f"configs/{name}.py"
        module = find_config(path)
        c = on_pod(module.get_config(), path, pod)
        fixed = {"mesh": c.mesh, "remat": c.remat, "micro_batches": c.micro_batches}
        ((one, least),) = search.candidates(c, module.MODEL, pod, **fixed)
        assert one == c
        assert least <= row["plan"]["memory"]["total"], (name, pod)


def test_a_row_that_failed_is_made_again(tmp_path, monkeypatch):
    ends = iter([-6, 2])

    def dies(command, **options):
        return subprocess.CompletedProcess(command, next(ends), "", "a reason\n")

    monkeypatch.setattr(subprocess, "run", dies)
    monkeypatch.setattr(pods_table, "find_topology", lambda pod: None)
    table = tmp_path / "pods.md"
    for _ in range(2):
        assert pods_table.write_table(str(table), "2b_sft v5e-16") == 1
        assert "failed: a reason" in table.read_text()
    with pytest.raises(StopIteration):
        pods_table.write_table(str(table), "2b_sft v5e-16")


def test_the_table_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    made = []

    def plan_row(config, pod, with_flags, replan):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append((config, pod))
        return {"plan": {"problem": "nothing", "warnings": []}}

    monkeypatch.setattr(pods_table, "_plan_row", plan_row)
    monkeypatch.setattr(pods_table, "find_topology", lambda pod: None)
    table = tmp_path / "pods.md"
    with pytest.raises(KeyboardInterrupt):
        pods_table.write_table(str(table), "2b_sft v5e")
    first, made[:] = list(made), []
    with pytest.raises(KeyboardInterrupt):
        pods_table.write_table(str(table), "2b_sft v5")
    assert not set(first) & set(made)
    assert len(json.loads(table.with_suffix(".json").read_text())) == 4
