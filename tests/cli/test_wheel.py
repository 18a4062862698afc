"""The package as `pip install` leaves it: one package, one command, from any directory."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

from helpers.golden import GOLDEN, ROOT, load_case


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A fresh environment with the wheel; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves files beside the sources
    shutil.copytree(ROOT / "neo_jax", source / "neo_jax")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    build = [*pip, "wheel", "--quiet", *offline, "--wheel-dir", str(folder), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("neo_ov_jax-*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv/bin/python"
    arguments = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([str(python), "-m", "pip", *arguments], check=True)
    site = next((folder / "venv/lib").glob("python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return wheel, folder / "venv/bin"


def run(bin_folder, where, *arguments):
    environment = {"PATH": os.environ["PATH"], "HOME": str(where), "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [str(bin_folder / "neo-ov"), *map(str, arguments)],
        cwd=where, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_only_the_package_is_installed(installed):
    wheel, _ = installed
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"neo_jax"}
    wanted = "py.typed", "configs/neo_ov_2b_sft.py", "convert/from_hf.py", "plan/kernel_cycles.json"
    assert {f"neo_jax/{name}" for name in wanted} <= set(names)


@pytest.mark.slow
def test_the_command_answers_from_another_directory(installed, tmp_path):
    _, bin_folder = installed
    listed = run(bin_folder, tmp_path, "--help")
    assert listed.returncode == 0
    for name in ("ask", "batch", "eval", "train", "data", "convert from-hf", "plan"):
        assert f"\n  {name} " in listed.stdout
    model, image = GOLDEN / "generate/hf", GOLDEN / "generate/images/image_0.png"
    options = ["--model", model, "--image", image, "--dtype", "float32", "--max-new-tokens", 5]
    asked = run(bin_folder, tmp_path, "ask", *options, "What is this?")
    assert asked.returncode == 0, asked.stderr
    wanted = load_case("generate").chat("What is this?", [image], max_new_tokens=5)
    assert asked.stdout == wanted + "\n"
    shown = run(bin_folder, tmp_path, "train", "neo_ov_2b_sft", "--show")
    assert json.loads(shown.stdout)["model"] is None
    missing = run(bin_folder, tmp_path, "convert", "from-hf", "absent", "out")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    assert "absent: no such directory" in missing.stderr
