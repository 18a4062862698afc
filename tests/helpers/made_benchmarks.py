"""Made-up benchmark files, and a model that answers by the colour of its image.

The image of row i has the colour (i, 2 i, 90), and the answer follows from i, so a model can only
answer a row if it gets the image of that row. The answer is right except for every fifth row.
"""

import base64
import csv
import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from neo_jax.data.image import open_rgb
from neo_jax.infer.request import Result

ROWS = 200
LETTERS = "ABCD"
# Rows of `write_tsv` with something wrong.
NO_IMAGE, BAD_BASE64, NO_OPTION, NO_ANSWER, NOT_AN_IMAGE = 20, 41, 62, 83, 104


def encoded(number):
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (number % 251, 2 * number % 251, 90)).save(file, "PNG")
    return file.getvalue()


def text64(number):
    # A PNG is longer than a cell that refers to another row.
    return base64.b64encode(encoded(number)).decode()


def seen_letter(number):
    """The model's answer about image `number`."""
    return LETTERS[(number % 251) % 4]


def right_letter(number):
    letter = seen_letter(number)
    return LETTERS[(LETTERS.index(letter) + 1) % 4] if number % 5 == 0 else letter


def options(number):
    return {letter: f"thing {letter.lower()}{number}" for letter in LETTERS}


def answer(request):
    """Answers with the letter that the colour of the first image or frame stands for."""
    image = request.images[0] if request.images else f"{request.video}/0.png"
    try:
        red = open_rgb(image).getpixel((0, 0))[0]
    except ValueError as error:
        return Result("", (), "error", {}, str(error))
    usage = {"prompt_tokens": len(request.prompt), "completion_tokens": 3}
    return Result(f"The answer is {LETTERS[red % 4]}.", (1, 2, 3), "stop", usage)


def serve(requests, window=5):
    """Answers out of order, as an engine does."""
    held = {}
    for number, request in enumerate(requests):
        held[number] = request
        if len(held) == window:
            chosen = list(held)[number * 3 % window]
            yield chosen, answer(held.pop(chosen))
    for number, request in held.items():
        yield number, answer(request)


def write_table(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(columns)
        writer.writerows(rows)


def write_tsv(folder, rows=ROWS):
    """MMStar: base64, with line ends and quotes in questions; a few rows are malformed."""
    lines = []
    for number in range(rows):
        cells = options(number) | {"answer": right_letter(number), "image": text64(number)}
        changed = {
            NO_IMAGE: {"image": ""},
            BAD_BASE64: {"image": "A" * 201},
            NO_OPTION: {right_letter(number): ""},
            NO_ANSWER: {"answer": ""},
            NOT_AN_IMAGE: {"image": base64.b64encode(b"not an image" * 9).decode()},
        }.get(number, {})
        cells |= changed
        question = f'What is "it" in {number}?\nLook\tclosely.'
        middle = [cells[name] for name in (*LETTERS, "answer", "image")]
        lines.append([number, question, *middle, f"kind {number % 3}", "all"])
    columns = ["index", "question", *LETTERS, "answer", "image", "category", "l2-category"]
    write_table(folder / "MMStar.tsv", columns, lines)


def write_circular(folder, rows=ROWS):
    """MMBench: each question in two orders; one row refers to the image of the other."""
    lines = []
    for number in range(rows // 2):
        first = [number, f"Q {number}?", *options(number).values(), right_letter(number)]
        other = options(number)
        rotated = [
            1_000_000 + number,
            f"Q {number}, rotated?",
            *other.values(),
            seen_letter(number),
        ]
        lines += [[*rotated, str(number), "k"], [*first, text64(number), "k"]]
    columns = ["index", "question", *LETTERS, "answer", "image", "category"]
    write_table(folder / "MMBench_DEV_EN.tsv", columns, lines)


def write_paths(folder, rows=ROWS):
    """EmbSpatial: lists of paths, options as the text of a list."""
    images = folder / "EmbSpatialBench"
    images.mkdir(parents=True)
    lines = []
    for number in range(rows):
        (images / f"{number}.png").write_bytes(encoded(number))
        choices = str(list(options(number).values()))
        paths = f"['{number}.png', '0.png']" if number % 2 else f"{number}.png"
        lines.append([number, f"Where? {number}", choices, right_letter(number), paths, "mp3d"])
    columns = ["index", "question", "options", "answer", "image_path", "data_source"]
    write_table(folder / "EmbSpatialBench.tsv", columns, lines)


def write_parquet(folder, rows=ROWS):
    """AI2D as on the hub: structs of bytes, options as a list, the answer as a number."""
    target = folder / "AI2D_TEST"
    target.mkdir(parents=True)
    numbers = np.array_split(np.arange(rows), 3)
    for part, some in enumerate(numbers):
        table = pyarrow.table(
            {
                "question": [f"What? {n}" for n in some],
                "options": [list(options(n).values()) for n in some],
                "answer": [str(LETTERS.index(right_letter(n))) for n in some],
                "image": [{"bytes": encoded(n), "path": f"{n}.png"} for n in some],
            }
        )
        name = target / f"test-0000{part}-of-00003.parquet"
        pyarrow.parquet.write_table(table, name, row_group_size=17)


def write_numbered(folder, rows=ROWS):
    """MMMU as on the hub: image_1 to image_3, options as the text of a list."""
    target = folder / "MMMU_DEV_VAL"
    target.mkdir(parents=True)
    numbers = range(rows)
    images = [{"bytes": encoded(n), "path": None} for n in numbers]
    table = pyarrow.table(
        {
            "id": [f"validation_Art_{n}" for n in numbers],
            "question": [f"What is <image 1>? {n}" for n in numbers],
            "options": [str(list(options(n).values())) for n in numbers],
            "answer": [right_letter(n) for n in numbers],
            "question_type": ["multiple-choice"] * rows,
            "image_1": images,
            "image_2": [image if n % 7 == 0 else None for n, image in enumerate(images)],
        }
    )
    pyarrow.parquet.write_table(table, target / "validation.parquet")


def write_videos(folder, rows=ROWS):
    """LVBench as JSON lines beside folders of frames."""
    for number in range(rows):
        frames = folder / "videos" / f"v{number}"
        frames.mkdir(parents=True)
        for frame in range(2):
            (frames / f"{frame}.png").write_bytes(encoded(number))
    lines = [
        {
            "question": f"Who? {n}\n" + "\n".join(f"{k}. {v}" for k, v in options(n).items()),
            "answer": right_letter(n),
            "video": f"v{n}",
            "type": "sports" if n % 2 else "cartoon",
        }
        for n in range(rows)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "LVBench.jsonl").write_text(text)


# By benchmark: the function that writes its file, and the image number of a row.
FORMATS = {
    "mmstar": (write_tsv, lambda row: int(row["index"])),
    "mmbench": (write_circular, lambda row: int(row["index"]) % 1_000_000),
    "embspatial": (write_paths, lambda row: int(row["index"])),
    "ai2d": (write_parquet, lambda row: int(row["question"].split()[-1])),
    "mmmu": (write_numbered, lambda row: int(row["question"].split()[-1])),
    "lvbench": (write_videos, lambda row: int(row["video"][1:])),
}
