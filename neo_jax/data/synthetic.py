"""Synthetic images with questions about them: a data set that needs no download.

A record is a function of its number, so a source is endless and always the same. A layout is the
shapes, places, colours and sizes in an image. A hash of the layout decides whether it is held out:
no held-out layout is ever trained on.

    kind       image                          question                          answers
    caption    one object                     What is in the picture?           a red star, top left
    colour     one object                     What colour is it?                6 colours
    shape      one object                     What shape is it?                 5 shapes
    place      one object                     Where is it?                      9 places
    digit      a digit                        Which digit is it?                10 digits
    count      1 to 6 equal objects           How many things are there?        6 numbers
    binding    two objects                    What colour is the star?          6 colours
    relation   two objects                    Where is the star, seen from ...  4 directions
    change     two images                     What changed?                     4 answers
    motion     a video of four frames         Which way does it move?           4 directions
"""

import functools
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from neo_jax.data.tokenizer import NEO_TOKENS, SPLIT, TURN_END, TURN_START, NeoTokenizer

NAME = "shapes"  # of the source and its tokenizer
VOCABULARY = 768

COLOURS = {
    "red": (240, 40, 40),
    "green": (40, 220, 60),
    "blue": (50, 70, 250),
    "yellow": (250, 230, 40),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
}
SHAPES = ("ring", "square", "triangle", "star", "cross")
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SEEN_FROM = {"left": "left", "right": "right", "up": "above", "down": "below"}
SIDE, FRAME_SIDE = 96, 64  # pixels of an image, and of a frame of a video
CELL = SIDE // 3  # objects are near the centres of a 3 x 3 grid, whose cells are visual tokens


class Thing(NamedTuple):
    shape: str
    colour: str
    x: int  # of its centre, pixels
    y: int
    radius: int


class Question(NamedTuple):
    kind: str
    text: str
    answer: str


class SyntheticRecord(NamedTuple):
    """Images, or the frames of a video, and questions about them with their answers."""

    images: list[Image.Image]
    questions: list[Question]
    is_video: bool = False


def generate_record(kind: str, seed: int, number: int, is_held_out: bool) -> SyntheticRecord:
    """The record of this kind and number, from the held-out or from the training layouts."""
    for attempt in range(1000):
        rng = np.random.default_rng((seed, number, attempt))
        layout, make = _LAYOUTS[kind](rng)
        digest = hashlib.blake2b(repr(layout).encode(), digest_size=2).digest()
        if (digest[0] < 32) == is_held_out:  # one in eight
            return make()
    raise RuntimeError(f"no layout for {kind}")


def kinds() -> list[str]:
    """Kinds of records. "one" has questions of the first four kinds in the table above."""
    return list(_LAYOUTS)


def _one(rng):
    row, column = (int(v) for v in rng.integers(0, 3, 2))
    thing = _in_cell(rng, _shape(rng), _colour(rng), row, column)
    background = _background(rng)
    place = f"{ROWS[row]} {COLUMNS[column]}"
    caption = f"a {thing.colour} {thing.shape}, {place}"
    questions = [
        Question("colour", "What colour is it?", thing.colour),
        Question("shape", "What shape is it?", thing.shape),
        Question("place", "Where is it?", place),
        Question("caption", "What is in the picture?", caption),
    ]
    return (thing, background), lambda: SyntheticRecord([_draw([thing], background)], questions)


def _digit(rng):
    digit, colour, size = int(rng.integers(10)), _colour(rng), int(rng.integers(28, 34))
    x, y = (int(v) for v in rng.integers(0, 3, 2) * CELL + CELL // 2 + rng.integers(-2, 3, 2))
    background = _background(rng)

    def make():
        image = Image.new("RGB", (SIDE, SIDE), background)
        font = ImageFont.load_default(size)
        ImageDraw.Draw(image).text((x, y), str(digit), COLOURS[colour], font, anchor="mm")
        question = Question("digit", "Which digit is it?", str(digit))
        return SyntheticRecord(
            [image], [question, Question("colour", "What colour is it?", colour)]
        )

    return (digit, colour, size, x, y, background), make


def _count(rng):
    number, shape, colour = int(rng.integers(1, 7)), _shape(rng), _colour(rng)
    background = _background(rng)
    cells = rng.permutation(9)[:number]
    things = [_in_cell(rng, shape, colour, *divmod(int(cell), 3)) for cell in cells]
    questions = [
        Question("count", "How many things are there?", str(number)),
        Question("colour", "What colour are they?", colour),
    ]
    return (things, background), lambda: SyntheticRecord([_draw(things, background)], questions)


def _two(rng):
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))[:2]]
    colours = [list(COLOURS)[i] for i in rng.permutation(len(COLOURS))[:2]]
    way = list(WAYS)[rng.integers(4)]
    across, line = WAYS[way][0] != 0, int(rng.integers(3))
    near, far = sorted(int(c) for c in rng.permutation(3)[:2])
    places = [far, near] if sum(WAYS[way]) > 0 else [near, far]
    background = _background(rng)
    things = [
        _in_cell(rng, shape, colour, *((line, p) if across else (p, line)))
        for shape, colour, p in zip(shapes, colours, places, strict=True)
    ]
    first, second = shapes
    back = next(name for name, step in WAYS.items() if step == tuple(-s for s in WAYS[way]))
    questions = [
        Question("binding", f"What colour is the {first}?", colours[0]),
        Question("relation", f"Where is the {first}, seen from the {second}?", SEEN_FROM[way]),
        Question("binding", f"What colour is the {second}?", colours[1]),
        Question("relation", f"Where is the {second}, seen from the {first}?", SEEN_FROM[back]),
    ]
    return (things, background), lambda: SyntheticRecord([_draw(things, background)], questions)


def _change(rng):
    cell = int(rng.integers(9))
    before = _in_cell(rng, _shape(rng), _colour(rng), *divmod(cell, 3))
    what = ("the colour", "the shape", "the place", "nothing")[rng.integers(4)]
    background, after = _background(rng), before
    if what == "the colour":
        after = before._replace(colour=_colour(rng, but=before.colour))
    elif what == "the shape":
        after = before._replace(shape=_shape(rng, but=before.shape))
    elif what == "the place":
        other = int(rng.choice([place for place in range(9) if place != cell]))
        after = _in_cell(rng, before.shape, before.colour, *divmod(other, 3))

    def make():
        images = [_draw([thing], background) for thing in (before, after)]
        return SyntheticRecord(images, [Question("change", "What changed?", what)])

    return (before, after, background), make


def _motion(rng):
    way, (shape, colour) = list(WAYS)[rng.integers(4)], (_shape(rng), _colour(rng))
    step, background, radius = int(rng.integers(7, 12)), _background(rng), int(rng.integers(8, 12))
    x, y = (int(v) for v in rng.integers(26, 39, 2))
    dx, dy = WAYS[way]
    frames = [
        Thing(shape, colour, int(x + dx * moved), int(y + dy * moved), radius)
        for moved in step * (np.arange(4) - 1.5)
    ]

    def make():
        images = [_draw([thing], background, FRAME_SIDE) for thing in frames]
        return SyntheticRecord(
            images, [Question("motion", "Which way does it move?", way)], is_video=True
        )

    return (frames, background), make


_LAYOUTS: dict[str, Callable] = {
    "one": _one,
    "digit": _digit,
    "count": _count,
    "two": _two,
    "change": _change,
    "motion": _motion,
}


def _shape(rng, but: str = "") -> str:
    return str(rng.choice([shape for shape in SHAPES if shape != but]))


def _colour(rng, but: str = "") -> str:
    return str(rng.choice([colour for colour in COLOURS if colour != but]))


def _background(rng) -> tuple[int, int, int]:
    return tuple(int(v) for v in np.array((124, 116, 104)) + rng.integers(-12, 13, 3))


def _in_cell(rng, shape: str, colour: str, row: int, column: int) -> Thing:
    """A thing near the centre of a cell."""
    x, y = (int(v) for v in np.array((column, row)) * CELL + CELL // 2 + rng.integers(-2, 3, 2))
    return Thing(shape, colour, x, y, int(rng.integers(12, 16)))


def _draw(things: list[Thing], background, side: int = SIDE) -> Image.Image:
    image = Image.new("RGB", (side, side), background)
    pen = ImageDraw.Draw(image)
    for thing in things:
        x, y, r, fill = thing.x, thing.y, thing.radius, COLOURS[thing.colour]
        if thing.shape == "ring":
            pen.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=max(3, r // 3))
        elif thing.shape == "cross":
            pen.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill)
            pen.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill)
        else:
            pen.polygon([(x + r * px, y + r * py) for px, py in _CORNERS[thing.shape]], fill)
    return image


def _star() -> list[tuple[float, float]]:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    reach = np.where(np.arange(10) % 2, 0.45, 1.1)
    return list(zip(reach * np.cos(angles), reach * np.sin(angles), strict=True))


_CORNERS = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
    "star": _star(),
}


@functools.cache
def tokenizer() -> NeoTokenizer:
    """A small byte-level BPE like Qwen's, with a token for each word of the questions."""
    made = Tokenizer(models.BPE())
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(NEO_TOKENS) - 2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = []
    for kind in _LAYOUTS:
        for number in range(200):
            record = generate_record(kind, 0, number, is_held_out=False)
            texts += [f"user\n{q.text}\nassistant\n{q.answer}" for q in record.questions]
    header = "The time range of this video is [00:00-00:04], and the following is a series of 4 "
    texts += [header + "frames sampled at 1.0 FPS.\n[00:01.00]:\n"] * 20
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens([TURN_START, TURN_END, *NEO_TOKENS])
    return NeoTokenizer(made, NAME)
