"""Drawn pictures (`data/synthetic.py`) as training records, easy ones first."""

from collections.abc import Mapping

import numpy as np
from PIL import Image

from neo_jax.data import synthetic
from neo_jax.errors import InputError

# How many records, and in which shares their kinds come; the last goes on without end. Things alone
# come first: what binds a colour to one of two things is learnt only after colours and shapes are.
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
BLANK_SHARE = 1 / 8  # of pictures left empty, so that a model learns what to say when it is blind


class ShapeRecords:
    """`shapes:short`, `shapes:long`: the records of a curriculum; `shapes:held-out`: of no layout
    that those have."""

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
        drawn = synthetic.draw_record(kind, 1, index, self._is_held_out)
        is_blank = rng.random() < BLANK_SHARE and not self._is_held_out
        pictures = [blank(picture) for picture in drawn.pictures] if is_blank else drawn.pictures
        turns = []
        for place in rng.permutation(len(drawn.questions)):
            question = drawn.questions[place]
            turns.append({"from": "human", "value": question.text})
            turns.append({"from": "gpt", "value": question.answer})
        if drawn.is_video:
            return {"video": pictures, "conversations": turns}
        turns[0]["value"] = "<image>" * len(pictures) + "\n" + turns[0]["value"]
        return {"images": pictures, "conversations": turns}

    def where(self, index: int) -> str:
        return f"{self.name}, number {index}"

    def _shares(self, index: int) -> Mapping[str, float]:
        for count, shares in self._phases:
            if index < count:
                return shares
            index -= count
        return self._phases[-1][1]


def blank(picture: Image.Image) -> Image.Image:
    """What a blind model sees of it: nothing but its size."""
    return Image.new("RGB", picture.size, (128, 128, 128))
