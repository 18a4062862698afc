"""Start of a run: its mesh, model, tokenizer and parameters, and the files that describe it."""

import dataclasses
import json
import math
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import jax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from neo_jax.data import synthetic
from neo_jax.data.tokenizer import NeoTokenizer
from neo_jax.errors import InputError
from neo_jax.model.neo import abstract_params, init_params
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import make_mesh
from neo_jax.train.train_config import RENAMED, Config
from neo_jax.weights.checkpoint import DESCRIPTION, describe
from neo_jax.weights.directory import side_files
from neo_jax.weights.load import load_params, side_directory

# Settings that may differ when a run is resumed: they do not change what a step computes. With
# other `steps` the learning rate goes on along their cosine.
MAY_CHANGE = {
    *("workdir", "mesh", "steps", "held_out", "log_every", "eval_every", "eval_batches"),
    *("save_every", "keep", "keep_every", "profile", "remat", "attention"),
}
MAY_CHANGE_IN_DATA = {"max_bad_share"}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow")
RUN = "run.json"
OF_A_MODEL = ("config.json", "generation_config.json")


def run_folder(workdir: str) -> epath.Path:
    """The folder of a run. A local one is made absolute, as Orbax requires."""
    return epath.Path(workdir if "://" in workdir else os.path.abspath(workdir))


def run_mesh(sizes: tuple[int, ...]) -> Mesh:
    """The mesh of a run; a size of -1 stands for all devices that are left.

    Raises:
      InputError: if the sizes do not divide the devices, or leave a host without any.
    """
    count, known = jax.device_count(), math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or known < 1 or min(sizes) < -1 or count % known:
        raise InputError(f"mesh {sizes}: does not divide {count} devices; one size may be -1")
    if jax.process_count() > 1 and -1 not in sizes and known < count:
        raise InputError(
            f"mesh {sizes} has {known} devices, all hosts together {count}: all must be in it"
        )
    return make_mesh([count // known if size == -1 else size for size in sizes])


def starting_point(c: Config, mesh: Mesh) -> tuple[ModelConfig, NeoTokenizer, dict]:
    """The model, its tokenizer and its float32 parameters on the mesh.

    Raises:
      InputError: if there is nothing to start from, or model, tokenizer and mesh do not fit.
    """
    if bool(c.start) == bool(c.model):
        raise InputError("give either start=DIRECTORY, a checkpoint, or a config with a model")
    if c.lora.rank and not c.start:
        raise InputError("lora adapts an existing model: give start=DIRECTORY")
    if c.start:
        model, params = load_params(c.start, "float32", mesh)
        model = dataclasses.replace(model, dtype=c.dtype)
        tokenizer = _tokenizer(c.tokenizer or str(side_directory(c.start)))
    else:
        model = dataclasses.replace(c.model, dtype=c.dtype)
        tokenizer = _tokenizer(c.tokenizer)
        abstract_params(model, mesh)  # raises if the mesh does not divide them
        with jax.set_mesh(mesh):
            params = _new_params(model, c.seed, c.init_scale)
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model "
            f"{model.vocab_size} rows of embeddings"
        )
    return model, tokenizer, params


def write_run(
    c: Config, model: ModelConfig, tokenizer: NeoTokenizer, data: str, paths: Sequence[str]
) -> None:
    """Writes the description of a new run into its folder, or checks that of a run to resume.

    Args:
      data: the fingerprint of the training data.
      paths: of the trainable parameters, or with LoRA of the matrices that have factors.

    Raises:
      InputError: naming the settings in which the run to resume differs.
    """
    workdir = run_folder(c.workdir)
    settings = json.loads(json.dumps(dataclasses.asdict(c)))
    path = workdir / RUN
    if path.exists():
        before = json.loads(path.read_text())
        changed = _changes(before["config"], settings)
        if before["data"] != data:
            changed.append(f"the data: {before['data']} is now {data}")
        if changed:
            raise InputError(
                f"{workdir} holds a run with other settings: "
                + "; ".join(changed)
                + ". Set them back, or use another workdir"
            )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("run.json checked")
    if jax.process_index() or path.exists():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    for name, content in _side_files(c, tokenizer).items():
        (workdir / name).write_text(content)
    lora = None
    if c.lora.rank:
        base = str(Path(c.start).absolute())
        lora = {"base": base, "paths": paths, "rank": c.lora.rank, "scale": c.lora.scale}
    (workdir / DESCRIPTION).write_text(describe(model, lora))
    versions = {name: metadata.version(name) for name in PACKAGES}
    versions["python"] = platform.python_version()
    devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    content = {"config": settings, "data": data, "versions": versions, "devices": devices}
    partial = path.with_name(f".{RUN}")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.rename(path)  # last, and atomic: after a kill there is a run or there is none


def _tokenizer(directory: str) -> NeoTokenizer:
    if directory == synthetic.NAME:
        return synthetic.tokenizer()
    if not directory:
        raise InputError("tokenizer: name a directory with a NEO tokenizer")
    return NeoTokenizer.from_directory(directory)


def _side_files(c: Config, tokenizer: NeoTokenizer) -> dict[str, str]:
    """Tokenizer and configuration files, by name: with them the folder is a checkpoint."""
    if c.tokenizer == synthetic.NAME:
        return {"tokenizer.json": tokenizer.to_json()}
    start = side_files(side_directory(c.start)) if c.start else []
    others = side_files(Path(c.tokenizer)) if c.tokenizer else start
    # The directory of a tokenizer may hold another model's configuration.
    paths = [path for path in others if path.name not in OF_A_MODEL]
    paths += [path for path in start if path.name in OF_A_MODEL]
    return {path.name: path.read_text() for path in paths}


def _new_params(model: ModelConfig, seed: int, scale: float) -> dict:
    def make(key):
        params = init_params(model, key)
        is_random = lambda path: path[0].key != "patch_embed" and "norm" not in path[-1].key  # noqa: E731
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf * scale if is_random(path) else leaf, params
        )

    return jax.jit(make)(jax.random.key(seed))


def _changes(before: dict, now: dict) -> list[str]:
    def flat(config):
        data = {f"data.{k}": v for k, v in config["data"].items() if k not in MAY_CHANGE_IN_DATA}
        rest = {RENAMED.get(k, k): v for k, v in config.items()}
        rest = {k: v for k, v in rest.items() if k not in MAY_CHANGE and k != "data"}
        return rest | data

    before, now = flat(before), flat(now)
    return [
        f"{name} was {before.get(name)!r}, is now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
