"""Synthetic images (`data/synthetic.py`) as training records, in the order of a curriculum."""

from collections.abc import Mapping

import numpy as np
from PIL import Image

from neo_jax.data import synthetic
from neo_jax.errors import InputError

# The phases of each curriculum: the number of records and the shares of their kinds. The last one
# is endless. Single objects come first: a model learns to bind a colour to one of two objects only
# after it knows colours and shapes.
CURRICULA: Mapping[str, tuple[tuple[int, Mapping[str, float]], ...]] = {
    "short": (
        (8_000, {"one": 8, "digit": 1, "count": 1}),
        (0, {"one": 3, "digit": 4, "count": 3, "two": 5, "change": 2, "motion": 1}),
    ),
    "long": (
        (8_000, {"one": 8, "digit": 1, "count": 1}),
        (60_000, {"one": 3, "digit": 4, "count": 3, "two": 6}),
        (0, {"one": 1, "digit": 1, "count": 1, "two": 8, "change": 2, "motion": 2}),
    ),
}
HELD_OUT = "held-out"
BLANK_SHARE = 1 / 8  # of records with blank images: without an image the model learns to guess


class ShapeRecords:
    """The records of `shapes:short` or `shapes:long`, two curricula, or of `shapes:held-out`.

    The curricula have no held-out layout.
    """

    is_ordered = True

    def __init__(self, name: str):
        self.name, which = name, name.partition(":")[2]
        if which not in CURRICULA and which != HELD_OUT:
            raise InputError(f"{name}: use shapes:{', shapes:'.join([*CURRICULA, HELD_OUT])}")
        self._is_held_out = which == HELD_OUT
        self._phases = CURRICULA["short" if self._is_held_out else which]
        if self._is_held_out:
            self._phases = self._phases[-1:]

    def __len__(self) -> int:
        return 100_000_000

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng((2, index))
        shares = self._shares(index)
        weights = np.array(list(shares.values())) / sum(shares.values())
        kind = list(shares)[rng.choice(len(shares), p=weights)]
        record = synthetic.generate_record(kind, 1, index, self._is_held_out)
        is_blank = rng.random() < BLANK_SHARE and not self._is_held_out
        images = [blank(image) for image in record.images] if is_blank else record.images
        turns = []
        for place in rng.permutation(len(record.questions)):
            question = record.questions[place]
            turns.append({"from": "human", "value": question.text})
            turns.append({"from": "gpt", "value": question.answer})
        if record.is_video:
            return {"video": images, "conversations": turns}
        turns[0]["value"] = "<image>" * len(images) + "\n" + turns[0]["value"]
        return {"images": images, "conversations": turns}

    def where(self, index: int) -> str:
        return f"{self.name}, number {index}"

    def _shares(self, index: int) -> Mapping[str, float]:
        for count, shares in self._phases:
            if index < count:
                return shares
            index -= count
        return self._phases[-1][1]


def blank(image: Image.Image) -> Image.Image:
    """A grey image of the same size."""
    return Image.new("RGB", image.size, (128, 128, 128))
