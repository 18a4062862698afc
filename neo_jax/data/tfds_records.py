"""Records from a data set that tensorflow-datasets has prepared, read without TensorFlow.

`tfds:NAME/CONFIG:SPLIT?data_dir=DIR`: config, split (train) and folder (~/tensorflow_datasets) have
defaults. A version may follow the config, as in `tfds:NAME:1.0.0:train`. Nothing is downloaded or
prepared, and no code of the data set runs. Its files must be ArrayRecord, for random access.

Its features are those of a record: `conversations`, a Sequence of {"from", "value"} or JSON text;
`image` or `images`, whose encoded bytes are taken as they are. In place of `conversations` it may
have `question`, and `answer` or `answers`; the most frequent answer becomes the assistant's turn.
"""

import collections
import functools
import os
import re
from collections.abc import Mapping

from neo_jax.data.record import FIELDS, MEDIA_FIELDS, make_record, require
from neo_jax.errors import InputError

SCHEME = "tfds:"
_NAME = re.compile(
    r"tfds:(?P<name>[\w/.-]+(:\d+\.\d+\.\d+)?)(:(?P<split>[^?]+))?(\?data_dir=(?P<folder>.+))?"
)
_READ = (*FIELDS, "question", "answer", "answers")


class TfdsRecords:
    is_ordered = False

    def __init__(self, name: str):
        match = _NAME.fullmatch(name)
        if match is None:
            raise InputError(f"{name}: write tfds:NAME/CONFIG:SPLIT?data_dir=DIR")
        self.name = name
        self._source = (match["name"], match["split"] or "train", match["folder"])
        try:
            features, source = _open(*self._source)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        wanted = ({"conversations"}, {"question", "answer"}, {"question", "answers"})
        if not any(names <= features for names in wanted):
            raise InputError(
                f"{name}: needs features conversations, or question and answer; it has "
                f"{', '.join(sorted(features))}"
            )
        self._length = len(source)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict:
        _, source = _open(*self._source)
        try:
            fields = source[index]
        except Exception as error:  # damaged files make libraries raise anything
            raise InputError(f"cannot be read: {error}") from error
        fields = {name: _plain(value, name) for name, value in fields.items() if name in _READ}
        if "conversations" not in fields:
            fields["conversations"] = _conversation(fields)
        return make_record(fields, os.path.abspath(self._source[2] or "."))

    def where(self, index: int) -> str:
        return f"{self.name}[{index}]"


@functools.cache
def _open(name: str, split: str, folder: str | None):
    """The names of the features, and the data source. Opened once per process."""
    tfds = require("tensorflow_datasets", "tensorflow-datasets and importlib_resources", name)

    class Encoded(tfds.decode.SkipDecoding):
        def decode_batch_example_np(self, batch):  # SkipDecoding lacks it, for Sequence(Image)
            return batch

    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
        features = set(builder.info.features)
        encoded = {key: Encoded() for key in MEDIA_FIELDS if key in features}
        return features, builder.as_data_source(split=split, decoders=encoded)
    except Exception as error:  # assertions, too
        raise InputError(str(error).split("\n")[0]) from error


def _plain(value, name: str):
    """The value as Python's own types. Bytes become text, except those of images."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(one, name) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, name) for one in value]
    if isinstance(value, bytes) and name not in ("image", "images"):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise InputError(f"{name}: not UTF-8: {error}") from error
    return value


def _conversation(fields: Mapping) -> list[dict]:
    answers = fields.get("answers") or [fields.get("answer")]
    answers = answers if isinstance(answers, list) else [answers]
    # Of equally frequent answers, the first.
    ((answer, _),) = collections.Counter(answers).most_common(1)
    return [{"from": "human", "value": fields["question"]}, {"from": "gpt", "value": answer}]
