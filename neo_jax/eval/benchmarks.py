"""The registry of benchmarks: one row of `TABLE` for each.

A row names the dataset file, the prompt (`prompts.py`), the scorer and the metrics (`scoring/`).
A new benchmark of a known kind is one more row. Published scores are those of the NEO-ov paper, for
2B and 9B.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from neo_jax.errors import InputError
from neo_jax.eval import prompts
from neo_jax.eval.benchmark import Benchmark
from neo_jax.eval.messages import Frames, named
from neo_jax.eval.scoring import choice, free_text, spatial, videos, yes_no
from neo_jax.eval.scoring.metrics import overall
from neo_jax.eval.tables import hub
from neo_jax.eval.tables.benchmark_files import KINDS
from neo_jax.eval.tables.rows import Row

_KIT = "https://opencompass.openxlab.space/utils"
_EASI = "https://huggingface.co/datasets/lmms-lab-si/EASI-Leaderboard-Data/resolve/main"
_HUB = "https://huggingface.co/datasets"


def _by(*columns: str):
    return lambda scored_rows: overall(scored_rows, *columns)


def _choice(name, title, file, published=None, *, source="", **more) -> Benchmark:
    """Multiple choice about images, as in VLMEvalKit; `more` replaces any part of it."""
    more = {
        "score_row": choice.score_row,
        "summarise": choice.summarise,
        "ask": prompts.choice,
        **more,
    }
    source = source or f"{_KIT}/VLMEval/{file}.tsv"
    return Benchmark(name, title, "image", (file,), published=published, source=source, **more)


def _spatial(name, title, file, column, published=None, **more) -> Benchmark:
    """Spatial questions, whose free-form answers name a letter."""
    more = {"score_row": spatial.score_letter, "summarise": _by(column), **more}
    more = {"ask": prompts.choice, "source": f"{_EASI}/{file}.tsv", **more}
    return Benchmark(name, title, "spatial", (file,), published=published, **more)


def _video(name, title, files, ask, videos_of, published=None, **more) -> Benchmark:
    """Questions about videos."""
    more = {"adapt": hub.video, **more}
    return Benchmark(
        name, title, "video", files, ask_video=ask, videos=videos_of, published=published, **more
    )


def _plain_video(row: Row) -> Sequence[str]:
    """The possible names of a row's video, the likeliest first."""
    names = [row.get(name) for name in ("video_path", "video", "videoid", "video_id", "key", "id")]
    return [f"{row['prefix']}/{row.get('video')}" if "prefix" in row else "", *filter(None, names)]


def _vsi_video(row: Row) -> Sequence[str]:
    return [row.get("video", ""), f"{row.get('dataset')}/{row.get('scene_name')}.mp4"]


def _video_mmmu(row: Row) -> Sequence[str]:
    return [row.get("video", ""), f"{row.get('category')}/{row.get('id')}", row.get("id", "")]


_MMMU_PIXELS = {"min_pixels": 1_003_520, "max_pixels": 4_014_080, "upscale": True}

TABLE = (
    _choice(
        "mmmu", "MMMU", "MMMU_DEV_VAL", (54.7, 68.1),
        ask=prompts.mmmu, score_row=choice.score_mmmu, adapt=hub.mmmu, settings=_MMMU_PIXELS,
        summarise=functools.partial(choice.summarise, main_split="validation"),
        note="The published score is the validation split's.",
    ),
    _choice(
        "mmbench", "MMBench-EN", "MMBench_DEV_EN", (80.0, 85.1),
        score_row=choice.score_circular, summarise=choice.summarise_circular,
        source=f"{_KIT}/benchmarks/MMBench/MMBench_DEV_EN.tsv",
        note="Circular: a question is right if it is right in every order of its options.",
    ),
    _choice("realworldqa", "RealWorldQA", "RealWorldQA", (64.4, 67.8)),
    _choice("mmstar", "MMStar", "MMStar", (58.6, 67.3)),
    _choice(
        "seed_image", "SEED-Image", "SEEDBench_IMG", (76.2, 76.6),
        source=f"{_KIT}/benchmarks/SEEDBench/SEEDBench_IMG.tsv",
    ),
    _choice("ai2d", "AI2D", "AI2D_TEST", (81.4, 85.4)),
    _choice(
        "scienceqa", "ScienceQA", "ScienceQA_TEST",
        source=f"{_KIT}/benchmarks/ScienceQA/ScienceQA_TEST.tsv",
    ),
    _choice(
        "docvqa", "DocVQA", "DocVQA_VAL", (91.2, 91.9),
        ask=prompts.briefly, score_row=free_text.score_anls, summarise=free_text.summarise,
    ),
    _choice(
        "chartqa", "ChartQA", "ChartQA_TEST", (83.1, 86.2), adapt=hub.chartqa,
        ask=prompts.briefly, score_row=free_text.score_relaxed, summarise=free_text.summarise,
    ),
    _choice(
        "textvqa", "TextVQA", "TextVQA_VAL", (77.3, 78.5), settings={"min_pixels": 2_097_152},
        ask=prompts.briefly, score_row=free_text.score_vqa, summarise=free_text.summarise,
    ),
    _choice(
        "ocrbench", "OCRBench", "OCRBench", (81.2, 81.6), settings={"min_pixels": 262_144},
        ask=prompts.briefly, score_row=free_text.score_ocrbench, adapt=hub.ocrbench,
        summarise=free_text.summarise_ocrbench,
        note="Points of all 1000 rows: with fewer rows there are fewer points to get.",
    ),
    _choice(
        "pope", "POPE", "POPE", (86.2, 89.0), adapt=hub.yes_no,
        ask=prompts.plain, score_row=yes_no.score_row, summarise=yes_no.summarise_pope,
    ),
    _choice(
        "hallusion", "HallusionBench", "HallusionBench", (54.5, 59.8), adapt=hub.yes_no,
        ask=prompts.yes_or_no, score_row=yes_no.score_hallusion,
        summarise=yes_no.summarise_hallusion,
    ),
    _choice(
        "mme", "MME", "MME", adapt=hub.yes_no,
        ask=prompts.one_word, score_row=yes_no.score_mme, summarise=yes_no.summarise_mme,
        note="Points, at most 2800, not percent.",
    ),
    _spatial("mindcube", "MindCube-tiny", "MindCubeBench_tiny_raw_qa", "category", (77.2, 90.0)),
    _spatial(
        "viewspatial", "ViewSpatial", "ViewSpatialBench", "question_type", (52.8, 55.2),
        ask=prompts.view_spatial,
    ),
    _spatial("mmsi", "MMSI", "MMSIBench_wo_circular", "category", ask=prompts.mmsi),
    _spatial(
        "site_image", "SITE, images", "SiteBenchImage", "category",
        ask=prompts.site, summarise=spatial.summarise_site,
    ),
    _spatial(
        "site_video", "SITE, videos", "SiteBenchVideo", "category",
        ask=None, ask_video=prompts.site_video, videos=_plain_video,
        frames=Frames(header=False, labels="numbers"), adapt=hub.video,
        settings={"num_frames": 32, "spacing": "ends"}, summarise=spatial.summarise_site,
    ),
    _spatial(
        "vsi", "VSI-Bench", "VSI-Bench", "question_type", (58.4, 64.8),
        ask=None, ask_video=prompts.vsi, videos=_vsi_video,
        frames=Frames(header=False, labels="numbers"), adapt=hub.video,
        settings={"num_frames": 32, "spacing": "ends"},
        score_row=spatial.score_vsi, summarise=spatial.summarise_vsi,
    ),
    _spatial(
        "3dsr", "3DSRBench", "3DSRBench", "category", (52.9, 61.7),
        score_row=choice.score_3dsr, summarise=choice.summarise_3dsr,
        source=f"{_KIT}/VLMEval/3DSRBench.tsv",
        note="The paper does not say which of the four settings its score is.",
    ),
    _spatial("embspatial", "EmbSpatial", "EmbSpatialBench", "data_source", (63.8, 78.8)),
    _spatial(
        "spar", "SPAR", "SparBench", "task",
        ask=prompts.briefly, score_row=spatial.score_spar, summarise=spatial.summarise_spar,
    ),
    _spatial(
        "blink", "BLINK", "BLINK", "category", (53.9, 62.8),
        score_row=choice.score_row, summarise=choice.summarise, source=f"{_KIT}/VLMEval/BLINK.tsv",
    ),
    _spatial(
        "muirbench", "MUIRBench", "MUIRBench_EASI", "task", (56.8, 58.2),
        ask=prompts.muirbench, layout=named,
        source="VLMEvalKit_ov/resources/MUIRBench_EASI.tsv of github.com/EvolvingLMMs-Lab/NEO",
    ),
    Benchmark(
        "omnispatial", "OmniSpatial", "spatial",
        ("OmniSpatialBench", "OmniSpatialBench_manual_cot"),
        score_row=spatial.score_letter, summarise=_by("task_type", "sub_task_type"),
        ask=prompts.omnispatial, source=f"{_EASI}/OmniSpatialBench.tsv",
        note="Asked directly; the official run put the benchmark's long instructions in front.",
    ),
    _video(
        "video_mme", "Video-MME", ("Video-MME", "VideoMME"), prompts.video_mme, _plain_video,
        (60.4, 67.4), score_row=videos.score_letter, source=f"{_HUB}/lmms-lab/Video-MME",
        summarise=_by("duration", "domain", "sub_category", "task_type"),
    ),
    _video(
        "mvbench", "MVBench", ("MVBench",), prompts.best_option, _plain_video, (65.7, 70.7),
        frames=Frames(before=prompts.WATCH_EVENTS, header=False, labels="none"),
        settings={"num_frames": 64, "spacing": "centres"},
        score_row=videos.score_mvbench, summarise=_by("task_type"),
        source=f"{_HUB}/OpenGVLab/MVBench",
    ),
    _video(
        "mlvu", "MLVU", ("MLVU_MCQ", "MLVU"), prompts.best_option, _plain_video, (64.8, 69.3),
        frames=Frames(before=prompts.WATCH), settings={"num_frames": 128},
        score_row=videos.score_mlvu, summarise=_by("task_type"), source=f"{_HUB}/MLVU/MVLU",
    ),
    _video(
        "lvbench", "LVBench", ("LVBench",), prompts.lvbench, _plain_video, (43.3, 46.4),
        score_row=videos.score_letter, summarise=_by("type"), source=f"{_HUB}/lmms-lab/LVBench",
    ),
    _video(
        "longvideobench", "LongVideoBench", ("LongVideoBench",), prompts.long_video, _plain_video,
        (56.8, 63.5), settings={"num_frames": 256}, has_subtitles=True,
        score_row=videos.score_long_video,
        summarise=_by("duration_group", "question_category"),
        source=f"{_HUB}/longvideobench/LongVideoBench",
    ),
    _video(
        "videommmu", "VideoMMMU", ("VideoMMMU",), prompts.video_mmmu, _video_mmmu,
        settings={"num_frames": 128}, adapt=hub.standard,
        score_row=videos.score_video_mmmu, summarise=_by("category"),
        source=f"{_HUB}/lmms-lab/VideoMMMU",
    ),
)  # fmt: skip

BENCHMARKS = {benchmark.name: benchmark for benchmark in TABLE}


def choose(names: str) -> list[Benchmark]:
    """The benchmarks of a list of names and groups, such as "mmbench,docvqa" or "spatial"."""
    found: list[Benchmark] = []
    for name in filter(None, (name.strip().lower() for name in names.split(","))):
        group = [benchmark for benchmark in TABLE if benchmark.group == name]
        if name not in BENCHMARKS and not group:
            raise InputError(f"no benchmark {name!r}: there are {', '.join(BENCHMARKS)}")
        found += group or [BENCHMARKS[name]]
    if not found:
        raise InputError(f"name benchmarks: {', '.join(BENCHMARKS)}")
    return list(dict.fromkeys(found))


def find_file(benchmark: Benchmark, data: Path) -> Path:
    """The benchmark's file or folder in `data`, or `data` itself if it is a file."""
    if data.is_file():
        return data
    if not data.is_dir():
        raise InputError(f"{data}: no such folder")

    def letters_and_digits(name: str) -> str:
        return "".join(sign for sign in name.lower() if sign.isalnum())

    wanted = {letters_and_digits(name) for name in (*benchmark.files, benchmark.name)}
    for path in sorted(data.iterdir(), key=lambda path: (path.is_dir(), path)):
        name = path.stem if path.suffix in KINDS else path.name
        if letters_and_digits(name) in wanted:
            return path
    raise InputError(
        f"{data}: nothing there for {benchmark.name}: put {benchmark.files[0]}.tsv, or a folder "
        f"{benchmark.files[0]} of parquet files, into it; from {benchmark.source}"
    )
