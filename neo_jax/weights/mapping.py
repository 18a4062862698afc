"""The key table: every tensor of a published checkpoint and its place in our parameters.

The table has one row per parameter, read in both directions. A row names the parameter's tensor,
how their dimensions correspond, and which channels of a head it takes in which order (`row.py`).
Nothing else in the project knows a checkpoint's keys.

Checkpoints rotate channel i of an axis with channel i + width/2 of the same axis (the patch
embedding: channel 2i with 2i + 1). We keep the first halves of all axes together, then the second
halves, so that one half-swap serves every axis:

    published   H1 H2 W1 W2      ours   H1 W1 H2 W2

`channels` of a row is that permutation.
"""

import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from neo_jax.errors import InputError
from neo_jax.model_config import PATCH_SIZE, ModelConfig
from neo_jax.weights.row import Row

# Tensors of the generation branch in SenseNova-U1 checkpoints: known, not part of this model.
GENERATION = re.compile(r"_mot_gen(\.|$)|^fm_modules\.")

_LAYERS = "language_model.model.layers.{layer}."


def rows(c: ModelConfig) -> list[Row]:
    """The table for a model. A row of a stack of layers stands for all its layers."""
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
    """The layers that a row stands for, counted through both stacks; [None] outside of layers."""
    first = c.num_pre_buffer_layers
    if row.path[0] == "pre_buffer":
        return range(first)
    return range(first, c.num_layers) if row.path[0] == "post_llm" else [None]


def expected_tensors(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The key and shape of every tensor in a published checkpoint of this model."""
    return {
        row.key.format(layer=layer): row.tensor_shape
        for row in rows(c)
        for layer in layers_of(row, c)
    }


def detect_layout(keys: Iterable[str]) -> str:
    """The layout of a checkpoint's query and key weights, one of `model_config.QK_LAYOUTS`.

    Raises:
      InputError: if these are not the keys of a NEO.
    """
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

    Args:
      found: shapes by published key.
      c: the model.

    Returns:
      the keys of the generation branch, which is left out.

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
