"""The model against numbers of the official PyTorch code, in float32, module by module."""

import jax
import numpy as np
import pytest

from helpers.golden import arrays, load_case
from helpers.tolerance import assert_close
from neo_jax.batch import to_device
from neo_jax.data.example import collate, make_example
from neo_jax.data.image import normalise
from neo_jax.data.positions import block_order, thw_positions
from neo_jax.kernels.intervals import intervals
from neo_jax.kernels.softmax_base import LN_2
from neo_jax.model import layers, patch_embed
from neo_jax.model.neo import bind
from neo_jax.model.rope import thw_rotary
from neo_jax.weights.mapping import rows

CASES = ("single_image", "multi_image", "text_only", "video")
TOLERANCE = 1e-5


@pytest.fixture(params=CASES)
def case(request):
    name = request.param
    inputs = arrays(name, "inputs.npz")
    pixels = {key: inputs[key] for key in ("pixel_values", "grid_hw") if "pixel_values" in inputs}
    return load_case(name), inputs, pixels, arrays(name, "outputs.npz")


def close(found, wanted):
    assert_close(found, wanted, TOLERANCE)


def test_positions(case):
    neo, inputs, _, _ = case
    t = neo.tokenizer
    thw = thw_positions(
        inputs["input_ids"], inputs["grid_hw"], t.image_start_id, t.image_context_id
    )
    np.testing.assert_array_equal(thw.T, inputs["indexes"])


def test_patch_embedding_step_by_step(case):
    neo, inputs, pixels, outputs = case
    if not pixels:
        pytest.skip("a case without images")
    order, hw = block_order(inputs["grid_hw"])
    (channels,) = (row.channels for row in rows(neo.config) if row.path[-1] == "patch_bias_e")

    @jax.jit
    def steps(params, patches, hw):
        embed = bind(neo.config, params).patch_embed
        y = embed.activated(patches)
        return y, embed.rotated(y, hw), embed(patches, hw)

    with jax.set_mesh(neo.mesh):
        gelu, rope, tokens = steps(neo.params, inputs["pixel_values"][order][None], hw[None])
    if "patch_gelu" in outputs:
        close(gelu[0], outputs["patch_gelu"][order][:, channels])
    close(rope[0], outputs["patch_rope"][order][:, channels])
    close(tokens[0], outputs["vision_tokens"])
    close(neo.embed_patches(**pixels), outputs["vision_tokens"])


def test_hidden_states_of_every_layer(case):
    neo, inputs, pixels, outputs = case
    embeds, hidden_states, final = neo.hidden_states(inputs["input_ids"], **pixels)
    close(embeds, outputs["inputs_embeds"])
    close(hidden_states, outputs["hidden_states"])
    close(final, outputs["final_norm"])


def test_logits(case):
    neo, inputs, pixels, outputs = case
    logits = neo.logits(inputs["input_ids"], **pixels)
    close(logits, outputs["logits"])
    np.testing.assert_array_equal(logits.argmax(-1), outputs["logits"].argmax(-1))


def test_every_query_sees_the_officials_keys(case):
    _, inputs, _, outputs = case
    t = inputs["indexes"][:1]
    start, end = intervals(t, np.ones_like(t))
    key = np.arange(t.shape[1])
    mask = (key >= np.asarray(start)[0][:, None]) & (key < np.asarray(end)[0][:, None])
    np.testing.assert_array_equal(mask, outputs["mask_allowed"])


def test_heads_of_the_first_layer():
    neo, inputs = load_case("single_image"), arrays("single_image", "inputs.npz")
    outputs = arrays("single_image", "outputs.npz")
    c = neo.config
    (hw,) = (row.channels for row in rows(c) if row.path[0::2] == ("pre_buffer", "q_hw_dnh"))
    half = c.head_dim // 2
    # From the official order [T H W] to [T1 H1 W1 T2 H2 W2].
    first, second = (
        (np.arange(half), c.head_dim + hw[:half]),
        (np.arange(half, c.head_dim), c.head_dim + hw[half:]),
    )
    channels = np.concatenate([*first, *second])

    @jax.jit
    def run(params, x, thw):
        block = jax.tree.map(lambda leaf: leaf[0], bind(c, params).pre_buffer)
        rotary = thw_rotary(thw, c.t_width, c.hw_width, c.rope_theta, c.rope_theta_hw)
        y = layers.rms_norm(x, block.attention_norm, c.rms_norm_eps)
        return block.attention.qkv(y, rotary)

    with jax.set_mesh(neo.mesh):
        embeds = outputs["inputs_embeds"][None]
        q, k, v = run(neo.params, embeds, inputs["indexes"].T[None])
    scaled = outputs["layer0_q"] * (c.head_dim**-0.5 / LN_2)  # see softmax_base.py
    close(np.moveaxis(q[0], 0, 1), scaled[..., channels])
    close(np.moveaxis(k[0], 0, 1), outputs["layer0_k"][..., channels])
    close(np.moveaxis(v[0], 0, 1), outputs["layer0_v"])
    assert outputs["scaling"] == pytest.approx(c.head_dim**-0.5)


def test_documents_packed_in_one_row():
    neo, batch = load_case("packed_train"), arrays("packed_train", "batch.npz")
    outputs = arrays("packed_train", "outputs.npz")
    bounds = batch["seq_boundaries"]
    ids, grids, t = batch["input_ids"][0], batch["grid_hw"], neo.tokenizer
    order, hw = block_order(grids)
    segments = np.searchsorted(bounds, np.arange(len(ids)), side="right")
    packed = {
        "tokens": ids[None],
        "segments": segments[None].astype(np.int32),
        "thw": outputs["indexes_thw"][None],
        "is_image": (ids == t.image_context_id)[None],
        "patches": batch["pixel_values"][order][None],
        "patch_hw": hw[None],
    }
    with jax.set_mesh(neo.mesh):
        logits = jax.jit(lambda params, batch: bind(neo.config, params)(batch))(
            neo.params, to_device(packed, neo.mesh)
        )
    close(logits[0], outputs["logits"])
    start, end = intervals(packed["thw"][..., 0], packed["segments"])
    key = np.arange(len(ids))
    mask = (key >= np.asarray(start).T) & (key < np.asarray(end).T)
    np.testing.assert_array_equal(mask, outputs["mask_allowed"])


@pytest.mark.parametrize("name", ["single_image", "multi_image"])
def test_same_logits_on_a_2x2x2_mesh(name):
    inputs, outputs = arrays(name, "inputs.npz"), arrays(name, "outputs.npz")
    logits = load_case(name, (2, 2, 2)).logits(
        inputs["input_ids"], inputs["pixel_values"], inputs["grid_hw"]
    )
    close(logits, outputs["logits"])


def test_bytes_normalised_on_the_device_as_on_the_host():
    every_byte = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 768, axis=1)
    found = jax.jit(patch_embed.normalise)(every_byte)
    assert_close(found, normalise(every_byte), 5e-7)


def test_bfloat16_answers_alike():
    inputs, outputs = arrays("single_image", "inputs.npz"), arrays("single_image", "outputs.npz")
    logits = load_case("single_image", dtype="bfloat16").logits(
        inputs["input_ids"], inputs["pixel_values"], inputs["grid_hw"]
    )
    assert logits.dtype == np.float32
    assert_close(logits, outputs["logits"], 0.03)


@pytest.mark.slow
def test_remat_changes_nothing():
    neo, inputs = load_case("single_image"), arrays("single_image", "inputs.npz")
    outputs = arrays("single_image", "outputs.npz")
    patches, hw = inputs["pixel_values"], inputs["grid_hw"]
    example = make_example(inputs["input_ids"], patches, hw, neo.tokenizer)
    batch = collate([example], len(example.tokens), len(patches))

    def total(params, batch, remat):
        return (bind(neo.config, params)(batch, remat) * outputs["logits"]).sum()

    with jax.set_mesh(neo.mesh):
        batch = to_device(batch, neo.mesh)
        grad = jax.jit(jax.grad(total), static_argnums=2)
        plain, full = grad(neo.params, batch, "none"), grad(neo.params, batch, "full")
    assert_close(full, plain, 1e-5)
