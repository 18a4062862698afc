"""report.html: sampled questions with image, right answer, prediction and verdict, in one file.

Its thumbnails are written when the questions are asked, so scoring needs no dataset.
"""

import base64
import html
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from neo_jax.data.image import open_rgb
from neo_jax.data.video import load_video
from neo_jax.errors import InputError
from neo_jax.eval.predictions import Task
from neo_jax.eval.score_predictions import ScoredBenchmark

SAMPLES, VIDEO_SAMPLES = 100, 24  # rows of a benchmark
_SIDE = 320  # pixels of a thumbnail
_IMAGES = 4  # of a row
_FOLDER = "samples"

_STYLE = """
body { font-family: system-ui, sans-serif; margin: 2em auto; max-width: 70em; color: #222 }
article { border-left: 6px solid #3a3; padding: .2em 1em; margin: 1.2em 0; background: #f6f6f6 }
article.wrong { border-color: #c33 } article.part { border-color: #d90 }
img { max-height: 15em; max-width: 100%; margin: .3em .3em 0 0 }
pre { white-space: pre-wrap; margin: .3em 0 } dt { font-weight: bold; float: left; width: 7em }
dd { margin: 0 0 .3em 7em } #only:checked ~ section article.right { display: none }
"""


def keep_samples(task: Task, folder: Path, rows: int) -> None:
    """Writes thumbnails of the images of evenly spaced rows among the first `rows`."""
    most = SAMPLES if task.benchmark.ask_video is None else VIDEO_SAMPLES
    count = min(rows, most)
    folder = folder / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(count):
        number = place * rows // count
        if not list(folder.glob(f"{number + 1}-*.jpg")):
            for index, image in enumerate(_thumbnails(task, number)):
                image.save(folder / f"{number + 1}-{index}.jpg", quality=80)


def _thumbnails(task: Task, number: int) -> list[Image.Image]:
    request = task.record(number).request
    if request is None:
        return []
    try:
        if request.video is not None:
            span = {k: v for k, v in request.video_options.items() if k in ("span", "frame_rate")}
            video = load_video(request.video, num_frames=_IMAGES, max_pixels=_SIDE**2, **span)
            return list(video.frames)
        images = [open_rgb(image) for image in request.images[:_IMAGES]]
    except InputError:
        return []  # the line of the row in predictions.jsonl has the error
    for image in images:
        image.thumbnail((_SIDE, _SIDE))
    return images


def render(scored: Sequence[ScoredBenchmark], out: Path) -> str:
    """The HTML page of a run; reads the thumbnails in the folders of its benchmarks."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Evaluation</title>",
        f"<style>{_STYLE}</style><h1>Sampled questions</h1>",
        "<input type=checkbox id=only><label for=only> only what is not right</label>",
    ]
    for one in scored:
        parts.append(f"<section><h2>{html.escape(one.benchmark.title)}</h2>")
        parts += _articles(one, out / one.benchmark.name / _FOLDER)
        parts.append("</section>")
    return "\n".join([*parts, "</html>", ""])


def _articles(one: ScoredBenchmark, folder: Path) -> Iterator[str]:
    kept: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("*-*.jpg")):
        kept.setdefault(int(path.stem.split("-")[0]), []).append(path)
    texts = {int(answer["id"].split()[1]): answer for answer in one.answers}
    for number, scored_row in zip(one.row_numbers, one.scored_rows, strict=True):
        if number not in kept and len(one.scored_rows) > SAMPLES:
            continue
        score = scored_row.verdict.score
        verdict = "right" if score == 1 else "wrong" if score == 0 else "part"
        answer = texts[number]
        yield f"<article class={verdict}>"
        yield "".join(map(_image_tag, kept.get(number, ())))
        fields = {
            "row": f"{number} (index {scored_row.row.get('index', 'none')})",
            "question": _question(scored_row.row),
            "answer": scored_row.row.get("answer", "none in the file"),
            "prediction": answer.get("error") or answer["text"],
            "understood": scored_row.verdict.parsed,
            "verdict": f"{verdict}, {score:.3g}",
        }
        if scored_row.verdict.fault:
            fields["fault"] = scored_row.verdict.fault
        yield "<dl>"
        for name, value in fields.items():
            yield f"<dt>{name}</dt><dd><pre>{html.escape(str(value))}</pre></dd>"
        yield "</dl></article>"


def _question(row) -> str:
    options = [f"{k}. {row[k]}" for k in row if len(k) == 1 and k.isupper()]
    listed = [str(row[name]) for name in ("candidates", "options") if name in row and not options]
    return "\n".join([str(row.get("question", "")), *sorted(options), *listed])


def _image_tag(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="">'
