"""The package's structure: imports point down, and a file is named by its name alone."""

import ast
import re
from collections import Counter

import neo_jax
from helpers.golden import ROOT

PACKAGE = ROOT / "neo_jax"
# From the bottom up; a layer may import itself and those before it. Names in one set are
# independent of each other.
LAYERS = (
    {"errors"},
    {"model_config", "command_line"},
    {"sharding", "distributed"},
    {"batch", "collectives"},
    {"kernels"},
    {"model"},
    {"data", "weights"},
    {"infer", "train"},
    {"eval"},
    {"demo", "convert"},
    {"configs"},
    {"plan"},
    {"cli"},
)
PUBLIC = "infer"  # where the names of `neo_jax` itself come from, seen from above


def modules():
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield path, parts


def imported(path):
    """The first part of each neo_jax module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.startswith("neo_jax."))


def test_imports_point_down():
    height = {name: number for number, layer in enumerate(LAYERS) for name in layer}
    found = []
    for path, (first, *_) in modules():
        if first == "__init__":
            continue
        for name in imported(path):
            name = name if name in height else PUBLIC
            is_sideways = name != first and height[name] == height[first]
            if height[name] > height[first] or is_sideways:
                found.append(f"{path.relative_to(ROOT)} imports {name}")
    assert found == []


def test_no_basename_stands_twice():
    counts = Counter(parts[-1] for _, parts in modules() if parts[-1] != "__init__")
    assert [name for name, count in counts.items() if count > 1] == []


def test_links_for_clones_point_into_the_package():
    """`configs/` and `convert/` are for users of a clone; there is one copy of each file."""
    for name in ("configs", "convert"):
        assert (ROOT / name).resolve() == PACKAGE / name


def test_every_stop_of_the_walks_is_there():
    stops = re.findall(r"`([\w/]+\.py):([\w.]+)`", (ROOT / "docs/walks.md").read_text())
    assert len(stops) > 40
    for file, name in stops:
        nodes = ast.parse((PACKAGE / file).read_text()).body
        for part in name.split("."):
            named = (n for n in nodes if getattr(n, "name", None) == part)
            found = next(named, None)
            assert found is not None, f"{file}: no {name}"
            nodes = found.body


def test_every_public_name_is_there():
    assert {name: getattr(neo_jax, name).__name__ for name in neo_jax.__all__} == {
        name: name for name in neo_jax.__all__
    }
