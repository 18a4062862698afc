"""Corrupt and odd records, each as (name, the record or the bytes of its line, outcome)."""

import base64
import io
import itertools
import json
import os
import random
import struct
import zlib

import numpy as np
from PIL import Image

from neo_jax.data.pipeline import BAD, TOO_LONG
from neo_jax.data.tokenizer import NEO_TOKENS

FORMATS = ("JPEG", "PNG", "GIF", "TIFF", "ICO", "WEBP", "BMP")
GOOD = "good"


def encoded_image(format: str, size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


def turns(question="?", answer="!"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def asking(raw: bytes) -> dict:
    return {"image": {"bytes": base64.b64encode(raw).decode()}, "conversations": turns()}


def decodes(raw: bytes) -> bool:
    """Whether Pillow can decode it, and its aspect ratio is allowed."""
    try:
        width, height = Image.open(io.BytesIO(raw)).convert("RGB").size
    except Exception:
        return False
    return max(width, height) <= 200 * min(width, height)


def damaged_images():
    """Cut files, and files with flipped bits, of all formats."""
    rng = random.Random(0)
    for format in FORMATS:
        whole = encoded_image(format)
        cut = [whole[: len(whole) * part // 12] for part in range(12)]
        for count in range(40):
            changed = bytearray(whole)
            # Every second one only in its header, where a flipped bit does most harm.
            for place in rng.choices(range(len(whole) if count % 2 else 60), k=1 + count // 5):
                changed[place] ^= 1 << rng.randrange(8)
            cut.append(bytes(changed))
        for number, raw in enumerate(cut):
            yield f"{format} {number}", asking(raw), GOOD if decodes(raw) else BAD
        yield f"whole {format}", asking(whole), GOOD


def odd_images(folder):
    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    def png(width: int, height: int) -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        data = chunk(b"IDAT", zlib.compress(bytes(1000)))
        return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")

    for side in (0, 20000, 60000, 2**31 - 1):
        yield f"a PNG that says {side}", asking(png(side, side)), BAD
    gif = bytearray(encoded_image("GIF"))
    gif[6:10] = b"\xff" * 4
    yield "a huge GIF", asking(bytes(gif)), BAD
    bmp = bytearray(encoded_image("BMP"))
    bmp[18:26] = struct.pack("<ii", 60000, -60000)
    yield "a huge BMP", asking(bytes(bmp)), BAD
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))
    yield "a text bomb", asking(encoded_image("PNG")[:33] + text + encoded_image("PNG")[33:]), BAD
    for width, height in ((1, 201), (5000, 3)):
        yield f"{width} x {height}", asking(encoded_image("PNG", (width, height))), BAD
    for width, height in ((1, 1), (1, 200), (600, 3)):
        yield f"{width} x {height}", asking(encoded_image("PNG", (width, height))), GOOD
    (folder / "good.png").write_bytes(encoded_image("PNG"))
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    os.symlink("loop.png", folder / "loop.png")
    bad = ["absent.png", "empty.png", "folder.png", "pipe.png", "loop.png", ".", "/dev/zero"]
    bad += [
        "good.png\0",
        "\0",
        "a" * 5000,
        "good.png/x",
        "\ud800.png",
        "~/good.png",
        "http://x/y.png",
    ]
    for name in bad:
        yield f"image {name!r:.30}", {"image": name, "conversations": turns()}, BAD
        two = {"images": ["good.png", name], "conversations": turns("<image><image>")}
        yield f"images good.png and {name!r:.30}", two, BAD
        yield f"video {name!r:.30}", {"video": name, "conversations": turns()}, BAD
    yield "a good file", {"image": "good.png", "conversations": turns()}, GOOD


def wrong_types():
    odd = [None, 5, -1.5, True, "", "x", [], {}, [[]], [None], [5], [{}], {"a": 1}, float("inf")]
    for place, value in itertools.product(("turn", "from", "value"), odd):
        conversation = turns()
        if place == "turn":
            conversation[1] = value
        else:
            conversation[1][place] = value
        is_text = place == "value" and isinstance(value, str)
        yield f"{place} {value!r}", {"conversations": conversation}, GOOD if is_text else BAD
    for value in odd:
        yield f"conversations {value!r}", {"conversations": value}, BAD
        for name in ("image", "images", "video"):
            # Null is as good as absent, and so is an empty list of images, but not an empty video.
            is_none = value is None or (value == [] and name != "video")
            record = {name: value, "conversations": turns()}
            yield f"{name} {value!r}", record, GOOD if is_none else BAD
    for raw in (
        "",
        "null",
        "5",
        '"x"',
        "[]",
        "{}",
        "{",
        '{"conversations": [',
        "\\",
        "NaN",
        "{'a': 1}",
    ):
        if raw:  # an empty line is no record
            yield f"line {raw}", raw.encode(), BAD
    good = json.dumps({"conversations": turns("?", "ok")}).encode()
    nested = b'{"conversations": ' + b"[" * 50000 + b"]" * 50000 + b"}"
    lines = [
        good[:-1],
        good + b"}",
        good.replace(b"ok", b"\xff\xfe"),
        good.replace(b"ok", b"\0"),
        nested,
    ]
    lines += [
        good.replace(b'"ok"', b"9" * 5000),
        good.decode().encode("utf-16-be").replace(b"\n", b""),
    ]
    lines += [good[:end] for end in range(1, len(good) - 1)]
    for number, raw in enumerate(lines):
        yield f"damaged line {number}", raw, BAD
    yield "nothing of gpt", {"conversations": turns()[:1]}, BAD
    yield "only input", {"conversations": [{"from": "gpt", "value": "x", "is_input": True}]}, BAD


def odd_texts():
    image = "good.png"
    for marks, count in itertools.product(range(5), range(4)):
        record = {"images": [image] * count, "conversations": turns("<image>" * marks)}
        fits = marks == count or (marks == 0 and count == 1)
        yield f"{marks} marks, {count} images", record, GOOD if fits else BAD
    both = {"video": [image], "image": image, "conversations": turns()}
    yield "an image and a video", both, BAD
    yield "no question", {"video": [image], "conversations": turns()[1:]}, BAD
    for mark in ("", "<video>", "<image>\n", "<image><image>"):  # its own go in their place
        yield f"{mark!r} of a video", {"video": [image], "conversations": turns(mark)}, GOOD
    for token in (*NEO_TOKENS, "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "<video>"):
        for question, answer, count in itertools.product(("", token), ("", token * 3), (0, 1)):
            record = {"images": [image] * count, "conversations": turns(question, answer)}
            # A visual token without an image is bad; all other tokens are only odd.
            is_bad = token == "<IMG_CONTEXT>" and bool(question + answer)
            yield f"{question!r} {answer!r} {count}", record, BAD if is_bad else GOOD
    fake = "<img><IMG_CONTEXT></img>"
    yield "visual tokens without an image", {"conversations": turns(fake)}, BAD
    for text in ("\0", "\n" * 50, "\u202e\u200d", "\U0010ffff", "\ufeff", "e\u0301" * 20):
        yield f"text {text!r:.30}", {"conversations": turns(text, text)}, GOOD
    yield "half a character", {"conversations": turns("?", "\ud83d")}, BAD
    for size in (300, 100000):
        yield f"{size} letters", {"conversations": turns("?", "a" * size)}, TOO_LONG
    several = {"images": [image] * 100, "conversations": turns("<image>" * 100)}
    yield "100 images", several, TOO_LONG
