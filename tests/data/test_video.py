"""Frames and prompts of videos against the official code; small real videos, read back."""

import dataclasses
import sys

import numpy as np
import pytest
from PIL import Image

from helpers.golden import GOLDEN, arrays, raises, read_json
from neo_jax.data.chat import chat_prompt
from neo_jax.data.image import normalise, patchify
from neo_jax.data.video import (
    Video,
    at_rate,
    choose_frames,
    evenly,
    frame_limits,
    load_video,
    span_frames,
    time_text,
    video_prompt,
)

SAMPLING = read_json("chat", "frame_sampling.json")
CAPS = {"LVBench": 256, "Video-MME": 256, "MLVU_MCQ": 128}
FILES = ["a.mp4 libx264", "a.mkv libx264", "a.h264 libx264", "a.mp4 mpeg4", "a.avi mpeg4"]
FILES += ["a.webm libvpx", "a.webm libvpx-vp9", "a.ts mpeg2video", "a.gif gif"]
NUM_FRAMES, RATE = 60, 10


def write_video(path, codec="mpeg4", left=None, title="", **options):
    """60 frames of 96 x 64 at 10 per second in groups of 12; frame k has grey value 4 k.

    `left` is the grey of all left halves, if given; `title` is metadata.
    """
    av = pytest.importorskip("av")
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    with av.open(str(path), "w", options=options) as container:
        if title:
            container.metadata["title"] = title
        stream = container.add_stream(codec, rate=RATE)
        stream.width, stream.height = 96, 64
        stream.pix_fmt = "gray" if codec == "gif" else "yuv420p"
        stream.gop_size, stream.bit_rate = 12, 1_000_000
        for number in range(NUM_FRAMES):
            image = np.full((64, 96, 3), 4 * number, np.uint8)
            if left is not None:
                image[:, :48] = left
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def seen(video):
    """The numbers of a written video's frames, by their grey."""
    return [round(np.asarray(frame).mean() / 4) for frame in video.frames]


@pytest.mark.parametrize("dataset", sorted({row["dataset"] for row in SAMPLING["rows"]}))
def test_frames_are_those_of_the_official_code(dataset):
    for row in (row for row in SAMPLING["rows"] if row["dataset"] == dataset):
        total, rate, count = row["n_frames"], row["native_fps"], row["nframe"]
        if dataset == "MVBench":
            if row["bound"] and row["bound"][0] * rate > total:
                with raises("holds no frame"):  # the official code asks for frames past the end
                    span_frames(total, rate, row["bound"])
                continue
            first, last = span_frames(total, rate, row["bound"])
            chosen = first + evenly(last - first + 1, count, "centres")
        elif count > 0:
            chosen = evenly(total, count)
        else:
            chosen = at_rate(total, rate, row["fps"], CAPS.get(dataset))
        shown = chosen.tolist()
        if "..." in row["indices"]:
            shown = [*shown[:6], "...", *shown[-6:]]
        assert shown == row["indices"], row
        assert (len(chosen), chosen.sum()) == (row["count"], row["index_sum"])


def test_every_time_text():
    for seconds, time, length in SAMPLING["timestamps"]["rows"]:
        assert time_text(seconds) == time
        video = Video((), np.zeros(0), 1.0, seconds)
        assert f"[00:00-{length}]," in video_prompt(video, "")


def test_prompt_and_pixels_of_the_official_video():
    meta, wanted = read_json("video", "meta.json"), arrays("video", "inputs.npz")
    video = load_video(GOLDEN / "video/frames/clip")
    indices = choose_frames(meta["native_n_frames"], meta["native_fps"], num_frames=8)
    duration = meta["native_n_frames"] / meta["native_fps"]
    times = indices / meta["native_fps"]
    video = dataclasses.replace(video, times=times, fps=8 / duration, duration=duration)
    assert video_prompt(video, meta["messages"][-1]["value"]) == meta["question"]
    patches, grids = zip(*(patchify(np.asarray(frame)) for frame in video.frames), strict=True)
    np.testing.assert_array_equal(np.concatenate(grids), wanted["grid_hw"])
    np.testing.assert_array_equal(normalise(np.concatenate(patches)), wanted["pixel_values"])


def test_prompts_without_header_or_times_are_the_official_ones():
    rows = read_json("chat", "evaluation_prompts.json")["reorganize_prompt"]
    golden = {row["name"]: row for row in rows}

    def prompt(count, question, labels):
        video = Video((None,) * count, np.arange(1.0, count + 1), 1.0, 9.0)
        return video_prompt(video, question, header=False, labels=labels)

    assert "range\n" + prompt(3, "Q", "times") == golden["video_ts"]["neo"]
    row = golden["video_empty_ts"]
    question = "".join(part["value"] for part in row["message"][5:])
    assert "SYS " + prompt(2, question, "none") == row["neo"]
    row = golden["images_only_vsi"]
    question = row["message"][-1]["value"]
    assert prompt(2, question, "numbers") == row["neo_si_after_build_video_prompt"]


@pytest.mark.parametrize("labels", ["times", "numbers", "none"])
def test_a_mark_for_every_frame(labels):
    video = load_video([Image.new("RGB", (32, 32))] * 3)
    prompt = chat_prompt(video_prompt(video, "Q", labels=labels), num_images=3)
    assert prompt.count("<image>\n") == 3
    with raises("remove it"):
        video_prompt(video, "<image>\nQ", labels=labels)
    with raises("labels 'dots': use one of times, numbers, none"):
        video_prompt(video, "Q", labels="dots")


@pytest.mark.parametrize("file", FILES)
def test_frames_of_a_file_are_the_chosen_ones(file, tmp_path):
    name, codec = file.split()
    path = write_video(tmp_path / name, codec)
    video = load_video(path, fps=1000)
    assert seen(video) == list(range(NUM_FRAMES))
    # Not the rate written where the file has no clock: a raw stream.
    rate = NUM_FRAMES / video.duration
    np.testing.assert_allclose(video.times, np.arange(NUM_FRAMES) / rate)
    assert seen(load_video(path, num_frames=5)) == [10, 20, 30, 40, 50]
    assert seen(load_video(path, num_frames=4, spacing="ends")) == [0, 19, 39, 59]
    assert seen(load_video(path, num_frames=3, span=(23 / rate, 25 / rate))) == [23, 24, 25]


def test_one_frame_per_second_unless_asked_otherwise(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    video = load_video(path)
    assert seen(video) == [0, 10, 20, 30, 40, 50]
    assert (video.times.tolist(), video.fps, video.duration) == ([0, 1, 2, 3, 4, 5], 1.0, 6.0)
    assert seen(load_video(path, fps=5, max_frames=3)) == [0, 15, 30]
    assert len(load_video(path, fps=100).frames) == NUM_FRAMES
    assert seen(load_video(path, span=(1.2, 1.6))) == [12]


def test_a_short_video_repeats_frames_or_gives_one():
    images = [Image.new("L", (32, 32), 4 * number) for number in range(3)]
    assert seen(load_video(images, num_frames=6)) == [0, 0, 1, 1, 2, 2]
    assert seen(load_video(images, frame_rate=10)) == [0]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_groups_without_a_chosen_frame_are_not_decoded(name, tmp_path):
    av = pytest.importorskip("av")
    path = write_video(tmp_path / name)
    with av.open(str(path)) as container:
        packets = [(packet.pts, bytes(packet)) for packet in container.demux(video=0)][:-1]
    data = path.read_bytes()
    for _, packet in sorted(packets)[:24] + sorted(packets)[36:]:
        data = data.replace(packet, bytes(len(packet)))
    path.write_bytes(data)
    assert seen(load_video(path, num_frames=2, span=(2.9, 3.2))) == [30, 31]


def test_a_title_that_is_not_utf8_is_no_matter(tmp_path):
    av = pytest.importorskip("av")
    path = write_video(tmp_path / "a.mp4", title="the title")
    path.write_bytes(path.read_bytes().replace(b"the title", b"\xff\xfe title"))
    assert seen(load_video(path, num_frames=5)) == [10, 20, 30, 40, 50]
    if int(av.__version__.split(".")[0]) < 19:
        with pytest.raises(UnicodeDecodeError):
            av.open(str(path))


def test_a_turned_video_comes_out_upright(tmp_path):
    path = write_video(tmp_path / "a.mp4", left=255)
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    quarter = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30], ">i4")
    data[matrix : matrix + 36] = quarter.tobytes()
    path.write_bytes(data)
    grey = np.asarray(load_video(path, num_frames=1).frames[0]).mean(axis=2)
    assert grey.shape == (96, 64)
    assert grey[:40].min() > 230
    assert grey[56:].max() < 140


def test_a_folder_is_read_in_natural_order_and_only_where_chosen(tmp_path):
    for number in range(12):
        Image.new("RGB", (64, 64), (4 * number,) * 3).save(tmp_path / f"frame-{number}.png")
    (tmp_path / "frame-2.png").write_text("damaged, but not chosen")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "._frame-1.png").write_text("what macOS leaves")
    video = load_video(tmp_path, frame_rate=4, fps=1)
    assert seen(video) == [0, 4, 8]
    assert (video.times.tolist(), video.fps, video.duration) == ([0, 1, 2], 1.0, 3.0)
    with raises("frame-2.png", "not an image"):
        load_video(tmp_path)


def test_pictures_of_a_list_may_be_given_in_any_way():
    path = GOLDEN / "images/files/rgb.png"
    image = Image.open(path)
    video = load_video([path, path.read_bytes(), image, np.asarray(image)])
    first, *others = (np.asarray(frame) for frame in video.frames)
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_pixels_of_frames_stay_within_the_budget():
    images = [Image.new("RGB", (640, 480))] * 8
    assert frame_limits(128, 4096, 230400, 8388608) == (4096, 65536)
    assert frame_limits(128, 4096, 230400, 1000) == (4096, 4096)
    areas = [frame.width * frame.height for frame in load_video(images).frames]
    assert all(4096 <= area <= 230400 for area in areas)
    areas = [f.width * f.height for f in load_video(images, total_pixels=500_000).frames]
    assert sum(areas) <= 500_000
    with raises("min_pixels 8 must be 1 to max_pixels 4"):
        load_video(images, min_pixels=8, max_pixels=4)


def test_bad_files_are_named(tmp_path):
    av = pytest.importorskip("av")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "text.txt").write_text("no video\n" * 50)
    (tmp_path / "empty").mkdir()
    with av.open(str(tmp_path / "sound.m4a"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        sound.rate = 8000
        container.mux([*stream.encode(sound), *stream.encode()])
    with raises("absent.mp4", "No such file"):
        load_video(tmp_path / "absent.mp4")
    with raises("text.mp4", "Invalid data"):
        load_video(tmp_path / "text.mp4")
    for name in ("text.txt", "sound.m4a"):
        with raises(name, "no video stream"):
            load_video(tmp_path / name)
    with raises("empty", "no images in it"):
        load_video(tmp_path / "empty")


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}])
def test_a_file_that_is_cut_off_is_refused(options, keep, tmp_path):
    path = write_video(tmp_path / "cut.mp4", **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with raises("cut.mp4", "(cut off|cannot be read)"):
        load_video(path)


def test_a_damaged_frame_is_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    data = path.read_bytes()
    start = data.index(b"mdat") + 4
    path.write_bytes(data[:start] + bytes(len(data) // 2) + data[start + len(data) // 2 :])
    with raises("a.mp4", "(cannot be read|cannot be decoded)"):
        load_video(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fps": 0}, "fps is 0: it must be above 0"),
        ({"fps": float("nan")}, "fps is nan"),
        ({"fps": 1, "num_frames": 2}, "num_frames or fps, not both"),
        ({"num_frames": 0}, "num_frames 0, max_frames 128: need 1 <= num <= max"),
        ({"num_frames": 129}, "num_frames 129, max_frames 128"),
        ({"max_frames": 0}, "max_frames 0"),
        ({"num_frames": 1, "spacing": "odd"}, "spacing 'odd': use inside, centres or ends"),
        ({"span": (2, 1)}, "holds no frame: the video has 3.00 seconds"),
        ({"frame_rate": 0}, "frame_rate 0: above 0"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with raises(message):
        load_video([Image.new("RGB", (32, 32))] * 3, **arguments)


def test_what_is_no_video_is_refused(tmp_path, monkeypatch):
    with raises("a path or a list of images, not int"):
        load_video(7)
    with raises("no images in it"):
        load_video([])
    with raises("frame_rate 5: above 0, for folders and lists"):
        load_video(tmp_path / "a.mp4", frame_rate=5)
    monkeypatch.setitem(sys.modules, "av", None)
    with raises("a.mp4", r"install neo-ov-jax\[video\]"):
        load_video(tmp_path / "a.mp4")
