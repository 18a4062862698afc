"""Metrics of a run as files (`metrics.jsonl`, TensorBoard), and the FLOPs that MFU is made of."""

import json
import math
from collections.abc import Mapping, Sequence

import jax
from etils import epath
from flax import traverse_util

from neo_jax.model.neo import abstract_params
from neo_jax.model_config import ModelConfig
from neo_jax.train import param_paths

# Dense bfloat16 FLOP/s of one device, by the start of its `device_kind`.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 1153.5e12,  # half a chip
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


class Metrics:
    """Writes named numbers by step. Only the first process does. A context manager.

    Args:
      resumed_at: the step of the checkpoint. Lines of later steps are dropped: they are of a run
        that was stopped, and its steps are taken again.
    """

    def __init__(self, workdir: epath.Path, resumed_at: int):
        self._is_writer = jax.process_index() == 0
        if not self._is_writer:
            return
        from tensorboardX import SummaryWriter

        self._path, kept = workdir / "metrics.jsonl", []
        if self._path.exists():
            lines = [line for line in self._path.read_text().splitlines() if _is_complete(line)]
            kept = [line for line in lines if json.loads(line)["step"] <= resumed_at]
        partial = workdir / ".metrics.jsonl"
        partial.write_text("".join(f"{line}\n" for line in kept))
        partial.replace(self._path)  # atomic: a kill loses nothing
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resumed_at + 1)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error) -> None:
        if self._is_writer:
            self._board.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        if not self._is_writer:
            return
        append_line(self._path, json.dumps({"step": step, **values}))
        for name, value in values.items():
            self._board.add_scalar(name, value, step)


def append_line(path: epath.Path, line: str) -> None:
    """Adds a line to a small file. Object stores cannot append: there the file is rewritten."""
    if "://" in str(path):
        before = path.read_text() if path.exists() else ""
        path.write_text(f"{before}{line}\n")
        return
    with path.open("a") as file:
        file.write(f"{line}\n")


def flops_per_batch(
    c: ModelConfig, tokens: int, patches: int, keys: float, trainable: Sequence[str] = (".*",)
) -> float:
    """FLOPs of matrix products that one train step needs, forward and backward.

    Args:
      tokens, patches: in the batch, without padding.
      keys: the number of keys that each token attends to, summed over tokens.
      trainable: path rules; frozen weights have no gradients.
    """
    params = abstract_params(c)
    with_gradients = set(param_paths.matching(params, trainable)) if trainable else set()
    head = "embed" if c.tie_word_embeddings else "lm_head"
    products = 3 * keys * c.num_layers * c.num_attention_heads * (c.qk_width + c.head_dim)
    for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
        if "norm" in path or "bias" in path:
            continue
        if "/attention/" in path or "/mlp/" in path or path == head:
            uses = tokens
        elif path.startswith("patch_embed/"):
            uses = patches / 4 if path.endswith("merge_qed") else patches
        else:
            continue
        products += (3 if path in with_gradients else 2) * uses * math.prod(leaf.shape)
    return 2 * products


def peak_flops(devices: int) -> float | None:
    """Dense bfloat16 FLOP/s of so many devices together; None for a kind not in the table."""
    kind = jax.devices()[0].device_kind
    known = [flops for name, flops in PEAK_FLOPS.items() if kind.startswith(name)]
    # "TPU v5 lite" also starts with "TPU v5"; the smaller number is that of the longer name.
    return min(known) * devices if known else None


def _is_complete(line: str) -> bool:
    try:
        return "step" in json.loads(line)
    except ValueError:
        return False
