"""Images against the official preprocessing, to the bit."""

import hashlib

import numpy as np
import pytest
from PIL import Image

import neo_jax
from helpers.golden import GOLDEN, arrays, raises, read_json
from neo_jax.data.image import open_rgb, patchify, resized_pixels

EXPECTED = read_json("images", "expected.json")
ROWS = EXPECTED["rows"]


def official(row):
    """The image as the row's pipeline opens it; training drops alpha without compositing."""
    path = GOLDEN / "images/files" / row["file"]
    return Image.open(path).convert("RGB") if row["setting"] == "train_path" else path


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['file']}|{row['setting']}" for row in ROWS])
def test_pixels_are_bit_equal(row):
    image, limits = official(row), (row["min_pixels"], row["max_pixels"], row["upscale"])
    if "error" in row:
        with raises("absolute aspect ratio must be smaller than 200, got 233.3333"):
            neo_jax.preprocess_image(image, *limits)
        return
    pixels = resized_pixels(image, *limits[:2], upscale=row["upscale"])
    assert list(pixels.shape[:2]) == row["resized_hw"]
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == row["sha256_resized_rgb_u8"]
    values, grid_hw = neo_jax.preprocess_image(image, *limits)
    assert grid_hw.tolist() == [row["grid_hw"]]
    assert values.shape == (row["n_patches"], 768)
    assert values.dtype == np.float32
    key = f"{row['file']}|{row['setting']}"
    samples = arrays("images", "pixel_values_samples.npz")
    np.testing.assert_array_equal(values.reshape(-1)[:: row["sample_stride"]], samples[key])
    full = arrays("images", "pixel_values_full.npz")
    if key in full:
        np.testing.assert_array_equal(values, full[key])


def test_every_row_of_smart_resize():
    rows = read_json("images", "smart_resize.json")["rows"]
    assert len(rows) == 2000
    for *arguments, wanted in rows:
        try:
            got = list(neo_jax.smart_resize(*arguments))
        except ValueError as error:
            got = f"ValueError: {error}"
        assert got == wanted, arguments


def test_one_picture_however_it_is_given():
    path = GOLDEN / "images/files/rgb.png"
    wanted, _ = neo_jax.preprocess_image(path)
    image = Image.open(path)
    for source in (str(path), path.read_bytes(), image, np.asarray(image)):
        np.testing.assert_array_equal(neo_jax.preprocess_image(source)[0], wanted)


def test_patches_are_cut_row_major_channel_first():
    pixels = np.arange(32 * 48 * 3).reshape(32, 48, 3)
    patches, grid_hw = patchify(pixels)
    assert grid_hw.tolist() == [[2, 3]]
    patch = patches[4].reshape(3, 16, 16)  # second row, second column
    np.testing.assert_array_equal(patch, np.moveaxis(pixels[16:32, 16:32], 2, 0))


def test_bad_images_are_named(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    whole = (GOLDEN / "images/files/large_900x1300.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with raises("absent.jpg", "no such file"):
        open_rgb(tmp_path / "absent.jpg")
    with raises("text.jpg", "not an image"):
        open_rgb(tmp_path / "text.jpg")
    with raises("cut.jpg", "truncated"):
        open_rgb(tmp_path / "cut.jpg")
    with raises("image .*too_extreme_3x700.png", "aspect ratio"):
        neo_jax.preprocess_image(GOLDEN / "images/files/too_extreme_3x700.png")
    with raises("cannot resize 0 x 5 to between 65536 and 4194304 pixels"):
        neo_jax.smart_resize(0, 5)
    with raises("between 5000 and 1000 pixels"):
        neo_jax.smart_resize(64, 64, 32, 5000, 1000)
    for odd in (None, np.zeros((4, 4, 3)), np.zeros((4, 4, 5), np.uint8), str(tmp_path)):
        with raises("image "):
            neo_jax.preprocess_image(odd)
