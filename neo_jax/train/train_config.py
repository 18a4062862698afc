"""The settings of a training run as frozen dataclasses, their overrides, and their JSON."""

import ast
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from neo_jax.data.pipeline import DataConfig
from neo_jax.errors import InputError
from neo_jax.kernels.interval_attention import IMPLEMENTATIONS
from neo_jax.model.decoder import REMAT_POLICIES
from neo_jax.model_config import ModelConfig
from neo_jax.sharding import batch_rows, describe, row_parts
from neo_jax.train.optimizer import OptimConfig

# Earlier names of settings, which old run folders and command lines have.
RENAMED = {"trained": "trainable"}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    rank: int = 0  # 0: no LoRA
    alpha: float = 16.0  # the product of the two factors is scaled by alpha / rank
    targets: tuple[str, ...] = (r".*/attention/[qkvo]_[a-z_]*[a-z]{3}",)  # path rules

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Config:
    """A training run.

    It starts from the checkpoint at `start`, or from random parameters of `model`.
    """

    workdir: str = ""  # for checkpoints, metrics and all other files; local, or gs://...
    start: str = ""  # a published or converted checkpoint, or a run; gives model and tokenizer
    model: ModelConfig | None = None  # to train from scratch; None: the model of `start`
    tokenizer: str = ""  # a directory with its files; default: that of `start`
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    held_out: str = ""  # a mixture; its loss is measured every `eval_every` steps
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    trainable: tuple[str, ...] = (".*",)  # path rules; every other parameter is frozen
    steps: int = 1000
    seed: int = 0  # of new parameters, the order of records, and the rates of video frames
    init_scale: float = 1.0  # new matrices are sampled from N(0, (0.02 * init_scale)^2)
    dtype: str = "bfloat16"  # of matrix products; trainable parameters are float32
    # data, fsdp, tensor and, to split rows too, context; -1: all devices that are left
    mesh: tuple[int, ...] = (1, -1, 1)
    micro_batches: int = 1  # of each step, one after the other
    remat: str = "full"  # what the backward pass recomputes, see model/decoder.py
    attention: str = "auto"  # see kernels/interval_attention.py
    log_every: int = 10  # steps
    eval_every: int = 0  # steps; 0: only at the end
    eval_batches: int = 8
    save_every: int = 1000  # steps
    keep: int = 3  # the newest checkpoints
    keep_every: int = 0  # steps; those are kept for ever. 0: none
    profile: tuple[int, int] = (0, 0)  # first and last step of a trace; (0, 0): none

    def __post_init__(self):
        if self.remat not in REMAT_POLICIES:
            raise InputError(f"remat {self.remat!r}: use one of {', '.join(REMAT_POLICIES)}")
        if self.attention not in IMPLEMENTATIONS:
            names = ", ".join(IMPLEMENTATIONS)
            raise InputError(f"attention {self.attention!r}: use one of {names}")
        if len(self.mesh) not in (3, 4):
            raise InputError(f"mesh {self.mesh}: give data, fsdp, tensor and perhaps context")
        if min(self.steps, self.micro_batches, self.log_every, self.save_every, self.keep) < 1:
            raise InputError("steps, micro_batches, log_every, save_every, keep: use 1 or more")
        if self.data.rows % self.micro_batches:
            raise InputError(
                f"data.rows ({self.data.rows}) must be a multiple of micro_batches "
                f"({self.micro_batches})"
            )

    def check_mesh(self, mesh: Mesh) -> None:
        """Raises InputError if the mesh does not divide the rows, or the tokens of a row."""
        parts, context = batch_rows(mesh), row_parts(mesh)
        if self.data.rows % (self.micro_batches * parts):
            raise InputError(
                f"data.rows is {self.data.rows}: use a multiple of {self.micro_batches} "
                f"micro-batches times {parts}, over which the mesh {describe(mesh)} splits rows"
            )
        limits = self.data.limits()
        if limits.length % context or limits.num_patches % (4 * context):
            raise InputError(
                f"data.length {limits.length} and data.num_patches {limits.num_patches}: use "
                f"multiples of {context} and {4 * context}, since the mesh splits rows "
                f"{context} ways"
            )


def override(config: Any, settings: Sequence[str]) -> Any:
    """A copy of a config with settings such as "optim.peak_lr=1e-5" applied.

    Raises:
      InputError: for an unknown name, with the nearest known one, or a value of another type.
    """
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"{setting!r}: write name=value, such as optim.peak_lr=1e-5")
        config = _replace(config, RENAMED.get(name, name).split("."), text, name)
    return config


def to_json(config: Any) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)


def _replace(config: Any, path: Sequence[str], text: str, whole: str) -> Any:
    names = [field.name for field in dataclasses.fields(config)]
    if path[0] not in names:
        near = difflib.get_close_matches(path[0], names, 1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}"
        raise InputError(f"{whole}: no setting {path[0]!r}{hint}")
    old = getattr(config, path[0])
    if len(path) > 1:
        if not dataclasses.is_dataclass(old):
            raise InputError(f"{whole}: {path[0]} has no settings of its own")
        return dataclasses.replace(config, **{path[0]: _replace(old, path[1:], text, whole)})
    hint = typing.get_type_hints(type(config))[path[0]]
    return dataclasses.replace(config, **{path[0]: _parse(text, hint, whole)})


def _parse(text: str, hint: Any, whole: str) -> Any:
    """The value of a setting's text, for a field of this type."""
    if hint is str:
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        value = value if isinstance(value, tuple | list) else (value,)
        kinds = parts[:1] * len(value) if Ellipsis in parts else parts
        if len(kinds) == len(value) and all(map(_is_a, value, kinds)):
            return tuple(value)
    elif isinstance(hint, types.UnionType) and value is None:
        return value
    elif _is_a(value, hint):
        return hint(value)
    kind = getattr(hint, "__name__", str(hint))
    raise InputError(f"{whole}: {text!r} is not {kind}")


def _is_a(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind
