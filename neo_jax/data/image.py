"""From an image to patches: open, convert to RGB, resize to a pixel budget, cut.

Bit-equal to the official evaluation code (`tests/golden/images`): no EXIF rotation, Pillow's
default resize, Python's banker's rounding. Needs only numpy and Pillow.
"""

import io
import math
import os

import numpy as np
from PIL import Image, UnidentifiedImageError

from neo_jax.batch import IMAGE_MEAN, IMAGE_STD
from neo_jax.errors import InputError
from neo_jax.model_config import IMAGE_FACTOR, PATCH_SIZE

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray

MAX_ASPECT_RATIO = 200

# Not all that Pillow reads: the reader of PostScript, for one, starts another program.
Image.init()
FORMATS = tuple(
    name
    for name in (
        *("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF"),
        "WEBP",
    )
    if name in Image.OPEN
)


def smart_resize(
    height: int,
    width: int,
    factor: int = IMAGE_FACTOR,
    min_pixels: int = 65536,
    max_pixels: int = 4194304,
) -> tuple[int, int]:
    """The size (height, width) in pixels to which an image is resized.

    Sides are rounded to multiples of `factor`, then scaled together until the area is within
    [min_pixels, max_pixels]. The aspect ratio is kept as far as the rounding allows.

    Raises:
      InputError: if the aspect ratio is above 200, or a side or a limit is not positive.
    """
    if min(height, width, factor) < 1 or not min_pixels <= max_pixels or max_pixels < 1:
        raise InputError(
            f"cannot resize {height} x {width} to between {min_pixels} and {max_pixels} pixels"
        )
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise InputError(
            f"absolute aspect ratio must be smaller than {MAX_ASPECT_RATIO}, got {ratio}"
        )
    rows = max(factor, round(height / factor) * factor)
    columns = max(factor, round(width / factor) * factor)
    if rows * columns > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return rows, columns


def open_rgb(source: ImageSource, *, flatten: bool = True) -> Image.Image:
    """An RGB image from a path, encoded bytes, a Pillow image or an [H, W, 3] uint8 array.

    With `flatten`, an RGBA image is composited on white if any pixel is fully transparent and any
    is not. All other alpha is dropped.

    Raises:
      InputError: naming the file, if it is missing or Pillow cannot read it.
    """
    try:
        if isinstance(source, Image.Image):
            image = source
        elif isinstance(source, np.ndarray):
            image = Image.fromarray(source)
        elif isinstance(source, bytes):
            image = Image.open(io.BytesIO(source), formats=FORMATS)
        elif os.path.exists(source) and not os.path.isfile(source):
            raise OSError("not a file")  # reading a pipe would block for ever
        else:
            image = Image.open(source, formats=FORMATS)
        if image.mode == "RGBA" and flatten:
            return _flattened(image)
        return image.convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"image {_name(source)}: no such file") from error
    except UnidentifiedImageError as error:
        raise InputError(f"image {_name(source)}: not an image that Pillow can read") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        AttributeError,
        LookupError,
        RuntimeError,  # its decoders raise all of these for damaged files
        Image.DecompressionBombError,
    ) as error:
        raise InputError(f"image {_name(source)}: {error}") from error


def resized_pixels(
    source: ImageSource,
    min_pixels: int,
    max_pixels: int,
    *,
    upscale: bool = False,
) -> np.ndarray:
    """[H, W, 3] uint8: the image resized as `smart_resize` says.

    `upscale` first doubles both sides bilinearly, as the official setting of MMMU does.
    """
    image = open_rgb(source)
    if upscale:
        image = image.resize((image.width * 2, image.height * 2), Image.Resampling.BILINEAR)
    try:
        height, width = smart_resize(
            image.height, image.width, IMAGE_FACTOR, min_pixels, max_pixels
        )
    except InputError as error:
        if isinstance(source, str | os.PathLike):
            raise InputError(f"image {source}: {error}") from error
        raise
    return np.asarray(image.resize((width, height)))


def patchify(pixels_hw3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts an image into flattened patches, row-major over the grid.

    Returns:
      patches [P, 768] in the type of the image, each in the order (channel, y, x); and
      grid_hw [1, 2] int32, the rows and columns of the patch grid.
    """
    height, width, channels = pixels_hw3.shape
    rows, columns = height // PATCH_SIZE, width // PATCH_SIZE
    patches = pixels_hw3.reshape(rows, PATCH_SIZE, columns, PATCH_SIZE, channels)
    patches = patches.transpose(0, 2, 4, 1, 3).reshape(rows * columns, -1)
    return patches, np.array([[rows, columns]], np.int32)


def normalise(patches_pc: np.ndarray) -> np.ndarray:
    """[P, C] uint8 to float32 with ImageNet's mean and deviation; bit-equal to torchvision."""
    mean_c, std_c = (np.repeat(x, patches_pc.shape[-1] // 3) for x in (IMAGE_MEAN, IMAGE_STD))
    return (patches_pc.astype(np.float32) / np.float32(255) - mean_c) / std_c


def preprocess_image(
    image: ImageSource,
    min_pixels: int = 65536,
    max_pixels: int = 4194304,
    upscale: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The model's input for an image, as the official code makes it.

    Args:
      image: path, encoded bytes, Pillow image or [H, W, 3] uint8 array.
      min_pixels, max_pixels: bounds of the resized area.
      upscale: double both sides first (the official MMMU setting).

    Returns:
      pixel_values [P, 768] float32, row-major patches, and grid_hw [1, 2] int32.
    """
    patches, grid_hw = patchify(resized_pixels(image, min_pixels, max_pixels, upscale=upscale))
    return normalise(patches), grid_hw


def _flattened(image: Image.Image) -> Image.Image:
    alpha = np.asarray(image)[:, :, 3]
    if alpha.all() or not alpha.any():
        return image.convert("RGB")
    # The official code means to put black behind bright images, but it compares a mean of bytes
    # with 382.5, so its background is always white.
    background = Image.new("RGB", image.size, (255, 255, 255))
    background.paste(image, mask=image.getchannel("A"))
    return background


def _name(source: ImageSource) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else type(source).__name__
