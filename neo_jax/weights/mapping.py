"""The key table: every tensor of a published checkpoint and its place in our parameters.

One row per parameter, read in both directions. A row says which tensor a parameter comes from,
how their dimensions correspond, and which channels of a head it takes in which order. Nothing
else in the project knows a checkpoint's key.

Checkpoints rotate channel i of an axis with channel i + width/2 of the same axis (the patch
embedding: channel 2i with 2i + 1). We keep the first halves of all axes together and then the
second halves, so that one half-swap serves every axis; `channels` holds that permutation.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from neo_jax.errors import InputError
from neo_jax.model_config import PATCH_SIZE, ModelConfig

Path = tuple[str, ...]
Index = tuple[slice, ...]

# Tensors of the generation branch in SenseNova-U1 checkpoints: known, not part of this model.
GENERATION = re.compile(r"_mot_gen(\.|$)|^fm_modules\.")

_LAYERS = "language_model.model.layers.{layer}."


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A parameter and its tensor.

    Attributes:
      path: place in the parameter tree; under pre_buffer or post_llm it is one layer's.
      key: the tensor's name, with {layer} for the number counted through both stacks.
      tensor, ours: the dimensions on each side, "(n h) d" and "d n h"; a group is flattened.
      sizes: of every letter, as the tensor has them.
      channels: which entries of letter `channel` the parameter takes, in its order.
    """

    path: Path
    key: str
    tensor: str
    ours: str
    sizes: Mapping[str, int]
    channel: str = ""
    channels: np.ndarray | None = None

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        return tuple(_size(group, self.sizes) for group in _groups(self.tensor))

    @property
    def our_rank(self) -> int:
        """Dimensions of the parameter, of one layer."""
        return len(_groups(self.ours))

    @property
    def is_layered(self) -> bool:
        return "{layer}" in self.key

    def read(self, get: Callable[[Index], np.ndarray], index: Index, out: np.ndarray) -> None:
        """Fills `out` with the part `index` of the parameter (of one layer).

        `get` gives a part of the tensor; it is asked only for the heads, rows and columns that
        `index` needs.
        """
        ours, theirs = _letters(self.ours), _letters(self.tensor)
        wanted = {letter: (0, self.sizes[letter]) for letter in theirs}
        for group, part in zip(_groups(self.ours), index, strict=True):
            size = self._our_size(group)
            if len(group) == 1:
                wanted[group] = part.indices(size)[:2]
            elif part.indices(size)[:2] != (0, size):
                raise ValueError(f"{self.key}: dimensions {group!r} cannot be split")
        outer = {group[0] for group in _groups(self.tensor)} - {self.channel}
        boxes = []
        for group in _groups(self.tensor):
            start, stop = wanted[group[0]] if group[0] in outer else (0, self.sizes[group[0]])
            block = _size(group[1:], self.sizes)
            boxes.append(slice(start * block, stop * block))
        counts = {**self.sizes, **{a: wanted[a][1] - wanted[a][0] for a in outer}}
        array = get(tuple(boxes)).reshape([counts[letter] for letter in theirs])
        for axis, letter in enumerate(theirs):
            if letter == self.channel:
                array = np.take(array, self.channels[slice(*wanted[letter])], axis=axis)
            elif letter not in outer:
                array = array[(slice(None),) * axis + (slice(*wanted[letter]),)]
        array = array.transpose([theirs.index(letter) for letter in ours])
        _copy(out.reshape(array.shape), array)

    def write(self, leaf: np.ndarray, tensor: np.ndarray) -> None:
        """Fills a tensor, or this row's channels of it, from a layer's whole parameter."""
        ours, theirs = _letters(self.ours), _letters(self.tensor)
        source = leaf.reshape([self._our_size(letter) for letter in ours])
        source = source.transpose([ours.index(letter) for letter in theirs])
        target = tensor.reshape([self.sizes[letter] for letter in theirs])
        if self.channel:
            target[(slice(None),) * theirs.index(self.channel) + (self.channels,)] = source
        else:
            _copy(target, source)

    def _our_size(self, letters: str) -> int:
        if self.channel and letters == self.channel:
            return len(self.channels)
        return _size(letters, self.sizes)


def rows(c: ModelConfig) -> list[Row]:
    """The table for a model. Rows of a layer serve every layer of both stacks."""
    sizes = {
        "d": c.hidden_size,
        "f": c.intermediate_size,
        "n": c.num_attention_heads,
        "k": c.num_key_value_heads,
        "h": c.head_dim,
        "v": c.vocab_size,
        "e": c.vision_hidden_size,
        "c": 3,
        "y": PATCH_SIZE,
        "x": PATCH_SIZE,
    }

    def row(path: str, key: str, tensor: str, ours: str, channel="", channels=None, **other):
        return Row(tuple(path.split("/")), key, tensor, ours, {**sizes, **other}, channel, channels)

    vision = "vision_model.embeddings."
    pairs = _pair_channels(c.vision_hidden_size)
    table = [
        row("patch_embed/patch_ce", vision + "patch_embedding.weight",
            "e c y x", "(c y x) e", "e", pairs),
        row("patch_embed/patch_bias_e", vision + "patch_embedding.bias", "e", "e", "e", pairs),
        row("patch_embed/merge_qed", vision + "dense_embedding.weight",
            "d e y x", "(y x) e d", "e", pairs, y=2, x=2),
        row("patch_embed/merge_bias_d", vision + "dense_embedding.bias", "d", "d"),
        row("embed", "language_model.model.embed_tokens.weight", "v d", "v d"),
        row("final_norm", "language_model.model.norm.weight", "d", "d"),
    ]  # fmt: skip
    if not c.tie_word_embeddings:
        table.append(row("lm_head", "language_model.lm_head.weight", "v d", "v d"))
    for stack in ("pre_buffer", "post_llm"):
        table += _layer_rows(c, stack, row)
    return table


def _layer_rows(c: ModelConfig, stack: str, row: Callable[..., Row]) -> list[Row]:
    t, hw = c.t_width, c.hw_width
    attention, norm_part = _LAYERS + "self_attn.", stack + "/attention/"
    table = [
        row(f"{stack}/attention_norm", _LAYERS + "input_layernorm.weight", "d", "d"),
        row(f"{stack}/mlp_norm", _LAYERS + "post_attention_layernorm.weight", "d", "d"),
        row(f"{stack}/mlp/gate_df", _LAYERS + "mlp.gate_proj.weight", "f d", "d f"),
        row(f"{stack}/mlp/up_df", _LAYERS + "mlp.up_proj.weight", "f d", "d f"),
        row(f"{stack}/mlp/down_fd", _LAYERS + "mlp.down_proj.weight", "d f", "f d"),
        row(norm_part + "v_dkh", attention + "v_proj.weight", "(k h) d", "d k h"),
        row(norm_part + "o_nhd", attention + "o_proj.weight", "d (n h)", "n h d"),
    ]
    for which, heads in (("q", "n"), ("k", "k")):
        tensor, ours = f"({heads} h) d", f"d {heads} h"
        t_path = f"{norm_part}{which}_t_d{heads}h"
        hw_path = f"{norm_part}{which}_hw_d{heads}h"
        proj, norm = f"{attention}{which}_proj", f"{attention}{which}_norm"
        norms = f"{norm_part}{which}_norm_"
        if c.qk_layout == "fused":  # one tensor: T channels, then H and W channels
            table += [
                row(t_path, proj + ".weight", tensor, ours, "h", np.arange(t)),
                row(hw_path, proj + ".weight", tensor, ours, "h", t + _hw_channels(hw)),
            ]
        else:
            table += [
                row(t_path, proj + ".weight", tensor, ours),
                row(hw_path, proj + "_hw.weight", tensor, ours, "h", _hw_channels(hw)),
            ]
        table.append(row(norms + "t", norm + ".weight", "h", "h", h=t))
        if c.qk_layout == "expanded":
            table += [
                row(norms + axis, f"{norm}_{axis}.weight", "h", "h", h=hw // 2) for axis in "hw"
            ]
        else:
            joint = row(norms + "hw", norm + "_hw.weight", "h", "h", "h", _hw_channels(hw), h=hw)
            table.append(joint)
    return table


def layers_of(row: Row, c: ModelConfig) -> Iterable[int | None]:
    """The layer numbers, counted through both stacks, that a row stands for; [None] if none."""
    first = c.num_pre_buffer_layers
    if row.path[0] == "pre_buffer":
        return range(first)
    return range(first, c.num_layers) if row.path[0] == "post_llm" else [None]


def expected_tensors(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of this model has."""
    return {
        row.key.format(layer=layer): row.tensor_shape
        for row in rows(c)
        for layer in layers_of(row, c)
    }


def detect_layout(keys: Iterable[str]) -> str:
    """Which of config.QK_LAYOUTS these tensors have."""
    names = {re.sub(r"\d+", "0", key) for key in keys if not GENERATION.search(key)}
    prefix = _LAYERS.format(layer=0) + "self_attn."
    if prefix + "q_proj_hw.weight" in names:
        merged = prefix + "q_norm_hw.weight" in names and prefix + "q_norm_h.weight" not in names
        return "expanded_merged_norm" if merged else "expanded"
    if prefix + "q_norm_hw.weight" in names:
        return "fused"
    if "model.embed_tokens.weight" in names:
        raise InputError("this is a plain Qwen3 checkpoint, not a NEO: it has no H and W queries")
    raise InputError(
        f"no NEO checkpoint: neither {prefix}q_proj_hw.weight nor {prefix}q_norm_hw.weight is there"
    )


def check_tensors(found: Mapping[str, tuple[int, ...]], c: ModelConfig) -> list[str]:
    """Compares a checkpoint's tensors with the table.

    Returns:
      the generation branch's tensors, which are left out.

    Raises:
      InputError: listing every missing, unknown and wrongly shaped tensor.
    """
    expected = expected_tensors(c)
    skipped = [key for key in found if key not in expected and GENERATION.search(key)]
    problems = [f"missing: {key} {shape}" for key, shape in expected.items() if key not in found]
    problems += [
        f"unknown: {key} {tuple(found[key])}"
        for key in found
        if key not in expected and key not in skipped
    ]
    problems += [
        f"wrong shape: {key} is {tuple(found[key])}, the configuration asks for {shape}"
        for key, shape in expected.items()
        if key in found and tuple(found[key]) != shape
    ]
    if problems:
        shown = problems[:30] + ["and so on"] * (len(problems) > 30)
        raise InputError(f"{len(problems)} tensors do not fit this model:\n  " + "\n  ".join(shown))
    return skipped


def _hw_channels(width: int) -> np.ndarray:
    """[H1 H2 W1 W2] -> [H1 W1 H2 W2]."""
    return np.arange(width).reshape(2, 2, width // 4).swapaxes(0, 1).reshape(-1)


def _pair_channels(width: int) -> np.ndarray:
    """Interleaved pairs of the column half, then of the row half -> firsts, then seconds."""
    return np.arange(width).reshape(2, width // 4, 2).transpose(2, 0, 1).reshape(-1)


def _groups(pattern: str) -> list[str]:
    """ "(n h) d" -> ["nh", "d"]."""
    return [group.strip("()").replace(" ", "") for group in re.findall(r"\([^)]*\)|\w", pattern)]


def _letters(pattern: str) -> str:
    return "".join(_groups(pattern))


def _size(letters: str, sizes: Mapping[str, int]) -> int:
    return int(np.prod([sizes[letter] for letter in letters], dtype=np.int64))


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """target[...] = source, fast for transposed 16-bit floats.

    numpy copies bfloat16 element by element but 16-bit integers in runs, and transposes several
    times faster a few columns at a time.
    """
    if source.dtype == target.dtype and source.dtype.itemsize == 2:
        source, target = source.view(np.uint16), target.view(np.uint16)
    if source.flags.c_contiguous or source.ndim < 2:
        target[...] = source
        return
    for first in range(0, source.shape[-1], 32):
        target[..., first : first + 32] = source[..., first : first + 32]
