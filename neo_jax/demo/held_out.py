"""Accuracy of a model on synthetic images that it was not trained on, with two baselines.

Neither baseline sees an image: the most frequent answer to each kind of question, and the same
model asked about blank images.
"""

import collections
import dataclasses
from collections.abc import Sequence

from PIL import Image

from neo_jax.data import synthetic
from neo_jax.data.synthetic_records import blank
from neo_jax.infer.api import Pipeline
from neo_jax.infer.request import Request
from neo_jax.infer.sampling import Sampling

SEED = 3  # of held-out images
SAMPLING = Sampling(max_new_tokens=12)


@dataclasses.dataclass(frozen=True)
class Answer:
    """A question about an image, and what the model answers with and without seeing it."""

    kind: str
    images: tuple[Image.Image, ...]
    question: str
    truth: str
    answer: str
    blind_answer: str  # about a blank image

    @property
    def is_right(self) -> bool:
        return self.answer == self.truth


def ask_held_out(neo: Pipeline, per_kind: int) -> list[Answer]:
    """Asks all questions of `per_kind` held-out records of each kind, and about blank images."""
    asked, requests, blind, blind_place = [], [], [], {}
    for kind in synthetic.kinds():
        for number in range(per_kind):
            record = synthetic.generate_record(kind, SEED, number, is_held_out=True)
            by_kind = {question.kind: question for question in reversed(record.questions)}
            for question in by_kind.values():
                if question.kind == "colour" and kind != "one":
                    continue
                asked.append((question, record.images))
                requests.append(_request(record, record.images, question))
                if question.text not in blind_place:  # blank images are all equal
                    blind_place[question.text] = len(blind)
                    blanks = [blank(image) for image in record.images]
                    blind.append(_request(record, blanks, question))
    options = {"slots": 16, "max_length": 512, "prefill_budget": 256, "reuse_prefixes": False}
    texts = [result.text for result in neo.generate([*requests, *blind], **options)]
    seen, unseen = texts[: len(asked)], texts[len(asked) :]
    return [
        Answer(q.kind, tuple(images), q.text, q.answer, text, unseen[blind_place[q.text]])
        for (q, images), text in zip(asked, seen, strict=True)
    ]


def scores(answers: Sequence[Answer]) -> dict[str, dict[str, float]]:
    """By kind of question: the accuracies of model and baselines, and the number of questions."""
    table = {}
    for kind in dict.fromkeys(one.kind for one in answers):
        mine = [one for one in answers if one.kind == kind]
        (_, most_frequent), *_ = collections.Counter(one.truth for one in mine).most_common(1)
        table[kind] = {
            "accuracy": sum(one.is_right for one in mine) / len(mine),
            "majority": most_frequent / len(mine),
            "blind": sum(one.blind_answer == one.truth for one in mine) / len(mine),
            "questions": len(mine),
        }
    return table


def _request(
    record: synthetic.SyntheticRecord,
    images: Sequence[Image.Image],
    question: synthetic.Question,
) -> Request:
    if record.is_video:
        return Request(question.text, video=images, sampling=SAMPLING)
    return Request("<image>" * len(images) + f"\n{question.text}", images, sampling=SAMPLING)
