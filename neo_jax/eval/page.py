"""The HTML page of sampled questions: picture, answer, prediction and verdict, in one file.

Pictures are small copies that are kept when the questions are asked, so scoring anew needs no data.
"""

import base64
import html
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from neo_jax.data.image import open_rgb
from neo_jax.data.video import load_video
from neo_jax.errors import InputError
from neo_jax.eval.predictions import Work
from neo_jax.eval.score import Scored

SAMPLES, VIDEO_SAMPLES = 100, 24  # rows of a benchmark
_SIDE = 320  # pixels of a small copy
_PICTURES = 4  # of a row
_FOLDER = "samples"

_STYLE = """
body { font-family: system-ui, sans-serif; margin: 2em auto; max-width: 70em; color: #222 }
article { border-left: 6px solid #3a3; padding: .2em 1em; margin: 1.2em 0; background: #f6f6f6 }
article.wrong { border-color: #c33 } article.part { border-color: #d90 }
img { max-height: 15em; max-width: 100%; margin: .3em .3em 0 0 }
pre { white-space: pre-wrap; margin: .3em 0 } dt { font-weight: bold; float: left; width: 7em }
dd { margin: 0 0 .3em 7em } #only:checked ~ section article.right { display: none }
"""


def keep_samples(work: Work, folder: Path, rows: int) -> None:
    """Keeps small copies of the pictures of some of the first rows, evenly chosen."""
    most = SAMPLES if work.benchmark.ask_video is None else VIDEO_SAMPLES
    count = min(rows, most)
    folder = folder / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for place in range(count):
        number = place * rows // count
        if not list(folder.glob(f"{number + 1}-*.jpg")):
            for index, picture in enumerate(_small(work, number)):
                picture.save(folder / f"{number + 1}-{index}.jpg", quality=80)


def _small(work: Work, number: int) -> list[Image.Image]:
    request = work.record(number).request
    if request is None:
        return []
    try:
        if request.video is not None:
            span = {k: v for k, v in request.video_options.items() if k in ("span", "frame_rate")}
            video = load_video(request.video, num_frames=_PICTURES, max_pixels=_SIDE**2, **span)
            return list(video.frames)
        pictures = [open_rgb(picture) for picture in request.images[:_PICTURES]]
    except InputError:
        return []  # its line says what is wrong
    for picture in pictures:
        picture.thumbnail((_SIDE, _SIDE))
    return pictures


def render(scored: Sequence[Scored], out: Path) -> str:
    """The page of a run, whose folders have the small copies."""
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


def _articles(one: Scored, folder: Path) -> Iterator[str]:
    kept: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("*-*.jpg")):
        kept.setdefault(int(path.stem.split("-")[0]), []).append(path)
    texts = {int(answer["id"].split()[1]): answer for answer in one.answers}
    for number, scored_rows in zip(one.numbers, one.scored_rows, strict=True):
        if number not in kept and len(one.scored_rows) > SAMPLES:
            continue
        score = scored_rows.verdict.score
        verdict = "right" if score == 1 else "wrong" if score == 0 else "part"
        answer = texts[number]
        yield f"<article class={verdict}>"
        yield "".join(map(_picture, kept.get(number, ())))
        fields = {
            "row": f"{number} (index {scored_rows.row.get('index', 'none')})",
            "question": _question(scored_rows.row),
            "answer": scored_rows.row.get("answer", "none in the file"),
            "prediction": answer.get("error") or answer["text"],
            "understood": scored_rows.verdict.said,
            "verdict": f"{verdict}, {score:.3g}",
        }
        if scored_rows.verdict.fault:
            fields["fault"] = scored_rows.verdict.fault
        yield "<dl>"
        for name, value in fields.items():
            yield f"<dt>{name}</dt><dd><pre>{html.escape(str(value))}</pre></dd>"
        yield "</dl></article>"


def _question(row) -> str:
    options = [f"{k}. {row[k]}" for k in row if len(k) == 1 and k.isupper()]
    listed = [str(row[name]) for name in ("candidates", "options") if name in row and not options]
    return "\n".join([str(row.get("question", "")), *sorted(options), *listed])


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="">'
